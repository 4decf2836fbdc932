"""Blocks and the loss through torch.compile, applied from outside.

Block by block, not the model as a whole: what is fused must not depend on where the model is cut into stages. All blocks are
one function of their parameters, so that one compilation serves them all.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpilm.data.batch import Batch
from mpilm.errors import ConfigError
from mpilm.model.loss import loss_sum
from mpilm.model.rows import Rows

Result = Callable[[Tensor, Batch], Tensor]


def compile_blocks(model: nn.Module) -> None:
    """Let each block of `model` be compiled when it is first used, for each shape of its input anew."""
    for block in model.get_submodule("blocks").children():
        block.forward = _compiled(block.forward)  # inside the hooks of the module, as in recompute.py


def _compiled(forward: Callable[[Tensor, Rows], Tensor]) -> Callable[[Tensor, Rows], Tensor]:
    """But for rows that go on where they stopped: a text has another length at each token."""
    compiled = torch.compile(forward, dynamic=False)
    return lambda x, rows: (compiled if rows.cache is None else forward)(x, rows)


def compiled_token_losses() -> Result:
    """The sum of the token losses of a microbatch; compiled, no float32 copy of the logits is made."""
    of_logits = torch.compile(loss_sum, dynamic=False)
    return lambda logits, batch: of_logits(logits, batch.targets)


def require_compiler() -> None:
    """Raises ConfigError where there is no C++ compiler."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if not shutil.which(name):
        raise ConfigError(
            f"--train.compile true: torch needs a C++ compiler for it, and {name} is not found; install one, name it in CXX, "
            "or write --train.compile false"
        )
