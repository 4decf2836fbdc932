"""Samples of a corpus, or of a mixture of corpora, and the examples made of them (see ExampleSource for numbers and seeds)."""

from collections.abc import Sequence

import numpy as np

from mpilm.data.batch import Batch
from mpilm.data.corpus import Corpus
from mpilm.data.objective import CausalObjective, Objective
from mpilm.data.order import VALIDATION_KEY, Indices, mix_key, permute_rounds, pick_samples
from mpilm.errors import ConfigError, DataError
from mpilm.kernels.base import IGNORE_INDEX

MIXTURE_KEY, OBJECTIVE_KEY = 0x6D6978, 0x6D61736B
MIXTURE_PERIOD = 2**16  # samples in which each corpus has its part to the nearest whole number, and at least one


class CorpusSamples:
    """A corpus cut into samples of T + 1 tokens that overlap by one: sample i covers tokens [i T, i T + T + 1). No training
    sample reaches into the validation split, the last `eval_fraction`. Raises ConfigError or DataError if a split is empty."""

    def __init__(self, corpus: Corpus, context_length: int, eval_fraction: float):
        self.corpus, self.context_length = corpus, context_length
        held_out = int(len(corpus.tokens) * eval_fraction)
        self.boundary = train = len(corpus.tokens) - held_out  # the first token of the validation split
        self.train_samples = max(0, train - 1) // context_length
        self.eval_samples = max(0, held_out - 1) // context_length
        if self.train_samples and (self.eval_samples or not eval_fraction):
            return
        shortest = min(train, held_out) if eval_fraction else train
        split = f"{train} tokens to train on and {held_out} held out"
        if shortest < 2:
            advice = "give more text, or another --data.eval-fraction (0: hold out nothing)"
            raise DataError(f"--data.path {corpus.source}: {split} are too few for one sample; {advice}")
        problem = f"of {corpus.source}, {split} hold no whole sample of that length"
        advice = f"the largest value that works is {shortest - 1}, or give more text"
        raise ConfigError(f"--model.context-length {context_length}: {problem}; {advice}")

    def locate(self, numbers: Indices, seed: int | None) -> list[tuple[Corpus, int]]:
        """Return the corpus and the first token of each sample."""
        origin, count = (self.boundary, self.eval_samples) if seed is None else (0, self.train_samples)
        starts = origin + self.context_length * pick_samples(numbers, seed, count)
        return [(self.corpus, start) for start in starts.tolist()]


class CorpusMixture:
    """Several corpora, of which each has its part of the samples, whatever its size; the validation split is that of each. A
    keyed permutation of every MIXTURE_PERIOD samples, not a stored count, gives the corpus of a sample and its number there."""

    def __init__(self, corpora: Sequence[CorpusSamples], parts: Sequence[float]):
        self.corpora, self.context_length = corpora, corpora[0].context_length
        slots = np.maximum(1, np.round(np.array(parts) / sum(parts) * MIXTURE_PERIOD)).astype(np.int64)
        slots[slots.argmax()] += MIXTURE_PERIOD - slots.sum()
        self.slot_ends = np.cumsum(slots)
        self.eval_ends = np.cumsum([corpus.eval_samples for corpus in corpora])
        self.eval_samples = int(self.eval_ends[-1])

    def locate(self, numbers: Indices, seed: int | None) -> list[tuple[Corpus, int]]:
        """Return the corpus and the first token of each sample."""
        which, places = self.choose(numbers, seed)
        seeds = [None if seed is None else mix_key(seed, MIXTURE_KEY, i) for i in range(len(self.corpora))]
        pairs = zip(which.tolist(), places.tolist())
        return [self.corpora[i].locate(np.array([place]), seeds[i])[0] for i, place in pairs]

    def choose(self, numbers: Indices, seed: int | None) -> tuple[Indices, Indices]:
        """Return for each sample the corpus it comes from, and how many samples of that corpus came before; 2 x (B,)."""
        if seed is None:
            rounds, slots, ends = np.zeros_like(numbers), pick_samples(numbers, None, self.eval_samples), self.eval_ends
        else:
            (rounds, slots), ends = permute_rounds(numbers, MIXTURE_PERIOD, seed, MIXTURE_KEY), self.slot_ends
        sizes = np.diff(ends, prepend=0)
        which = np.searchsorted(ends, slots, side="right")
        return which, rounds * sizes[which] + slots - (ends - sizes)[which]


def read_samples(samples: CorpusSamples | CorpusMixture, numbers: Indices, seed: int | None) -> Indices:
    """Return the tokens of samples, (B, T + 1)."""
    length = samples.context_length + 1
    return np.stack([corpus.read(at, at + length) for corpus, at in samples.locate(numbers, seed)])


class TextExamples:
    """Examples of running text. With a packing of "concat" a sample is one text, whatever documents it has parts of. With
    "documents" (ended by `eos`) attention stays inside each, positions begin anew, and none predicts a token of the next."""

    def __init__(
        self, samples: CorpusSamples | CorpusMixture, objective: Objective | None = None, packing: str = "concat", eos: int = -1
    ):
        self.samples, self.objective, self.packing, self.eos = samples, objective or CausalObjective(), packing, eos
        self.context_length, self.eval_samples = samples.context_length, samples.eval_samples

    def make_batch(self, numbers: Indices, seed: int | None) -> Batch:
        rows, key = read_samples(self.samples, numbers, seed), VALIDATION_KEY if seed is None else seed
        inputs, targets = self.objective(rows, [mix_key(key, number, OBJECTIVE_KEY) for number in numbers.tolist()])
        if self.packing == "concat":
            return Batch.from_arrays(tokens=inputs, targets=targets, positions=np.arange(self.context_length), samples=numbers)
        documents, positions = find_documents(rows, self.eos)
        if self.objective.is_causal:
            targets = np.where(documents[:, 1:] == documents[:, :-1], targets, IGNORE_INDEX)
        places = {"positions": positions[:, :-1], "documents": documents[:, :-1]}
        return Batch.from_arrays(tokens=inputs, targets=targets, samples=numbers, **places)

    def count_targets(self, numbers: Indices, seed: int | None) -> int:
        """Return how many targets these examples have, without making them if the number is fixed."""
        if not self.objective.whole_words and (self.packing == "concat" or not self.objective.is_causal):
            return len(numbers) * self.objective.target_count(self.context_length)
        return self.make_batch(numbers, seed).target_tokens


def find_documents(rows: Indices, eos: int) -> tuple[Indices, Indices]:
    """Return the document of each token, counted from the first in its row, and its position there; 2 x (B, T)."""
    begins = np.zeros(rows.shape, dtype=bool)
    begins[:, 1:] = rows[:, :-1] == eos
    places = np.arange(rows.shape[1])
    return np.cumsum(begins, axis=1), places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
