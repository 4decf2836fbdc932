"""Training objectives: from rows of tokens to the model's inputs and targets."""

from dataclasses import dataclass

import numpy as np

from mpilm.config.schema import DataConfig, ModelConfig
from mpilm.data.order import Indices
from mpilm.data.tokenizer import Tokenizer
from mpilm.kernels.base import IGNORE_INDEX

MASKED, RANDOM = 0.8, 0.9  # a draw below the first hides a chosen token behind the mask, one below the second replaces it


class CausalObjective:
    """Predict the next token, everywhere."""

    is_causal = True  # whether a target is the token after its place
    whole_words = False  # whether the number of targets varies between samples of one length

    def __call__(self, rows: Indices, keys: list[int]) -> tuple[Indices, Indices]:
        """Return inputs and targets, 2 x (B, T), of (B, T + 1) tokens with a random key for each row."""
        return rows[:, :-1], rows[:, 1:]

    def target_count(self, length: int) -> int:
        """Return the targets of a sample of `length` tokens; at most so many if their number varies."""
        return length


@dataclass(frozen=True)
class MaskedObjective:
    """Predict some tokens, chosen by key: most masked, some replaced or kept (Devlin et al., arXiv 1810.04805, section 3.1)."""

    tokenizer: Tokenizer
    fraction: float
    whole_words: bool = False  # choose as many words as fit into the part (the authors' later release), not single tokens

    is_causal = False

    def __call__(self, rows: Indices, keys: list[int]) -> tuple[Indices, Indices]:
        inputs, targets = rows[:, :-1].copy(), np.full_like(rows[:, :-1], IGNORE_INDEX)
        vocab_size, mask = self.tokenizer.vocab_size, self.tokenizer.mask
        assert mask is not None
        for tokens, right, key in zip(inputs, targets, keys):
            generator = np.random.Generator(np.random.Philox(key=key))
            chosen = self._choose_words(tokens, generator) if self.whole_words else generator.permutation(len(tokens))
            chosen = chosen[: self.target_count(len(tokens))]
            right[chosen] = tokens[chosen]
            drawn, others = generator.random(len(chosen)), generator.integers(0, vocab_size, len(chosen))
            tokens[chosen] = np.where(drawn < MASKED, mask, np.where(drawn < RANDOM, others, tokens[chosen]))
        return inputs, targets

    def target_count(self, length: int) -> int:
        return max(1, round(self.fraction * length))

    def _choose_words(self, tokens: Indices, generator: np.random.Generator) -> Indices:
        """Return the places of words, taken in random order if they still fit; the first is taken even if it is too long."""
        words = np.split(np.arange(len(tokens)), np.flatnonzero(self.tokenizer.word_starts(tokens))[1:])
        left, chosen = self.target_count(len(tokens)), list[Indices]()
        for number in generator.permutation(len(words)):
            if not chosen or len(words[number]) <= left:
                chosen.append(words[number])
                left -= len(words[number])
        return np.concatenate(chosen)


Objective = CausalObjective | MaskedObjective


def make_objective(model: ModelConfig, data: DataConfig, tokenizer: Tokenizer) -> Objective:
    """Return the objective of a model of this architecture."""
    if model.arch == "bert":
        return MaskedObjective(tokenizer.with_mask(), data.mask_fraction, data.whole_words)
    return CausalObjective()
