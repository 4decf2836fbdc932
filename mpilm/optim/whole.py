"""Optimizers that want all of a parameter at once: Adafactor and Muon.

They compute what torch.optim.Adafactor and torch.optim.Muon compute, to the last bit, on parameters that ZeRO leaves uncut:
each is updated by the one rank that has it, so that nothing is computed twice and nothing more is sent.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from mpilm.config import Train
from mpilm.optim.rule import Rule, Shape
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Piece, intersect

BETA2_DECAY = -0.8
EPS_1, EPS_2 = torch.finfo(torch.float32).eps, 1e-3  # smallest deviation of a gradient, smallest size of a parameter
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a x + b x^3 + c x^5
ITERATIONS = 5
EPS_NORM = 1e-7


class WholeRule(Rule):
    """Updates the parameters that are to stay whole, one after the other."""

    KINDS: tuple[str, ...]

    def __init__(self, flats: Mapping[int, FlatParameters], train: Train):
        self.flats, self.train, self.count = flats, train, 0
        self.places = {name: stage for stage, flat in flats.items() for name in _whole_here(flat)}
        self.moments = {name: self._zeros(name) for name in self.places}

    def _zeros(self, name: str) -> dict[str, Tensor]:
        flat = self.flats[self.places[name]]
        shapes = self.moments_of(flat.layout.slots[name][1].shape)
        return {kind: torch.zeros(shape, device=flat.device) for kind, shape in shapes.items()}

    def set_step(self, step: int) -> None:
        self.count = step

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        self.count += 1
        for name, stage in self.places.items():
            flat = self.flats[stage]
            decay = self.train.weight_decay * flat.layout.slots[name][1].decays
            with torch.no_grad():
                self.update(
                    flat.parameter(name, flat.values), flat.parameter(name, gradients[stage]), self.moments[name], lr, decay
                )

    @abstractmethod
    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, decay: float) -> None:
        """Change a parameter and its moments in their place."""

    def pieces(self) -> dict[str, dict[Piece, Tensor]]:
        found: dict[str, dict[Piece, Tensor]] = {kind: {} for kind in self.KINDS}
        for name, moments in self.moments.items():
            for kind, moment in moments.items():
                found[kind][Piece(name, 0, moment.numel())] = moment.view(-1)
        return found


class Adafactor(WholeRule):
    """Second moments of a matrix as the product of those of its rows and of its columns; steps relative to the size of the
    parameter (Shazeer and Stern, arXiv 1804.04235, with the settings of torch)."""

    KINDS = ("row_var", "col_var", "variance")

    @classmethod
    def moments_of(cls, shape: Shape) -> Mapping[str, Shape]:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, decay: float) -> None:
        size = max(EPS_2, float(value.norm(2)) / math.sqrt(value.numel()))
        value.mul_(1 - lr * decay)
        direction = self._variance(gradient, moments, self.count**BETA2_DECAY).clamp_(min=EPS_1 * EPS_1).rsqrt_().mul_(gradient)
        excess = max(1.0, float(direction.norm(2)) / math.sqrt(direction.numel()))
        value.add_(direction, alpha=-size * min(lr, 1 / math.sqrt(self.count)) / excess)

    def _variance(self, gradient: Tensor, moments: Mapping[str, Tensor], weight: float) -> Tensor:
        """The running mean of the squared gradient, of which this one is so large a part."""
        if gradient.dim() < 2:
            return moments["variance"].lerp_(gradient * gradient, weight).clone()
        row, column = moments["row_var"], moments["col_var"]
        row.lerp_(torch.norm(gradient, dim=-1, keepdim=True).square_().div_(gradient.size(-1)), weight)
        column.lerp_(torch.norm(gradient, dim=-2, keepdim=True).square_().div_(gradient.size(-2)), weight)
        return (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp_(min=EPS_1))


class Muon(WholeRule):
    """Momentum with all singular values brought near one (Jordan et al., 2024), at the size of AdamW's updates, so that one
    learning rate serves both (Liu et al., arXiv 2502.16982, section 2.2)."""

    KINDS = ("momentum_buffer",)

    @classmethod
    def moments_of(cls, shape: Shape) -> Mapping[str, Shape]:
        return {"momentum_buffer": shape}

    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, decay: float) -> None:
        momentum = self.train.momentum
        average = moments["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = orthogonal(gradient.lerp(average, momentum))  # Nesterov's
        value.mul_(1 - lr * decay)
        value.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(value.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows or columns, roughly: by a Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=EPS_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _whole_here(flat: FlatParameters) -> list[str]:
    """The parameters that this rank updates and that are whole."""
    slots = {name: flat.layout.slot(name) for name, (_, layout) in flat.layout.slots.items() if layout.whole}
    return [name for name, slot in slots.items() if intersect(flat.updated, [slot]) == [slot]]
