"""Replicas that train by themselves for some steps and then meet (DiLoCo; Douillard et al., arXiv 2311.08105).

Between meetings each replica steps with its own gradient. At a meeting the mean of how far all have moved since the last one is
the gradient of an outer optimizer, SGD with Nesterov momentum, with the paper's settings.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.shard import Piece

OUTER = "outer_momentum"  # what it is called in checkpoints
RATE, MOMENTUM = 0.7, 0.9
MOST = 1 << 26  # elements of one message


class Outer:
    """`every`: steps from meeting to meeting; the last step of a run is one too. Collective over `comm`, the data axis."""

    def __init__(self, flats: Mapping[int, FlatParameters], comm: Comm, every: int):
        self.flats, self.comm, self.every = flats, comm, every
        self.momentum = {stage: torch.zeros_like(flat.values.tensor) for stage, flat in flats.items()}
        self.before: dict[int, Tensor] = {}

    def due(self, done: int, steps: int) -> bool:
        """Whether replicas meet after so many steps, of all there are."""
        return done % self.every == 0 or done == steps

    def begin(self) -> None:
        """Before each update: keep where all replicas are, unless that is done."""
        for stage, flat in self.flats.items():
            self.before.setdefault(stage, flat.values.tensor.clone())

    def meet(self) -> None:
        """Leave all replicas at one place, unless none has moved since they were. Collective."""
        if not self.before:
            return
        for stage, flat in self.flats.items():
            before, momentum = self.before.pop(stage), self.momentum[stage]
            moved = before - flat.values.tensor
            for part in moved.split(MOST):
                self.comm.all_reduce(part)
            moved.div_(self.comm.size)
            momentum.mul_(MOMENTUM).add_(moved)
            torch.sub(before, moved.add_(momentum, alpha=MOMENTUM), alpha=RATE, out=flat.values.tensor)

    def pieces(self) -> dict[Piece, Tensor]:
        """The outer momentum of what this rank updates."""
        found = {}
        for stage, flat in self.flats.items():
            for piece, values in flat.pieces(flat.values).items():
                at = values.storage_offset() - flat.values.tensor.storage_offset()
                found[piece] = self.momentum[stage][at : at + piece.numel]
        return found

    @property
    def held_bytes(self) -> int:
        """Of the momentum, and of where replicas were."""
        return 2 * sum(x.nbytes for x in self.momentum.values())
