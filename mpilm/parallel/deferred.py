"""Backward in two halves: gradients of inputs at once, gradients of weight matrices later (zero bubble; Qi et al.,
arXiv 2401.10241, section 2).

Applied from outside: each Linear and Conv1D of a model is made to leave what its weight gradient needs in a store. The products
are those that autograd would have computed, with the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.model.layers import Conv1D

Owed = tuple[str, bool, Tensor, Tensor]  # parameter, whether it is (in, out), input (N, in), gradient of the output (N, out)


class Store:
    """What is owed to each microbatch: products to be made, and small gradients that came with the first half."""

    def __init__(self) -> None:
        self.current = -1
        self._owed: dict[int, list[Owed]] = defaultdict(list)
        self._kept: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)

    def add(self, name: str, transposed: bool, x: Tensor, gradient: Tensor) -> None:
        self._owed[self.current].append((name, transposed, x, gradient))

    def keep(self, name: str, gradient: Tensor) -> None:
        self._kept[self.current].append((name, gradient))

    def gradients(self, microbatch: int) -> Iterator[tuple[str, Tensor]]:
        """The weight gradients of a microbatch, one after the other, in float32; what they needed is let go."""
        yield from self._kept.pop(microbatch, [])
        owed = self._owed.pop(microbatch, [])[::-1]
        while owed:
            name, transposed, x, gradient = owed.pop()
            product = (gradient.t() @ x).float()
            yield name, product.t() if transposed else product


def defer(model: nn.Module, store: Store) -> None:
    """Let every Linear and Conv1D of `model` owe its weight gradient to `store`."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            name = f"{path}.weight" if path else "weight"
            module.forward = partial(_forward, module, name, store)  # type: ignore[method-assign]


def _forward(module: nn.Linear | Conv1D, name: str, store: Store, x: Tensor) -> Tensor:
    transposed = isinstance(module, Conv1D)
    weight: Tensor = module.weight.t() if transposed else module.weight
    bias: Tensor | None = module.bias
    if not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):  # there are no two halves to be had
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return DeferredLinear.apply(x, weight.detach(), bias, name, transposed, store)


class DeferredLinear(torch.autograd.Function):
    """x W^T + b, of whose backward the gradient of W is not computed at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, transposed: bool, store: Store) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.transposed, ctx.store, ctx.biased = name, transposed, store, bias is not None
        return F.linear(x, weight, bias)  # (B, T, in) -> (B, T, out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        ctx.store.add(ctx.name, ctx.transposed, x.detach().flatten(0, -2), flat)
        return (flat @ weight).view(x.shape), None, flat.sum(0) if ctx.biased else None, None, None, None
