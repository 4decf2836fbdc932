"""Microbatches by step and number alone: any rank can make any of them, and all ranks would make the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpilm.data.order import Indices
from mpilm.data.stream import Examples, Stream


@dataclass(frozen=True)
class Batch:
    """What a model reads, and what it is to predict."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64, what is to be predicted at each place, or IGNORED."""
    positions: Tensor
    """(T,) int64, or (B, T)."""
    samples: Tensor
    """(B,) int64, a number for each sequence that no other of the run has; what dropout is keyed by."""
    target_tokens: int
    """Targets that are not IGNORED."""
    documents: Tensor | None = None
    """(B, T) int64, numbers of the documents in each row among whose tokens attention stays; None: each row is one."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on that device."""
        return replace(
            self, tokens=self.tokens.to(device), targets=self.targets.to(device), positions=self.positions.to(device),
            documents=None if self.documents is None else self.documents.to(device),
        )  # fmt: skip


class Batches:
    """Microbatches of a run over a stream of examples."""

    def __init__(self, stream: Stream, seed: int, global_batch: int, micro_batch: int):
        self.stream, self.seed, self.global_batch, self.micro_batch = stream, seed, global_batch, micro_batch
        self.context_length, self.eval_samples = stream.context_length, stream.eval_samples

    def train(self, step: int, m: int) -> Batch:
        """Microbatch m of a step."""
        first = step * self.global_batch + m * self.micro_batch
        numbers = np.arange(first, first + self.micro_batch, dtype=np.int64)
        return _batch(self.stream.train(numbers, self.seed), numbers)

    @property
    def step_tokens(self) -> int:
        """Tokens that the model reads in a step, over all ranks."""
        return self.global_batch * self.context_length

    def target_tokens(self, step: int) -> int:
        """Tokens that the model predicts in a step, over all ranks."""
        numbers = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        return self.stream.train_targets(numbers, self.seed)

    def eval_rows(self, limit: int = 0) -> int:
        """Held-out samples that an evaluation over `limit` global batches reads, in whole microbatches; 0: all there are."""
        rows = min(self.eval_samples, limit * self.global_batch or self.eval_samples)
        return min(self.eval_samples, -(-rows // self.micro_batch) * self.micro_batch)

    def eval_microbatches(self, limit: int = 0) -> int:
        """Microbatches of such an evaluation."""
        return -(-self.eval_rows(limit) // self.micro_batch)

    def eval_targets(self, limit: int = 0) -> int:
        """Tokens that the model predicts in such an evaluation."""
        return self.stream.held_out_targets(np.arange(self.eval_rows(limit), dtype=np.int64))

    def evaluation(self, i: int) -> Batch:
        """Held-out microbatch i; the last may hold fewer rows."""
        rows = np.arange(i * self.micro_batch, min((i + 1) * self.micro_batch, self.eval_samples), dtype=np.int64)
        return _batch(self.stream.held_out(rows), rows)


def _batch(examples: Examples, numbers: Indices) -> Batch:
    documents = None if examples.documents is None else _tensor(examples.documents)
    return Batch(
        _tensor(examples.read), _tensor(examples.targets), _tensor(examples.positions), torch.from_numpy(numbers),
        examples.target_tokens, documents,
    )  # fmt: skip


def _tensor(values: Indices) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
