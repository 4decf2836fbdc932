"""Compute once more in backward what forward does not keep (Chen et al., arXiv 1604.06174; Korthikanti et al., 2205.05198).

Applied from outside: a block's forward, or its attention core, is put in a wrapper. Dropout masks have keys, so that the second
computation is the first one, bit for bit.

torch.utils.checkpoint does the same for programs that draw random numbers as they go. It imports the compiler, which takes
80 MiB and 3 s on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.parallel.given import backward_from


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


def _again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*inputs)
    return Again.apply(function, torch.empty(0, requires_grad=True), *inputs)


class Again(torch.autograd.Function):
    """function(*inputs), of which nothing is kept but the inputs.

    `anchor` requires a gradient, so that there is a backward, for the parameters, also where no input does.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], anchor: Tensor, *inputs: Any) -> Tensor:
        ctx.function = function
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        kind = inputs[ctx.tensors[0]].device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs, gradients = list(ctx.others), [None] * len(ctx.others)
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            for i, x in zip(ctx.tensors, ctx.saved_tensors):
                needed = ctx.needs_input_grad[2 + i]
                inputs[i] = Caught.apply(x.detach().requires_grad_(), gradients, i) if needed else x.detach()
            y = ctx.function(*inputs)
        if y.requires_grad:
            backward_from(y, gradient)
        return None, None, *gradients


class Caught(torch.autograd.Function):
    """x, whose gradient is put at place `i` of `gradients`, just as it comes.

    A leaf would do something to it: its .grad has the leaf's strides, and autocast makes one copy of a leaf for all matrices
    that it is multiplied with, not one for each; sums then come in another order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: list[Tensor | None], i: int) -> Tensor:
        ctx.gradients, ctx.i = gradients, i
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients[ctx.i] = gradient
        return None, None, None
