"""Microbatches by step and number alone: any rank can make any of them, and all ranks would make the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpilm.data.order import Indices
from mpilm.kernels.base import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of a model: B sequences of T tokens."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the token to predict at each position, or IGNORE_INDEX
    positions: Tensor  # (T,) int64, or (B, T)
    samples: Tensor  # (B,) int64: a number for each sequence that no other of the run has; dropout is keyed by it
    target_tokens: int  # targets that are not IGNORE_INDEX
    documents: Tensor | None = None  # (B, T) int64: numbers of documents, inside which attention stays; None: each row is one
    parts: tuple[int, ...] = (0,)  # numbers of the sequence parts that this rank accounts for; `documents` are those of all
    part_count: int = 1

    @classmethod
    def from_arrays(cls, **arrays: Indices) -> Batch:
        """Return the batch of arrays that are named as the fields, and count its targets."""
        tensors: dict[str, Any] = {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
        return cls(target_tokens=int(np.count_nonzero(arrays["targets"] != IGNORE_INDEX)), **tensors)

    def select_parts(self, select: Callable[[Tensor, int], Tensor], parts: Sequence[int], part_count: int) -> Batch:
        """Return the batch of some sequence parts; select(x, dim) returns their tokens from all tokens, which lie along dim."""
        tokens, targets = select(self.tokens, 1), select(self.targets, 1)
        positions = select(self.positions, self.positions.dim() - 1)
        return replace(self, tokens=tokens, targets=targets, positions=positions, parts=tuple(parts), part_count=part_count)

    def select_none(self) -> Batch:
        """Return the batch without its sequences."""
        arrays = {name: getattr(self, name)[:0] for name in ("tokens", "targets", "samples")}
        positions = self.positions[:0] if self.positions.dim() == 2 else self.positions
        documents = None if self.documents is None else self.documents[:0]
        return replace(self, **arrays, positions=positions, documents=documents, target_tokens=0)

    def split_parts(self, x: Tensor) -> list[Tensor]:  # (B, T, ...) -> of each part (B, T / parts, ...)
        """Return the tokens of each part, or all tokens if there is one part, or none."""
        return [part.contiguous() for part in x.unflatten(1, (len(self.parts), -1)).unbind(1)] if len(self.parts) > 1 else [x]

    def place_parts(self, values: Sequence[Tensor]) -> Tensor:
        """Return the values of all sequence parts, stacked, from those of `split_parts`: zeros for parts that are not here."""
        if self.part_count == 1:
            return torch.stack(list(values))
        by_part = dict(zip(self.parts, values))
        return torch.stack([by_part.get(part, torch.zeros_like(values[0])) for part in range(self.part_count)])

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device; `samples` stay."""
        names = ("tokens", "targets", "positions", *(["documents"] if self.documents is not None else []))
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class ExampleSource(Protocol):
    """Examples made from their numbers in the endless stream of a run or, with a seed of None, in the validation split."""

    context_length: int
    eval_samples: int

    def make_batch(self, numbers: Indices, seed: int | None) -> Batch: ...
    def count_targets(self, numbers: Indices, seed: int | None) -> int: ...


class Batches:
    """Microbatches of a run."""

    def __init__(self, examples: ExampleSource, seed: int, global_batch: int, micro_batch: int):
        self.examples, self.seed, self.global_batch, self.micro_batch = examples, seed, global_batch, micro_batch
        self.context_length, self.eval_samples = examples.context_length, examples.eval_samples
        self.step_tokens = global_batch * examples.context_length  # that the model reads, over all ranks

    def training_batch(self, step: int, m: int) -> Batch:
        """Return microbatch m of a step."""
        first = step * self.global_batch + m * self.micro_batch
        return self.examples.make_batch(np.arange(first, first + self.micro_batch, dtype=np.int64), self.seed)

    def evaluation_batch(self, m: int) -> Batch:
        """Return microbatch m of the validation split; the last may hold fewer rows."""
        stop = min((m + 1) * self.micro_batch, self.eval_samples)
        return self.examples.make_batch(np.arange(m * self.micro_batch, stop, dtype=np.int64), None)

    def target_tokens(self, step: int) -> int:
        """Return how many tokens the model predicts in a step, over all ranks."""
        numbers = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        return self.examples.count_targets(numbers, self.seed)

    def eval_microbatches(self, limit: int = 0) -> int:
        """Return the number of microbatches of an evaluation over `limit` global batches; 0: over the whole split."""
        return -(-min(self.eval_samples, limit * self.global_batch or self.eval_samples) // self.micro_batch)

    def eval_targets(self, limit: int = 0) -> int:
        """Return how many tokens the model predicts in such an evaluation."""
        rows = min(self.eval_samples, self.eval_microbatches(limit) * self.micro_batch)
        return self.examples.count_targets(np.arange(rows, dtype=np.int64), None)
