"""Backward in two halves: gradients of inputs at once, gradients of weight matrices later (zero bubble; Qi et al.,
arXiv 2401.10241, section 2).

Applied from outside: each Linear of a model is made to leave what its weight gradient needs in a store. The products are those
that autograd would have computed, with the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Owed = tuple[str, Tensor, Tensor]  # parameter, input (N, in), gradient of the output (N, out)


class Store:
    """What is owed to each microbatch: products to be made, and small gradients that came with the first half."""

    def __init__(self) -> None:
        self.current = -1
        self._owed: dict[int, list[Owed]] = defaultdict(list)
        self._kept: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self._owed[self.current].append((name, x, gradient))

    def keep(self, name: str, gradient: Tensor) -> None:
        self._kept[self.current].append((name, gradient))

    def gradients(self, microbatch: int) -> Iterator[tuple[str, Tensor]]:
        """The weight gradients of a microbatch, one after the other, in float32; what they needed is let go."""
        yield from self._kept.pop(microbatch, [])
        owed = self._owed.pop(microbatch, [])[::-1]
        while owed:
            name, x, gradient = owed.pop()
            yield name, (gradient.t() @ x).float()


def defer(model: nn.Module, store: Store) -> None:
    """Let every Linear of `model` owe its weight gradient to `store`."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_forward, module, f"{path}.weight", store)  # type: ignore[method-assign]


def _forward(module: nn.Linear, name: str, store: Store, x: Tensor) -> Tensor:
    weight = module.weight.detach()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        return F.linear(x, weight)
    return DeferredLinear.apply(x, weight, name, store)


class DeferredLinear(torch.autograd.Function):
    """x W^T, of whose backward only the gradient of x is computed at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str, store: Store) -> Tensor:  # (B, T, in) -> (B, T, out)
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.store = name, store
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        ctx.store.add(ctx.name, x.detach().flatten(0, -2), flat)
        return (flat @ weight).view(x.shape), None, None, None
