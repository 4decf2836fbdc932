"""Blocks and loss through torch.compile, applied from outside.

Blocks are compiled one by one, not the model as a whole: fusion must not depend on where the model is cut into stages. All
blocks are one function of their parameters, so one compilation serves all of them.
"""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.errors import ConfigError
from mpilm.kernels.base import cross_entropy_sum
from mpilm.model.sequence_info import SequenceInfo


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of `model`, or the tensor parts in it, when it first runs, once for each input shape."""
    for block in model.get_submodule("blocks").children():
        regions: list[Any] = [module for module in block.modules() if hasattr(module, "parts")]
        for module in [part for region in regions for part in region.parts.values()] or [block]:
            module.forward = _compile_forward(module.forward)  # inside the module's hooks, as in activation_checkpoint.py


def _compile_forward(forward: Callable[[Tensor, SequenceInfo], Tensor]) -> Callable[[Tensor, SequenceInfo], Tensor]:
    """Return the compiled forward. Decoding with a KV cache is not compiled: its length changes at every token."""
    compiled = torch.compile(forward, dynamic=False)
    return lambda x, rows: (compiled if rows.cache is None else forward)(x, rows)


def compiled_loss_sum() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the compiled sum of token losses, which makes no float32 copy of the logits."""
    compiled = torch.compile(cross_entropy_sum, dynamic=False)
    return lambda logits, targets: compiled(logits.flatten(0, 1), targets.flatten())


def require_compiler() -> None:
    """Raise ConfigError if no C++ compiler is installed."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if not shutil.which(name):
        advice = "install one, name it in CXX, or write --train.compile false"
        raise ConfigError(f"--train.compile true: torch needs a C++ compiler, and {name} is not found; {advice}")
