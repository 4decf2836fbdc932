"""Backward from a given gradient, and in two halves: gradients of inputs first, gradients of weight matrices later, while the
pipeline would idle (zero bubble; Qi et al., arXiv 2401.10241, section 2) or the gradient of an input travels.

Applied from outside: each Linear and Conv1D of a model puts what its weight gradient needs into a queue. The products are those
that autograd would have computed, with the same bits.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.model.layers import Conv1D


def backward_with(y: Tensor, gradient: Tensor) -> None:
    """Do what `y.backward(gradient)` does, without importing sympy: 45 MiB and a second on every rank."""
    with torch.enable_grad():  # also within another backward
        scalar = GradientSeed.apply(y, gradient)
    scalar.backward()


class GradientSeed(torch.autograd.Function):
    """A scalar whose gradient with respect to y is the given one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


class PendingGradients(Protocol):
    """A place for weight gradients that are computed later."""

    def push_pending(self, name: str, compute: Callable[[], Tensor]) -> None: ...


class WeightGradQueue:
    """The gradients of each microbatch that the first half has completed or, for weight matrices, left to be computed."""

    def __init__(self, is_used: bool = True) -> None:
        self.is_used = is_used  # gradients come from here, rather than from backward at once
        self.microbatch = -1
        self._pending: dict[int, deque[tuple[str, Callable[[], Tensor]]]] = defaultdict(deque)

    def push_pending(self, name: str, compute: Callable[[], Tensor]) -> None:
        self._pending[self.microbatch].append((name, compute))

    def push_completed(self, name: str, gradient: Tensor) -> None:
        self._pending[self.microbatch].appendleft((name, lambda: gradient))

    def pop_gradients(self, microbatch: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of a microbatch in float32, one after the other, and free what they needed."""
        pending = self._pending.pop(microbatch, deque())
        while pending:
            name, compute = pending.popleft()
            yield name, compute().float()


def split_backward(model: nn.Module, queue: WeightGradQueue) -> None:
    """Let every Linear and Conv1D of `model` put its weight gradient into `queue`: all that have no other forward already, and
    a weight of their own rather than one that tensor parts share."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "forward" not in vars(module) and module.weight is not None:
            name = f"{path}.weight" if path else "weight"
            module.forward = partial(linear_in_halves, module, name, queue)  # type: ignore[method-assign]


def linear_in_halves(module: nn.Linear | Conv1D, name: str, queue: PendingGradients, x: Tensor) -> Tensor:
    """Return module(x). Backward puts the gradient of the weight, called `name`, into `queue`, if x has a gradient too."""
    transposed = isinstance(module, Conv1D)
    weight: Tensor = module.weight.t() if transposed else module.weight
    bias: Tensor | None = module.bias
    has_aliases = not isinstance(module.weight, nn.Parameter)  # for sequence parts: their gradients are added in tree order
    if has_aliases or not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):  # there is no second half
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return DeferredLinear.apply(x, weight.detach(), bias, name, transposed, queue)


class DeferredLinear(torch.autograd.Function):
    """x W^T + b, whose backward puts the gradient of W into a queue."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, transposed: bool, queue: PendingGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.transposed, ctx.queue, ctx.has_bias = name, transposed, queue, bias is not None
        return F.linear(x, weight, bias)  # (B, T, in) -> (B, T, out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        ctx.queue.push_pending(ctx.name, partial(_weight_gradient, x.detach().flatten(0, -2), flat, ctx.transposed))
        return (flat @ weight).view(x.shape), None, flat.sum(0) if ctx.has_bias else None, None, None, None


def _weight_gradient(x: Tensor, gradient: Tensor, transposed: bool) -> Tensor:  # (N, in), (N, out)
    return x.t() @ gradient if transposed else gradient.t() @ x  # as autograd: of a small matrix, the other has other bits
