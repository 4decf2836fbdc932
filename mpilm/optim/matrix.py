"""Optimizers that need a full parameter at once: Adafactor and Muon.

They compute what torch.optim.Adafactor and torch.optim.Muon compute, to the last bit, on parameters that ZeRO leaves unsharded:
the one rank that owns a parameter updates it, so nothing is computed twice and nothing more is sent.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from mpilm.config.schema import TrainConfig
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ParamSlice, intersect_intervals
from mpilm.parallel.layout import Shape

BETA2_DECAY = -0.8
EPS_1, EPS_2 = torch.finfo(torch.float32).eps, 1e-3  # smallest deviation of a gradient, smallest size of a parameter
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a x + b x^3 + c x^5
ITERATIONS = 5
EPS_NORM = 1e-7


class UnshardedOptimizer(ABC):
    """Updates the unsharded parameters one after the other. Gradients are flat vectors by stage."""

    STATE_NAMES: tuple[str, ...]

    @classmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        """Return the shapes of the moments, by name, of a parameter of this shape."""
        return dict.fromkeys(cls.STATE_NAMES, shape)

    def __init__(self, flats: Mapping[int, FlatParameters], train: TrainConfig):
        self.flats, self.train, self.count = flats, train, 0
        self.stages = {name: stage for stage, flat in flats.items() for name in _owned_unsharded(flat)}
        self.moments: dict[str, dict[str, Tensor]] = {}
        for name, stage in self.stages.items():
            shapes = self.state_shapes(flats[stage].layout.spans[name][1].local_shape)
            self.moments[name] = {state: torch.zeros(shape, device=flats[stage].device) for state, shape in shapes.items()}

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        self.count += 1
        for name, stage in self.stages.items():
            flat = self.flats[stage]
            weight_decay = self.train.weight_decay * flat.layout.spans[name][1].decays
            value, gradient = flat.parameter(name, flat.values), flat.parameter(name, gradients[stage])
            with torch.no_grad():
                self.update(value, gradient, self.moments[name], lr, weight_decay)

    @abstractmethod
    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        """Change a parameter and its moments in place."""

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        return {
            state: {ParamSlice(name, 0, x[state].numel()): x[state].view(-1) for name, x in self.moments.items() if state in x}
            for state in self.STATE_NAMES
        }


class Adafactor(UnshardedOptimizer):
    """Adafactor: second moments of a matrix as the product of those of its rows and columns, steps relative to the size of the
    parameter (Shazeer and Stern, arXiv 1804.04235, with torch's settings)."""

    STATE_NAMES = ("row_var", "col_var", "variance")

    @classmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        size = max(EPS_2, float(value.norm(2)) / math.sqrt(value.numel()))
        value.mul_(1 - lr * weight_decay)
        variance = self._update_variance(gradient, moments, self.count**BETA2_DECAY)
        direction = variance.clamp_(min=EPS_1 * EPS_1).rsqrt_().mul_(gradient)
        excess = max(1.0, float(direction.norm(2)) / math.sqrt(direction.numel()))
        value.add_(direction, alpha=-size * min(lr, 1 / math.sqrt(self.count)) / excess)

    def _update_variance(self, gradient: Tensor, moments: Mapping[str, Tensor], weight: float) -> Tensor:
        """Update the running mean of the squared gradient, to which this one contributes `weight`, and return it."""
        if gradient.dim() < 2:
            return moments["variance"].lerp_(gradient * gradient, weight).clone()
        row, column = moments["row_var"], moments["col_var"]
        row.lerp_(torch.norm(gradient, dim=-1, keepdim=True).square_().div_(gradient.size(-1)), weight)
        column.lerp_(torch.norm(gradient, dim=-2, keepdim=True).square_().div_(gradient.size(-2)), weight)
        return (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp_(min=EPS_1))


class Muon(UnshardedOptimizer):
    """Muon: momentum with all singular values brought near one (Jordan et al., 2024), scaled to the size of AdamW's updates, so
    that one learning rate serves both (Liu et al., arXiv 2502.16982, section 2.2)."""

    STATE_NAMES = ("momentum_buffer",)

    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        momentum = self.train.momentum
        average = moments["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = orthogonalize(gradient.lerp(average, momentum))  # Nesterov momentum
        value.mul_(1 - lr * weight_decay)
        value.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(value.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return roughly the nearest matrix with orthogonal rows or columns, by a Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=EPS_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _owned_unsharded(flat: FlatParameters) -> list[str]:
    """Return the unsharded parameters that this rank updates."""
    spans = {name: flat.layout.padded_span(name) for name, (_, layout) in flat.layout.spans.items() if layout.unsharded}
    return [name for name, span in spans.items() if intersect_intervals(flat.owned, [span]) == [span]]
