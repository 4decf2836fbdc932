"""Microbatches by step and number alone: any rank can make any of them, and all ranks would make the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpilm.data.objective import Causal, Objective
from mpilm.data.order import Indices, key_of
from mpilm.data.samples import HELD_OUT_KEY, Samples
from mpilm.model.loss import IGNORED

CAUSAL = Causal()
OBJECTIVE = 0x6D61736B  # a word in the keys that objectives draw by


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
    """Microbatches of a run over `samples`.

    `packing`: "concat", a sample is one text, whatever documents it has parts of; "documents", attention stays in each, which
    ends with the token `eos`, positions begin anew, and no token is predicted from another document.
    """

    def __init__(
        self, samples: Samples, seed: int, global_batch: int, micro_batch: int, objective: Objective = CAUSAL,
        packing: str = "concat", eos: int = -1,
    ):  # fmt: skip
        self.samples, self.seed, self.global_batch, self.micro_batch = samples, seed, global_batch, micro_batch
        self.objective, self.packing, self.eos = objective, packing, eos
        self.context_length, self.eval_samples = samples.context_length, samples.eval_samples

    def train(self, step: int, m: int) -> Batch:
        """Microbatch m of a step."""
        first = step * self.global_batch + m * self.micro_batch
        numbers = np.arange(first, first + self.micro_batch, dtype=np.int64)
        return self._batch(self.samples.train(numbers, self.seed), numbers, self.seed)

    @property
    def step_tokens(self) -> int:
        """Tokens that the model reads in a step, over all ranks."""
        return self.global_batch * self.context_length

    def target_tokens(self, step: int) -> int:
        """Tokens that the model predicts in a step, over all ranks."""
        if self._varies:
            return sum(self.train(step, m).target_tokens for m in range(self.global_batch // self.micro_batch))
        return self.global_batch * self.objective.targets(self.context_length)

    @property
    def _varies(self) -> bool:
        return self.objective.varies or (self.packing == "documents" and self.objective.looks_ahead)

    def eval_rows(self, limit: int = 0) -> int:
        """Held-out samples that an evaluation over `limit` global batches reads, in whole microbatches; 0: all there are."""
        rows = min(self.eval_samples, limit * self.global_batch or self.eval_samples)
        return min(self.eval_samples, -(-rows // self.micro_batch) * self.micro_batch)

    def eval_microbatches(self, limit: int = 0) -> int:
        """Microbatches of such an evaluation."""
        return -(-self.eval_rows(limit) // self.micro_batch)

    def eval_targets(self, limit: int = 0) -> int:
        """Tokens that the model predicts in such an evaluation."""
        if self._varies:
            return sum(self.evaluation(i).target_tokens for i in range(self.eval_microbatches(limit)))
        return self.eval_rows(limit) * self.objective.targets(self.context_length)

    def evaluation(self, i: int) -> Batch:
        """Held-out microbatch i; the last may hold fewer rows."""
        rows = np.arange(i * self.micro_batch, min((i + 1) * self.micro_batch, self.eval_samples), dtype=np.int64)
        return self._batch(self.samples.held_out(rows), rows, HELD_OUT_KEY)

    def _batch(self, rows: Indices, numbers: Indices, seed: int) -> Batch:
        read, targets = self.objective(rows, [key_of(seed, number, OBJECTIVE) for number in numbers.tolist()])
        positions, documents = np.arange(self.context_length), None
        if self.packing == "documents":
            every, places = documents_of(rows, self.eos)
            if self.objective.looks_ahead:
                targets = np.where(every[:, 1:] == every[:, :-1], targets, IGNORED)
            positions, documents = places[:, :-1], _tensor(every[:, :-1])
        count = int(np.count_nonzero(targets != IGNORED))
        return Batch(_tensor(read), _tensor(targets), _tensor(positions), torch.from_numpy(numbers), count, documents)


def documents_of(rows: Indices, eos: int) -> tuple[Indices, Indices]:
    """For each token of each row the number of its document, counted from the row's first, and its place there: a document ends
    with `eos`. 2 x (B, T)."""
    documents = np.zeros_like(rows)
    documents[:, 1:] = np.cumsum(rows[:, :-1] == eos, axis=1)
    places = np.arange(rows.shape[1])
    begins = np.zeros_like(rows)
    begins[:, 1:] = np.where(rows[:, :-1] == eos, places[1:], 0)
    return documents, places - np.maximum.accumulate(begins, axis=1)


def _tensor(values: Indices) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
