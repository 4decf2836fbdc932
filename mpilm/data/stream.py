"""Examples by number: what a model reads and what it is to predict, wherever they come from."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from mpilm.data.objective import Causal, Objective
from mpilm.data.order import Indices, key_of
from mpilm.data.samples import HELD_OUT_KEY, Samples
from mpilm.model.loss import IGNORE_INDEX

CAUSAL = Causal()
OBJECTIVE = 0x6D61736B  # a word in the keys that objectives draw by


class Examples(NamedTuple):
    """`read`, and `targets` or IGNORED: (B, T) int64. `positions`: (T,) or (B, T). `documents`: (B, T), numbers of those among
    whose tokens attention stays, or None: each row is one."""

    read: Indices
    targets: Indices
    positions: Indices
    documents: Indices | None

    @property
    def target_tokens(self) -> int:
        """Targets that count."""
        return int(np.count_nonzero(self.targets != IGNORE_INDEX))


class Stream(Protocol):
    """What Batches reads from; `numbers` are places in the endless stream of a run, or of held-out samples."""

    context_length: int

    @property
    def eval_samples(self) -> int: ...

    def train(self, numbers: Indices, seed: int) -> Examples: ...
    def held_out(self, numbers: Indices) -> Examples: ...
    def train_targets(self, numbers: Indices, seed: int) -> int: ...
    def held_out_targets(self, numbers: Indices) -> int: ...


class TextStream:
    """Samples of running text and what is asked of them.

    `packing`: "concat", a sample is one text, whatever documents it has parts of; "documents", attention stays in each, which
    ends with the token `eos`, positions begin anew, and no token is predicted from another document.
    """

    def __init__(self, samples: Samples, objective: Objective = CAUSAL, packing: str = "concat", eos: int = -1):
        self.samples, self.objective, self.packing, self.eos = samples, objective, packing, eos
        self.context_length, self.eval_samples = samples.context_length, samples.eval_samples

    def train(self, numbers: Indices, seed: int) -> Examples:
        return self._examples(self.samples.train(numbers, seed), numbers, seed)

    def held_out(self, numbers: Indices) -> Examples:
        return self._examples(self.samples.held_out(numbers), numbers, HELD_OUT_KEY)

    def train_targets(self, numbers: Indices, seed: int) -> int:
        if self.objective.varies:
            return self.train(numbers, seed).target_tokens
        return self._fixed(numbers) - (self._endings(self.samples.train(numbers, seed)) if self._apart else 0)

    def held_out_targets(self, numbers: Indices) -> int:
        if self.objective.varies:
            return self.held_out(numbers).target_tokens
        return self._fixed(numbers) - (self._endings(self.samples.held_out(numbers)) if self._apart else 0)

    @property
    def _apart(self) -> bool:
        """Whether tokens that begin a document are not predicted."""
        return self.packing == "documents" and self.objective.looks_ahead

    def _fixed(self, numbers: Indices) -> int:
        return len(numbers) * self.objective.targets(self.context_length)

    def _endings(self, rows: Indices) -> int:
        return int(np.count_nonzero(rows[:, :-1] == self.eos))

    def _examples(self, rows: Indices, numbers: Indices, seed: int) -> Examples:
        read, targets = self.objective(rows, [key_of(seed, number, OBJECTIVE) for number in numbers.tolist()])
        if self.packing == "concat":
            return Examples(read, targets, np.arange(self.context_length), None)
        documents, places = documents_of(rows, self.eos)
        if self.objective.looks_ahead:
            targets = np.where(documents[:, 1:] == documents[:, :-1], targets, IGNORE_INDEX)
        return Examples(read, targets, places[:, :-1], documents[:, :-1])


def documents_of(rows: Indices, eos: int) -> tuple[Indices, Indices]:
    """For each token of each row the number of its document, counted from the row's first, and its place there: a document ends
    with `eos`. 2 x (B, T)."""
    documents = np.zeros_like(rows)
    documents[:, 1:] = np.cumsum(rows[:, :-1] == eos, axis=1)
    places = np.arange(rows.shape[1])
    begins = np.zeros_like(rows)
    begins[:, 1:] = np.where(rows[:, :-1] == eos, places[1:], 0)
    return documents, places - np.maximum.accumulate(begins, axis=1)
