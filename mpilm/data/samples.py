"""Samples of one length from one corpus, or from several in stated parts: any of them by its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mpilm.data.corpus import Corpus
from mpilm.data.order import Indices, key_of, permute, sample_at
from mpilm.errors import ConfigError, DataError

HELD_OUT_KEY = key_of(0x6576616C)  # the same for every seed: runs with different seeds are compared on the same text
MIX_KEY = 0x6D6978
PERIOD = 2**16  # samples in which each corpus has exactly its part, to the nearest whole number


class Samples(Protocol):
    """What a TextStream reads from."""

    context_length: int

    @property
    def eval_samples(self) -> int: ...

    def train(self, numbers: Indices, seed: int) -> Indices:
        """The samples read at these places of the endless stream of a run: (B,) -> (B, T + 1) tokens."""
        ...

    def held_out(self, numbers: Indices) -> Indices:
        """Held-out samples, in a fixed shuffled order, so that a few speak for all."""
        ...


class CorpusSamples:
    """A corpus cut into samples of T + 1 tokens that overlap by one: sample i covers tokens [i T, i T + T + 1).

    The last `eval_fraction` of the tokens is held out; no training sample reaches into it. Raises ConfigError naming
    --model.context-length when a sample does not fit.
    """

    def __init__(self, corpus: Corpus, context_length: int, eval_fraction: float):
        self.corpus, self.context_length = corpus, context_length
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
                f"--data.path {self.corpus.source}: {train} tokens to train on and {held_out} held out are too few for one "
                "sample; give more text, or another --data.eval-fraction (0: hold out nothing)"
            )
        raise ConfigError(
            f"--model.context-length {self.context_length}: of {self.corpus.source}, {train} tokens to train on and {held_out} "
            f"held out hold no whole sample of that length; the largest value that works is {shortest - 1}, or give more text"
        )

    def train(self, numbers: Indices, seed: int) -> Indices:
        return self._rows(0, sample_at(numbers, seed, self.train_samples))

    def held_out(self, numbers: Indices) -> Indices:
        return self._rows(self.boundary, permute(numbers, self.eval_samples, HELD_OUT_KEY))

    def _rows(self, origin: int, samples: Indices) -> Indices:
        starts = (origin + samples * self.context_length).tolist()
        return np.stack([self.corpus.read(start, start + self.context_length + 1) for start in starts])


class Mixture:
    """Several corpora, of which each has its part of the samples, whatever its size; `parts` add up to 1.

    A keyed permutation of every PERIOD samples says which corpus is read when, and how far each has come, so that nothing has
    to be counted or stored. Held out is the end of each, together.
    """

    def __init__(self, corpora: Sequence[CorpusSamples], parts: Sequence[float]):
        self.corpora, self.context_length = corpora, corpora[0].context_length
        self.ends = shares(parts)

    @property
    def eval_samples(self) -> int:
        return sum(corpus.eval_samples for corpus in self.corpora)

    def train(self, numbers: Indices, seed: int) -> Indices:
        which, places = self.place(numbers, seed)
        rows = [
            self.corpora[i].train(np.array([place]), key_of(seed, MIX_KEY, i))
            for i, place in zip(which.tolist(), places.tolist())
        ]
        return np.concatenate(rows)

    def place(self, numbers: Indices, seed: int) -> tuple[Indices, Indices]:
        """Which corpus each sample of the stream comes from, and how many came from there before; 2 x (B,)."""
        rounds, within = np.divmod(np.asarray(numbers, dtype=np.int64), PERIOD)
        slots = np.empty_like(within)
        for each in np.unique(rounds):
            slots[rounds == each] = permute(within[rounds == each], PERIOD, key_of(seed, MIX_KEY, int(each)))
        starts = np.concatenate([[0], self.ends[:-1]])
        which = np.searchsorted(self.ends, slots, side="right")
        return which, rounds * (self.ends - starts)[which] + slots - starts[which]

    def held_out(self, numbers: Indices) -> Indices:
        ends = np.cumsum([corpus.eval_samples for corpus in self.corpora])
        drawn = permute(numbers, self.eval_samples, HELD_OUT_KEY)
        which = np.searchsorted(ends, drawn, side="right")
        firsts = np.concatenate([[0], ends[:-1]])
        rows = [self.corpora[i].held_out(np.array([number - firsts[i]])) for i, number in zip(which.tolist(), drawn.tolist())]
        return np.concatenate(rows)


def shares(parts: Sequence[float]) -> Indices:
    """Where the slots of each corpus end among PERIOD ones: at least one each, the nearest whole numbers of the parts."""
    counts = np.maximum(1, np.round(np.array(parts) / sum(parts) * PERIOD)).astype(np.int64)
    counts[counts.argmax()] += PERIOD - counts.sum()
    return np.cumsum(counts)
