"""Optimizers that treat each element by itself, by torch's fused kernels: AdamW and SGD.

The kernels are called directly: constructing torch.optim.AdamW imports the compiler, which costs each rank a second at the
start and 70 MiB (measured with torch 2.13). They are called on whole runs of the flat vector, padding included: their last
bits depend on where a run begins and ends, and runs end at multiples of the layout's alignment however the vector is sharded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpilm.config import Train
from mpilm.optim.rule import Rule, Shape
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Interval, Piece, intersect, join

EPS = 1e-8


class Elementwise(Rule):
    """Updates the parameters that may be cut anywhere, with moments of their own shape, of the kinds in `KINDS`."""

    KINDS: Sequence[str]

    @classmethod
    def moments_of(cls, shape: Shape) -> Mapping[str, Shape]:
        return dict.fromkeys(cls.KINDS, shape)

    def __init__(self, flats: Mapping[int, FlatParameters], train: Train):
        self.flats, self.train = flats, train
        device = next(iter(flats.values())).device
        self.runs = {
            decays: [(stage, run) for stage, flat in flats.items() for run in _runs(flat, decays)] for decays in (True, False)
        }
        self.moments = {
            kind: {stage: FlatVector.zeros(_updated(flat), device) for stage, flat in flats.items()} for kind in self.KINDS
        }
        self.count = torch.zeros((), device=device)

    def set_step(self, step: int) -> None:
        self.count.fill_(step)

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        self.count += 1
        values = {stage: flat.values for stage, flat in self.flats.items()}
        for decays, runs in self.runs.items():
            if not runs:
                continue  # a small model on many ranks: some have nothing to update
            moments = [_views(self.moments[kind], runs) for kind in self.KINDS]
            self.update(_views(values, runs), _views(gradients, runs), moments, lr, self.train.weight_decay * decays)

    @abstractmethod
    def update(
        self, values: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], lr: float, decay: float
    ) -> None:
        """Change `values` and `moments`, a list of each kind, in their place."""

    def pieces(self) -> dict[str, dict[Piece, Tensor]]:
        found: dict[str, dict[Piece, Tensor]] = {kind: {} for kind in self.KINDS}
        for kind, of in self.moments.items():
            for stage, flat in self.flats.items():
                for piece, at in flat.layout.pieces(of[stage].intervals).items():
                    found[kind][piece] = of[stage].view(at, at + piece.numel)
        return found


class AdamW(Elementwise):
    """Decoupled weight decay on matrices only (Loshchilov and Hutter, arXiv 1711.05101)."""

    KINDS = ("exp_avg", "exp_avg_sq")

    def update(
        self, values: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], lr: float, decay: float
    ) -> None:
        averages, squares = moments
        torch._fused_adamw_(
            values, gradients, averages, squares, [], [self.count] * len(values), lr=lr, beta1=self.train.beta1,
            beta2=self.train.beta2, weight_decay=decay, eps=EPS, amsgrad=False, maximize=False,
        )  # fmt: skip


class SGD(Elementwise):
    """Gradient descent with momentum; weight decay, on matrices only, is part of the gradient, as in torch."""

    KINDS = ("momentum_buffer",)

    def update(
        self, values: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], lr: float, decay: float
    ) -> None:
        buffers = moments[0] if self.train.momentum else []  # as the kernel wants it
        torch._fused_sgd_(
            values, gradients, buffers, weight_decay=decay, momentum=self.train.momentum, lr=lr, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip


def _views(vectors: Mapping[int, FlatVector], runs: list[tuple[int, Interval]]) -> list[Tensor]:
    return [vectors[stage].view(*run) for stage, run in runs]


def _updated(flat: FlatParameters) -> list[Interval]:
    """What this rank updates of parameters that may be cut."""
    cut = join(flat.layout.slot(name) for name, (_, layout) in flat.layout.slots.items() if not layout.whole)
    return intersect(cut, flat.updated)


def _runs(flat: FlatParameters, decays: bool) -> list[Interval]:
    """The part of it in which weight decay applies, or does not."""
    theirs = join(flat.layout.slot(name) for name, (_, layout) in flat.layout.slots.items() if layout.decays == decays)
    return intersect(theirs, _updated(flat))
