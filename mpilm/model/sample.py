"""Sampling of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.config import Generate
from mpilm.errors import NonFiniteError


def sample_token(logits: Tensor, settings: Generate, generator: torch.Generator) -> int:  # (V,)
    """Draw a token from the logits after temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751). Raises
    NonFiniteError if the logits are not finite."""
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the model's logits are not finite; its weights probably are not either")
    if settings.temperature == 0.0:
        return int(logits.argmax())
    sorted_logits, tokens = (logits / settings.temperature).sort(descending=True, stable=True)
    probs = sorted_logits.softmax(dim=0)
    if settings.top_k:
        probs[settings.top_k :] = 0.0
    mass_before = probs.cumsum(dim=0) - probs
    probs[mass_before >= settings.top_p] = 0.0
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])
