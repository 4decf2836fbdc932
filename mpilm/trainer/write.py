"""Texts that a model writes, a token at a time, several under way at once where the model lies on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpilm.config import Generate
from mpilm.data.batch import Batch
from mpilm.model.cache import Cache
from mpilm.model.sample import choose
from mpilm.trainer.staged import StagedModel

Done = Callable[[int], None]


@dataclass
class Text:
    """What there is of a text, and how its next token is drawn."""

    tokens: list[int]
    begun_with: int
    window: int
    room: int  # tokens that the whole text can have
    generator: torch.Generator
    cache: Cache = field(init=False)
    read: int = 0  # tokens whose keys and values are in the cache

    def batch(self, device: torch.device) -> Batch:
        """What the model reads next: the last token, or, where there is no room in the cache, all that it can look at."""
        if not 0 < self.read < self.window:
            self.cache, self.read = Cache(min(self.window, self.room)), max(0, len(self.tokens) - self.window)
            positions = torch.arange(len(self.tokens) - self.read)
        else:
            positions = torch.tensor([self.read])
        tokens = torch.tensor(self.tokens[self.read :])
        self.read = min(len(self.tokens), self.window)
        return Batch(tokens[None], tokens[None], positions, tokens[:1], len(tokens)).to(device)


def write(
    model: StagedModel, prompts: Mapping[int, list[int]], settings: Generate, stop: int, done: Done = lambda number: None
) -> dict[int, list[int]]:
    """The tokens that follow each prompt (not empty; by number), max-tokens at most, before `stop`. The last context-length
    tokens are looked at. A text depends on its prompt, its number and the settings alone.

    Collective over the pipeline axis, on whose ranks the prompts are the same; where parameters are gathered (ZeRO-3), over the
    whole mesh.
    """
    several = 2 * len(model.cut) if len(model.cut) > 1 else 1  # so that no stage waits long for the others
    numbers, written = list(prompts), dict[int, list[int]]()
    for first in range(0, len(numbers), several):
        texts = {number: _begin(prompts[number], number, settings, model) for number in numbers[first : first + several]}
        _finish(model, texts, settings, stop, done)
        written |= {number: text.tokens[text.begun_with :] for number, text in texts.items()}
    return written


def _begin(prompt: list[int], number: int, settings: Generate, model: StagedModel) -> Text:
    generator = torch.Generator().manual_seed((settings.seed + number) % 2**63)
    room = len(prompt) + settings.max_tokens
    return Text(list(prompt), len(prompt), model.config.model.context_length, room, generator)


@torch.no_grad()
def _finish(model: StagedModel, texts: Mapping[int, Text], settings: Generate, stop: int, done: Done) -> None:
    """Write until each text has ended."""
    going = dict(texts) if settings.max_tokens else {}
    while going:
        batches = {number: text.batch(model.device) for number, text in going.items()}
        logits = model.next_logits(batches, {number: text.cache for number, text in going.items()})
        for number, token in zip(list(going), _agree(model, going, logits, settings)):
            text = going[number]
            if token != stop:
                text.tokens.append(token)
            if token == stop or len(text.tokens) - text.begun_with == settings.max_tokens:
                del going[number]
                done(number)


def _agree(model: StagedModel, going: Mapping[int, Text], logits: Mapping[int, Tensor], settings: Generate) -> list[int]:
    """The next token of each text, drawn where the logits are, known to all ranks of the pipeline."""
    chosen = torch.zeros(len(going), dtype=torch.int64)
    for place, (number, text) in enumerate(going.items()):
        if number in logits:
            chosen[place] = choose(logits[number].cpu(), settings, text.generator)
    model.pipeline.broadcast(chosen, (len(model.cut) - 1) % model.pipeline.size)
    return chosen.tolist()
