"""Gradient compression by low-rank approximation: a matrix is sent as two low-rank factors.

PowerSGD (Vogels et al., arXiv 1905.13727, algorithms 1 and 2). One step of power iteration approximates the sum M of all ranks'
matrices (a, b): P = M Q, orthogonalized, then Q = M^T P. The update uses P Q^T, and Q starts the next step. Each rank adds the
error of its own matrix to its next gradient. Vectors, and matrices that would not get smaller, are sent uncompressed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.model.families import initial_value
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.reduce.step import CrossRankReducer


class PowerSGDReducer(CrossRankReducer):
    """Reduces `sums`, this rank's gradient, in place. Collective over `comm`; all ranks get the bits of MPI's all-reduce."""

    def __init__(self, comm: Comm, flat: FlatParameters, sums: FlatVector, rank: int, seed: int):
        self.comm = comm
        views = {name: flat.parameter(name, sums) for name in flat.layout.spans}
        self.matrices = {name: x for name, x in views.items() if x.dim() == 2 and rank * sum(x.shape) < x.numel()}
        self.uncompressed = [view for name, view in views.items() if name not in self.matrices]
        self.errors = {name: torch.zeros_like(view) for name, view in self.matrices.items()}
        shapes = {name: (view.shape[1], rank) for name, view in self.matrices.items()}
        self.q = {name: initial_value(seed, f"compress.{name}", x, 1.0).to(flat.device) for name, x in shapes.items()}
        self.memory_bytes = sum(x.nbytes for x in (*self.errors.values(), *self.q.values()))

    def reset_residuals(self) -> None:
        for error in self.errors.values():
            error.zero_()

    def finish(self) -> None:
        for name, matrix in self.matrices.items():
            matrix.add_(self.errors[name])
        p = self._all_reduce([matrix @ self.q[name] for name, matrix in self.matrices.items()])
        p = [torch.linalg.qr(x).Q for x in p]
        own_q = [matrix.T @ x for matrix, x in zip(self.matrices.values(), p)]
        totals = self._all_reduce([*own_q, *self.uncompressed])
        for (name, matrix), left, own, total in zip(self.matrices.items(), p, own_q, totals):
            torch.sub(matrix, left @ own.T, out=self.errors[name])
            matrix.copy_(left @ total.T)
            if total.isfinite().all():  # otherwise the step is skipped, and must not contaminate later ones
                self.q[name] = total
            else:
                self.errors[name].zero_()
        for view, total in zip(self.uncompressed, totals[len(own_q) :]):
            view.copy_(total)

    def _all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of all ranks' tensors, in one message."""
        if not tensors:
            return []
        packed = torch.cat([x.reshape(-1) for x in tensors])
        self.comm.all_reduce(packed)
        return [part.view(x.shape) for part, x in zip(packed.split([x.numel() for x in tensors]), tensors)]
