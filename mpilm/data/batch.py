"""Microbatches by step and number alone: any rank can make any of them, and all ranks would make the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpilm.data.corpus import Corpus
from mpilm.data.objective import Causal, Objective
from mpilm.data.order import Indices, key_of, permute, sample_at
from mpilm.errors import ConfigError, DataError
from mpilm.model.loss import IGNORED

CAUSAL = Causal()
OBJECTIVE = 0x6D61736B  # a word in the keys that objectives draw by
HELD_OUT_KEY = key_of(0x6576616C)  # the same for every seed: runs with different seeds are compared on the same text


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
    """The corpus cut into samples of T + 1 tokens that overlap by one: sample i covers tokens [i T, i T + T + 1).

    The last `eval_fraction` of the tokens is held out; no training sample reaches into it. `packing`: "concat", a sample is one
    text, whatever documents it has parts of; "documents", attention stays in each, positions begin anew, and no token is
    predicted from another document. Raises ConfigError naming --model.context-length when a sample does not fit.
    """

    def __init__(
        self, corpus: Corpus, context_length: int, eval_fraction: float, seed: int, global_batch: int, micro_batch: int,
        objective: Objective = CAUSAL, packing: str = "concat",
    ):  # fmt: skip
        self.corpus, self.context_length, self.seed = corpus, context_length, seed
        self.objective, self.packing = objective, packing
        self.global_batch, self.micro_batch = global_batch, micro_batch
        total = len(corpus.tokens)
        self.boundary = total - int(total * eval_fraction)
        """The first held-out token."""
        self.train_samples = max(0, self.boundary - 1) // context_length
        self.eval_samples = max(0, total - self.boundary - 1) // context_length
        self._refuse_too_short(eval_fraction)

    def _refuse_too_short(self, eval_fraction: float) -> None:
        train, held_out = self.boundary, len(self.corpus.tokens) - self.boundary
        if self.train_samples and (self.eval_samples or not eval_fraction):
            return
        shortest = min(train, held_out) if eval_fraction else train
        if shortest < 2:
            raise DataError(
                f"{self.corpus.path}: {train} tokens to train on and {held_out} held out are too few for a single sample; "
                "give more text, or another --data.eval-fraction (0: hold out nothing)"
            )
        raise ConfigError(
            f"--model.context-length {self.context_length}: {train} tokens to train on and {held_out} held out hold no whole "
            f"sample of that length; the largest value that works is {shortest - 1}, or give more text"
        )

    def train(self, step: int, m: int) -> Batch:
        """Microbatch m of a step."""
        first = step * self.global_batch + m * self.micro_batch
        numbers = np.arange(first, first + self.micro_batch, dtype=np.int64)
        return self._batch(0, sample_at(numbers, self.seed, self.train_samples), numbers, self.seed)

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
        """Held-out microbatch i; the last may hold fewer rows. In a fixed shuffled order, so that a few speak for all."""
        rows = np.arange(i * self.micro_batch, min((i + 1) * self.micro_batch, self.eval_samples), dtype=np.int64)
        return self._batch(self.boundary, permute(rows, self.eval_samples, HELD_OUT_KEY), rows, HELD_OUT_KEY)

    def _batch(self, origin: int, samples: Indices, numbers: Indices, seed: int) -> Batch:
        length = self.context_length
        starts = origin + samples * length
        rows = np.stack([self.corpus.read(start, start + length + 1) for start in starts.tolist()])
        read, targets = self.objective(rows, [key_of(seed, number, OBJECTIVE) for number in numbers.tolist()])
        positions, documents = np.arange(length), None
        if self.packing == "documents":
            every, places = documents_of(rows, self.corpus.tokenizer.eos)
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
