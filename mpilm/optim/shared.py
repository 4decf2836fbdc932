"""The gradient of a stage summed where it lies: in memory that the ranks of a node have together.

Each rank adds its slice of every bucket, in tree order, straight from the memory of the others; nothing is sent. With a gather
each then copies the other slices from where they were added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.optim.exchange import Round
from mpilm.parallel.shard import FlatLayout
from mpilm.parallel.tree import Range


class SharedSum:
    """`buffers[r]`: rank r's vectors; `nodes[r]`: which of them holds which node of the tree. The sum comes to buffer 0 of each
    rank: its slices of it, or with `gather` all of it. Collective over `comm`."""

    def __init__(
        self,
        comm: Comm,
        layout: FlatLayout,
        buffers: Sequence[Sequence[Tensor]],
        nodes: Sequence[Mapping[int, Range]],
        microbatches: int,
        gather: bool,
    ):
        self.comm, self.layout, self.gather = comm, layout, gather
        self.sums = [theirs[0] for theirs in buffers]
        self.round = Round([list(of.values()) for of in nodes], microbatches)
        held = [(node, buffers[rank][b]) for rank, of in enumerate(nodes) for b, node in of.items()]
        self.vectors = [vector for _, vector in sorted(held, key=lambda pair: pair[0])]

    def reduce(self) -> None:
        """All ranks have their nodes complete when they call this."""
        self.comm.barrier()
        mine = self.sums[self.comm.rank]
        for bucket in self.layout.buckets:
            start, stop = self.layout.slice(bucket, self.comm.rank)
            (total,) = self.round.results([vector[start:stop] for vector in self.vectors])
            if stop > start and total.data_ptr() != mine[start:].data_ptr():
                mine[start:stop].copy_(total)
        self.comm.barrier()
        if self.gather:
            self._gather(mine)
            self.comm.barrier()  # what was read may now be scaled, or written anew

    def _gather(self, mine: Tensor) -> None:
        for bucket in self.layout.buckets:
            for rank, theirs in enumerate(self.sums):
                start, stop = self.layout.slice(bucket, rank)
                if rank != self.comm.rank and stop > start:
                    mine[start:stop].copy_(theirs[start:stop])
