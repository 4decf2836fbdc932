"""The sum of gradients by their largest directions: a matrix travels as two thin ones.

PowerSGD (Vogels et al., arXiv 1905.13727, algorithms 1 and 2). Of the sum of all ranks' matrices M, (a, b), one step of power
iteration is made: P = M Q, orthogonalised, and Q = M^T P. What is updated with is P Q^T, and Q is the start of the next step.
Each rank keeps what its own matrix has lost and adds it the next time. Vectors, and matrices that would not get smaller, travel
whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.model.init import initial_value
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Interval


class CompressedSum:
    """`sums`: what this rank has of the gradient, and where the sum comes to. Collective over `comm`, the data axis; all ranks
    have the bits of the library's all-reduce."""

    def __init__(self, comm: Comm, flat: FlatParameters, sums: FlatVector, rank: int, seed: int):
        self.comm = comm
        views = {name: flat.parameter(name, sums) for name in flat.layout.slots}
        self.matrices = {name: view for name, view in views.items() if _worth(view, rank)}
        self.rest = [view for name, view in views.items() if name not in self.matrices]
        self.lost = {name: torch.zeros_like(view) for name, view in self.matrices.items()}
        self.starts = {
            name: initial_value(seed, f"compress.{name}", (view.shape[1], rank), 1.0).to(flat.device)
            for name, view in self.matrices.items()
        }

    @property
    def held_bytes(self) -> int:
        return sum(x.nbytes for x in (*self.lost.values(), *self.starts.values()))

    def forget(self) -> None:
        """What was left out belonged to another state."""
        for lost in self.lost.values():
            lost.zero_()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None: ...

    def finish(self) -> None:
        for name, matrix in self.matrices.items():
            matrix.add_(self.lost[name])
        lefts = self._summed([matrix @ self.starts[name] for name, matrix in self.matrices.items()])
        lefts = [torch.linalg.qr(left).Q for left in lefts]
        rights = [matrix.T @ left for matrix, left in zip(self.matrices.values(), lefts)]
        totals = self._summed([*rights, *self.rest])
        for (name, matrix), left, mine, total in zip(self.matrices.items(), lefts, rights, totals):
            torch.sub(matrix, left @ mine.T, out=self.lost[name])
            matrix.copy_(left @ total.T)
            if total.isfinite().all():  # else the step is left out, and must not spoil those to come
                self.starts[name] = total
            else:
                self.lost[name].zero_()
        for view, total in zip(self.rest, totals[len(rights) :]):
            view.copy_(total)

    def _summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of all ranks' tensors, in one message."""
        if not tensors:
            return []
        together = torch.cat([x.reshape(-1) for x in tensors])
        self.comm.all_reduce(together)
        parts = together.split([x.numel() for x in tensors])
        return [part.view(x.shape) for part, x in zip(parts, tensors)]


def _worth(view: Tensor, rank: int) -> bool:
    return view.dim() == 2 and rank * sum(view.shape) < view.numel()
