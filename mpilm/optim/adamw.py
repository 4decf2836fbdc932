"""AdamW over the flat parameters, by torch's fused kernel.

The kernel is called directly: constructing torch.optim.AdamW imports the compiler, which costs each rank a second at the
start and 70 MiB (measured with torch 2.13). It is called on whole runs of the flat vector, padding included: its last bits
depend on where a run begins and ends, and runs end at multiples of the layout's alignment however the vector is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpilm.config import Train
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Interval, Piece, intersect

MOMENTS = ("exp_avg", "exp_avg_sq")
EPS = 1e-8


class AdamW:
    """Decoupled weight decay on matrices only (Loshchilov and Hutter, arXiv 1711.05101).

    Updates what `flats`, the stages of this rank by number, say that this rank updates; `moments` holds its moments by kind
    and stage.
    """

    def __init__(self, flats: Mapping[int, FlatParameters], train: Train):
        self.flats, self.train = flats, train
        device = next(iter(flats.values())).device
        self.moments = {
            kind: {stage: FlatVector.zeros(flat.updated, device) for stage, flat in flats.items()} for kind in MOMENTS
        }
        self.runs = {
            decays: [(stage, run) for stage, flat in flats.items() for run in _runs(flat, decays)] for decays in (True, False)
        }
        self.count = torch.zeros((), device=device)

    def set_step(self, step: int) -> None:
        """Say how many steps the moments have seen."""
        self.count.fill_(step)

    def step(self, gradients: Mapping[int, FlatVector], lr: float) -> None:
        """One update of what this rank updates; gradients are by stage."""
        self.count += 1
        values = {stage: flat.values for stage, flat in self.flats.items()}
        for decays, runs in self.runs.items():
            if not runs:
                continue  # a small model on many ranks: some have nothing to update
            torch._fused_adamw_(
                _views(values, runs),
                _views(gradients, runs),
                _views(self.moments["exp_avg"], runs),
                _views(self.moments["exp_avg_sq"], runs),
                [],
                [self.count] * len(runs),
                lr=lr,
                beta1=self.train.beta1,
                beta2=self.train.beta2,
                weight_decay=self.train.weight_decay if decays else 0.0,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )

    def pieces(self) -> dict[str, dict[Piece, Tensor]]:
        """The moments of what this rank updates, by kind, as parts of parameters."""
        return {
            kind: {piece: x for stage, flat in self.flats.items() for piece, x in flat.pieces(of[stage]).items()}
            for kind, of in self.moments.items()
        }


def _views(vectors: Mapping[int, FlatVector], runs: list[tuple[int, Interval]]) -> list[Tensor]:
    return [vectors[stage].view(*run) for stage, run in runs]


def _runs(flat: FlatParameters, decays: bool) -> list[Interval]:
    """The intervals that this rank updates and in which weight decay applies, or does not."""
    joined: list[Interval] = []
    for name, (_, layout) in flat.layout.slots.items():
        start, stop = flat.layout.slot(name)
        if layout.decays == decays:
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
    return intersect(joined, flat.updated)
