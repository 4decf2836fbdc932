"""Sampling text from a model, a token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpilm.config import Generate


@torch.no_grad()
def sample(
    next_logits: Callable[[Tensor], Tensor], prompt: list[int], settings: Generate, context_length: int, stop: int
) -> list[int]:
    """The tokens that follow `prompt`, max-tokens at most, before `stop`; the last `context_length` tokens are looked at.

    `next_logits`: (T,) tokens to the logits (V,) of what follows them.
    """
    generator = torch.Generator().manual_seed(settings.seed % 2**63)
    tokens = list(prompt)
    for _ in range(settings.max_tokens):
        logits = next_logits(torch.tensor(tokens[-context_length:]))
        chosen = choose(logits.float().cpu(), settings, generator)
        if chosen == stop:
            break
        tokens.append(chosen)
    return tokens[len(prompt) :]


def choose(logits: Tensor, settings: Generate, generator: torch.Generator) -> int:  # (V,)
    """One token drawn from the logits after temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751)."""
    if settings.temperature == 0.0:
        return int(logits.argmax())
    ordered, ids = (logits / settings.temperature).sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=0)
    if settings.top_k:
        probabilities[settings.top_k :] = 0.0
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities[before >= settings.top_p] = 0.0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
