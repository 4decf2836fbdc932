"""The experts of a mixture on the ranks of the expert axis, and the exchange of tokens between them.

Each rank has as many experts as any other, in ascending order. Tokens travel to the ranks of their experts and back
(all-to-all; Lepikhin et al., GShard, arXiv 2006.16668, section 3.1). Those of one rank are never mixed with those of another:
an expert computes the same products as on one rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mpilm.comm.base import Comm

RowCounts = Sequence[Sequence[int]]  # of each piece to or from each rank


class ExpertAxis:
    """`experts` experts on the ranks of `comm`, which must divide them."""

    def __init__(self, comm: Comm, experts: int):
        self.comm, self.each = comm, experts // comm.size
        self.experts_of_ranks = [range(rank * self.each, (rank + 1) * self.each) for rank in range(comm.size)]
        self.local_experts = self.experts_of_ranks[comm.rank]

    def count_rows(self, inputs: Sequence[Tensor]) -> tuple[RowCounts, RowCounts]:
        """Return the rows that this rank has for each expert, by the rank that has it, and those that each rank has for the
        experts of this one. Collective."""
        counts = torch.tensor([len(x) for x in inputs], device="cpu")
        everyone = torch.empty(self.comm.size, len(inputs), dtype=counts.dtype, device="cpu")
        self.comm.all_gather(counts, everyone.view(-1))
        own = slice(self.local_experts.start, self.local_experts.stop)
        return counts.view(self.comm.size, self.each).tolist(), everyone[:, own].tolist()


class ExchangeRows(Function):
    """Pieces (n, D) for other ranks, those for rank 0 first -> the pieces for this rank, those from rank 0 first. Backward does
    the opposite. Collective over the expert axis, in backward too."""

    @staticmethod
    def forward(ctx: Any, comm: Comm, sends: RowCounts, receives: RowCounts, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.comm, ctx.sends, ctx.receives = comm, sends, receives
        return exchange_rows(comm, sends, receives, pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *exchange_rows(ctx.comm, ctx.receives, ctx.sends, gradients)


def exchange_rows(comm: Comm, sends: RowCounts, receives: RowCounts, pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Send `pieces`; return those that arrive, each in memory of its own: kernels may round by its alignment. Collective."""
    sent, width = torch.cat([piece.detach() for piece in pieces]), pieces[0].shape[1]
    received = sent.new_empty(sum(map(sum, receives)), width)
    comm.all_to_all(sent.view(-1), received.view(-1), *([width * sum(rows) for rows in counts] for counts in (sends, receives)))
    return tuple(piece.clone() for piece in received.split([rows for counts in receives for rows in counts]))
