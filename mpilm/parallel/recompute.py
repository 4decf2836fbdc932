"""Compute once more in backward what forward does not keep (Chen et al., arXiv 1604.06174; Korthikanti et al., 2205.05198).

Applied from outside: a block's forward, or its attention core, is put in a wrapper. Dropout masks have keys, so that the second
computation is the first one, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """Keeps the inputs of `inner` only."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return _again(self.inner, *inputs)


def recompute(model: nn.Module, what: str) -> None:
    """Let `what` ("none", "attention", "block") be computed again in the backward of each block of `model`."""
    blocks = model.get_submodule("blocks").children() if what != "none" else ()
    for block in blocks:
        if what == "block":  # inside the hooks of the module: what gathers its parameters is not called again
            block.forward = partial(_again, block.forward)
        else:
            block.attn.core = Recomputed(block.attn.core)  # type: ignore[union-attr]


def _again(function: Any, *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
