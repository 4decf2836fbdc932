"""Local SGD with an outer optimizer: replicas train independently and synchronize every few steps.

DiLoCo (Douillard et al., arXiv 2311.08105). Between synchronizations each replica steps with its own gradient. Then their mean
displacement, old minus new weights, is the gradient of an outer optimizer: SGD with Nesterov momentum and the paper's settings.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.parallel.layout import FlatKey

OUTER_MOMENTUM = "outer_momentum"  # its name in checkpoints
OUTER_LR, OUTER_BETA = 0.7, 0.9
MAX_MESSAGE_NUMEL = 1 << 26


class DiLoCo:
    """Synchronizes replicas every `every` steps, and at the last step of a run. Collective over `comm`, the reduce axes."""

    def __init__(self, flats: Mapping[FlatKey, FlatParameters], comm: Comm, every: int):
        self.flats, self.comm, self.every = flats, comm, every
        self.momentum = {key: flat.zeros("moments", flat.values.intervals) for key, flat in flats.items()}
        self.anchors: dict[FlatKey, Tensor] = {}  # the weights at the last synchronization
        self.memory_bytes = 2 * sum(momentum.tensor.nbytes for momentum in self.momentum.values())  # with the anchors

    def is_due(self, done: int, steps: int) -> bool:
        """Return whether replicas synchronize after `done` of `steps` steps."""
        return done % self.every == 0 or done == steps

    def begin_step(self) -> None:
        """Copy the common weights before the first update since a synchronization."""
        for key, flat in self.flats.items():
            self.anchors.setdefault(key, flat.values.tensor.clone())

    def sync(self) -> None:
        """Bring all replicas to the same weights, unless none has been updated since the last time. Collective."""
        if not self.anchors:
            return
        for key, flat in self.flats.items():
            anchor, momentum = self.anchors.pop(key), self.momentum[key].tensor
            delta = anchor - flat.values.tensor
            for part in delta.split(MAX_MESSAGE_NUMEL):
                self.comm.all_reduce(part)
            delta.div_(self.comm.size)
            momentum.mul_(OUTER_BETA).add_(delta)
            torch.sub(anchor, delta.add_(momentum, alpha=OUTER_BETA), alpha=OUTER_LR, out=flat.values.tensor)

    def owned_slices(self) -> dict[ParamSlice, Tensor]:
        """Return the outer momentum of the parameter slices that this rank updates."""
        return {item: x for key, flat in self.flats.items() for item, x in flat.owned_slices(self.momentum[key]).items()}
