"""Activation checkpointing: recomputation in backward (Chen et al., arXiv 1604.06174; Korthikanti et al., arXiv 2205.05198).

Applied from outside: it wraps a block's forward, or its attention core. Dropout masks have keys, so the recomputation equals
the first computation bit for bit. torch.utils.checkpoint does the same for programs that draw random numbers as they go, but it
imports the compiler, which takes 80 MiB and 3 s on every rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.parallel.split_backward import backward_with


def checkpoint_activations(model: nn.Module, part: str, is_compiled: bool = False) -> None:
    """Recompute a part ("none", "attention", "block") of each block of `model` in its backward.

    is_compiled: forwards are compiled. The code that torch compiles without gradients rounds 16-bit values elsewhere, so the
    first computation then builds a graph like the second, and drops it.
    """
    for block in model.get_submodule("blocks").children() if part != "none" else ():
        cores = [module.core for module in block.modules() if hasattr(module, "core")]  # of all tensor parts
        wrapped: Any
        for wrapped in cores if part == "attention" else [block]:
            # Inside its hooks, which gather parameters only once.
            wrapped.forward = partial(_checkpoint, wrapped.forward, is_compiled)


def _checkpoint(function: Callable[..., Tensor], is_compiled: bool, *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*inputs)
    return CheckpointFunction.apply(function, is_compiled, torch.empty(0, requires_grad=True), *inputs)


class CheckpointFunction(torch.autograd.Function):
    """function(*inputs), of which only the inputs are kept. `anchor` lets backward run even if no input requires a gradient."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], is_compiled: bool, anchor: Tensor, *inputs: Any) -> Tensor:
        ctx.function = function
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        device = inputs[ctx.tensors[0]].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.set_grad_enabled(is_compiled):
            return function(*inputs).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs, gradients = list(ctx.others), [None] * len(ctx.others)
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            for i, x in zip(ctx.tensors, ctx.saved_tensors):
                needed = ctx.needs_input_grad[3 + i]
                inputs[i] = GradCapture.apply(x.detach().requires_grad_(), gradients, i) if needed else x.detach()
            y = ctx.function(*inputs)
        if y.requires_grad:
            backward_with(y, gradient)
        return None, None, None, *gradients


class GradCapture(torch.autograd.Function):
    """Identity on x that stores its gradient at index `i` of `gradients`, unchanged. A leaf would change it: its .grad has the
    leaf's strides, and autocast copies a leaf once for all its products, not for each, so that sums come in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: list[Tensor | None], i: int) -> Tensor:
        ctx.gradients, ctx.i = gradients, i
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients[ctx.i] = gradient
        return None, None, None
