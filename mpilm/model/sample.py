"""The choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.config import Generate
from mpilm.errors import NonFiniteError


def choose(logits: Tensor, settings: Generate, generator: torch.Generator) -> int:  # (V,)
    """One token drawn from the logits after temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751). Raises
    NonFiniteError where there is nothing to choose by."""
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the model's outputs are not finite, and nor, it seems, are its weights")
    if settings.temperature == 0.0:
        return int(logits.argmax())
    ordered, ids = (logits / settings.temperature).sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=0)
    if settings.top_k:
        probabilities[settings.top_k :] = 0.0
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities[before >= settings.top_p] = 0.0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
