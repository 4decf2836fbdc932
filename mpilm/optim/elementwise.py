"""Optimizers that treat each element separately, through torch's fused kernels: AdamW and SGD.

The kernels are called directly: constructing torch.optim.AdamW imports the compiler, which costs each rank a second at the
start and 70 MiB (measured with torch 2.13). They run on whole spans of the flat vector, padding included: their last bits
depend on where a span begins and ends, and spans end at multiples of the layout's alignment however the vector is sharded.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpilm.config.schema import TrainConfig
from mpilm.ops.tree import Interval
from mpilm.optim.base import ParameterOptimizer
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ParamSlice, intersect_intervals, merge_intervals
from mpilm.parallel.layout import Shape

EPS = 1e-8


class ElementwiseOptimizer(ParameterOptimizer):
    """Updates the parameters that ZeRO may divide anywhere, with moments of their own shape, named in `STATE_NAMES`."""

    STATE_NAMES: Sequence[str]

    @classmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        return dict.fromkeys(cls.STATE_NAMES, shape)

    def __init__(self, flats: Mapping[int, FlatParameters], train: TrainConfig):
        self.flats, self.train = flats, train
        device = next(iter(flats.values())).device
        self.spans = {
            decays: [(stage, span) for stage, flat in flats.items() for span in _spans(flat, decays)]
            for decays in (True, False)
        }
        self.moments = {
            name: {stage: FlatVector.zeros(_owned(flat), device) for stage, flat in flats.items()} for name in self.STATE_NAMES
        }
        self.count = torch.zeros((), device=device)

    def set_step(self, step: int) -> None:
        self.count.fill_(step)

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        self.count += 1
        values = {stage: flat.values for stage, flat in self.flats.items()}
        for decays, spans in self.spans.items():
            if not spans:
                continue  # a small model on many ranks: some ranks have nothing to update
            moments = [_views(self.moments[name], spans) for name in self.STATE_NAMES]
            self.update(_views(values, spans), _views(gradients, spans), moments, lr, self.train.weight_decay * decays)

    @abstractmethod
    def update(
        self, values: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], lr: float, weight_decay: float
    ) -> None:
        """Change `values` and `moments` (a list for each name) in place."""

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        slices: dict[str, dict[ParamSlice, Tensor]] = {name: {} for name in self.STATE_NAMES}
        for name, vectors in self.moments.items():
            for stage, flat in self.flats.items():
                for item, at in flat.layout.param_slices(vectors[stage].intervals).items():
                    slices[name][item] = vectors[stage].view(at, at + item.numel)
        return slices


class AdamW(ElementwiseOptimizer):
    """AdamW with decoupled weight decay on matrices only (Loshchilov and Hutter, arXiv 1711.05101)."""

    STATE_NAMES = ("exp_avg", "exp_avg_sq")

    def update(
        self, values: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], lr: float, weight_decay: float
    ) -> None:
        exp_avgs, exp_avg_sqs = moments
        torch._fused_adamw_(
            values,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            [self.count] * len(values),
            lr=lr,
            beta1=self.train.beta1,
            beta2=self.train.beta2,
            weight_decay=weight_decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )


class SGD(ElementwiseOptimizer):
    """Gradient descent with momentum; weight decay, on matrices only, is part of the gradient, as in torch."""

    STATE_NAMES = ("momentum_buffer",)

    def update(
        self, values: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], lr: float, weight_decay: float
    ) -> None:
        buffers = moments[0] if self.train.momentum else []  # as the kernel expects it
        torch._fused_sgd_(
            values,
            gradients,
            buffers,
            weight_decay=weight_decay,
            momentum=self.train.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def _views(vectors: Mapping[int, FlatVector], spans: list[tuple[int, Interval]]) -> list[Tensor]:
    return [vectors[stage].view(*span) for stage, span in spans]


def _owned(flat: FlatParameters) -> list[Interval]:
    """Return the intervals that this rank updates of parameters that may be divided."""
    divisible = merge_intervals(
        flat.layout.padded_span(name) for name, (_, layout) in flat.layout.spans.items() if not layout.unsharded
    )
    return intersect_intervals(divisible, flat.owned)


def _spans(flat: FlatParameters, decays: bool) -> list[Interval]:
    """Return the part of these intervals in which weight decay applies, or does not."""
    spans = merge_intervals(
        flat.layout.padded_span(name) for name, (_, layout) in flat.layout.spans.items() if layout.decays == decays
    )
    return intersect_intervals(spans, _owned(flat))
