"""What a model is asked to predict: from rows of tokens to what it reads and what is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpilm.config import Data, Model
from mpilm.data.tokenizer import Tokenizer
from mpilm.model.loss import IGNORE_INDEX

MASKED, RANDOM = 0.8, 0.9  # of the chosen: below the first the mask, below the second any token, else as it was

Rows = NDArray[np.int64]


class Objective(Protocol):
    """`varies`: whether samples of one length may have different numbers of targets. `looks_ahead`: whether a target is the
    token after its place."""

    @property
    def varies(self) -> bool: ...

    @property
    def looks_ahead(self) -> bool: ...

    def __call__(self, rows: Rows, keys: list[int]) -> tuple[Rows, Rows]:
        """(B, T + 1) tokens and a key a row -> what is read and what is to be predicted, 2 x (B, T)."""
        ...

    def targets(self, length: int) -> int:
        """Targets of a sample of `length` tokens, where they do not vary."""
        ...


@dataclass(frozen=True)
class Causal:
    """The next token, everywhere."""

    varies: bool = False
    looks_ahead: bool = True

    def __call__(self, rows: Rows, keys: list[int]) -> tuple[Rows, Rows]:
        return rows[:, :-1], rows[:, 1:]

    def targets(self, length: int) -> int:
        return length


@dataclass(frozen=True)
class Masked:
    """A part of the tokens, chosen by the row's key: most are hidden behind a mask, some replaced by any other, some left as
    they are (Devlin et al., arXiv 1810.04805, section 3.1).

    `varies`: whole words are chosen, as many as fit into the part (the authors' later release); else single tokens.
    """

    tokenizer: Tokenizer
    fraction: float
    varies: bool = False
    looks_ahead: bool = False

    def __call__(self, rows: Rows, keys: list[int]) -> tuple[Rows, Rows]:
        read, targets = rows[:, :-1].copy(), np.full_like(rows[:, :-1], IGNORE_INDEX)
        for tokens, right, key in zip(read, targets, keys):
            generator = np.random.Generator(np.random.Philox(key=key))
            chosen = self._words(tokens, generator) if self.varies else self._tokens(tokens, generator)
            right[chosen] = tokens[chosen]
            tokens[chosen] = self._hidden(tokens[chosen], generator)
        return read, targets

    def targets(self, length: int) -> int:
        return max(1, round(self.fraction * length))

    def _tokens(self, tokens: Rows, generator: np.random.Generator) -> Rows:
        return generator.permutation(len(tokens))[: self.targets(len(tokens))]

    def _words(self, tokens: Rows, generator: np.random.Generator) -> Rows:
        """The tokens of words in random order, of those that fit; of the first one, as much as fits."""
        words = np.split(np.arange(len(tokens)), np.flatnonzero(self.tokenizer.word_starts(tokens))[1:])
        left, chosen = self.targets(len(tokens)), list[Rows]()
        for number in generator.permutation(len(words)):
            word = words[number] if chosen else words[number][:left]
            if len(word) <= left:
                chosen.append(word)
                left -= len(word)
        return np.concatenate(chosen)

    def _hidden(self, tokens: Rows, generator: np.random.Generator) -> Rows:
        drawn, others = generator.random(len(tokens)), generator.integers(0, self.tokenizer.vocab_size, len(tokens))
        assert self.tokenizer.mask is not None
        return np.where(drawn < MASKED, self.tokenizer.mask, np.where(drawn < RANDOM, others, tokens))


def objective_of(model: Model, data: Data, tokenizer: Tokenizer) -> Objective:
    """What a model of this architecture is asked."""
    return Masked(tokenizer.with_mask(), data.mask_fraction, data.whole_words) if model.arch == "bert" else Causal()
