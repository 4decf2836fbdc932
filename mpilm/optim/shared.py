"""The gradient of a stage summed where it lies: in memory that the ranks of a node have together.

Each rank adds its slices of every bucket, in tree order, straight from the memory of the others; on one node nothing is sent.
Of several nodes, the ranks that have the same place on theirs exchange what is left, so that each slice leaves a node once
instead of once for each of its ranks. With a gather each then copies the other slices from where they were added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.optim.exchange import Round, TreeExchange
from mpilm.optim.sent import BucketSum, SentSum
from mpilm.optim.wire import Exact
from mpilm.parallel.shard import FlatLayout, Interval
from mpilm.parallel.tree import Range

IN_FLIGHT = 2  # buckets on their way between nodes


@dataclass(frozen=True)
class Nodes:
    """The ranks of a communicator as they lie on nodes of equal size, one after the other. `node`: those here; `across`: those
    with this rank's place on their nodes."""

    node: Comm
    across: Comm

    def ranks(self, number: int) -> range:
        """The ranks of a node."""
        return range(number * self.node.size, (number + 1) * self.node.size)


def nodes_of(comm: Comm) -> Nodes | None:
    """How the ranks lie; None where nodes have one rank each, or unequal numbers, or ranks in turn. Collective."""
    node = comm.split_node(f"{comm.name} within the node")
    here = comm.all_gather_json([comm.rank - node.rank, node.rank, node.size])
    size = node.size
    expected = [[rank // size * size, rank % size, size] for rank in range(comm.size)]
    if not all(comm.all_gather_json(size > 1 and here == expected)):
        return None
    return Nodes(node, comm.split(node.rank, comm.rank, f"{comm.name} across nodes"))


class Lane:
    """The slices of a flat layout that the ranks with one place on their nodes have, one after the other."""

    def __init__(self, layout: FlatLayout, place: int, size: int):
        self.layout, self.place, self.size = layout, place, size

    def slices(self, bucket: Interval) -> list[int]:
        return self.layout.slices(bucket)[self.place :: self.size]

    def intervals(self, bucket: Interval) -> list[Interval]:
        """Where they lie in the flat vector."""
        return [self.layout.slice(bucket, rank) for rank in range(self.place, self.layout.ranks, self.size)]

    @property
    def longest_slice(self) -> int:
        return self.layout.longest_slice

    @property
    def numel(self) -> int:
        return sum(sum(self.slices(bucket)) for bucket in self.layout.buckets)


class SharedSum:
    """`buffers`: the vectors of each rank of this node; `held[r]`: which of its vectors holds which node of the tree, of every
    rank r. The sum comes to buffer 0 of each rank: its slices of it, or with `gather` all of it. Collective over `nodes`."""

    def __init__(
        self, nodes: Nodes, layout: FlatLayout, buffers: Sequence[Sequence[Tensor]], held: Sequence[Mapping[int, Range]],
        microbatches: int, gather: bool, wire: Exact | None = None,
    ):  # fmt: skip
        self.nodes, self.gather = nodes, gather
        sums = [theirs[0] for theirs in buffers]
        self.mine = sums[nodes.node.rank]
        lanes = [Lane(layout, place, nodes.node.size) for place in range(nodes.node.size)]
        self.lane = lanes[nodes.node.rank]
        near = [self._near(number, held, microbatches) for number in range(nodes.across.size)]
        here = [(node, vectors[b]) for vectors, of in zip(buffers, self._of(nodes.across.rank, held)) for b, node in of.items()]
        self.near = near[nodes.across.rank]
        self.slices = self._slices([vector for _, vector in sorted(here, key=lambda pair: pair[0])])
        self.others = [pair for theirs, lane in zip(sums, lanes) if lane is not self.lane for pair in self._pairs(theirs, lane)]
        self.far: SentSum | None = None
        if nodes.across.size > 1:
            step = Round([of.remaining for of in near], microbatches)
            self.packed = [torch.empty(self.lane.numel) for _ in self.near.remaining]
            depth = min(IN_FLIGHT, len(layout.buckets))
            exchanges = [TreeExchange(nodes.across, self.lane, step.numel, self.mine.device, wire) for _ in range(depth)]
            self.far = SentSum([BucketSum(exchange, step, gather) for exchange in exchanges])

    def _slices(self, vectors: Sequence[Tensor]) -> dict[Interval, list[tuple[list[Tensor], Tensor]]]:
        """By bucket: the parts that this rank adds, and where the sum belongs. Views made once, as they cost more than a small
        sum does."""
        return {
            bucket: [([x[i:j] for x in vectors], self.mine[i:j]) for i, j in self.lane.intervals(bucket)]
            for bucket in self.lane.layout.buckets
        }

    def _pairs(self, theirs: Tensor, lane: Lane) -> list[tuple[Tensor, Tensor]]:
        """Where the sums of another rank of this node belong, and where they are."""
        return [(self.mine[i:j], theirs[i:j]) for bucket in lane.layout.buckets for i, j in lane.intervals(bucket)]

    def _of(self, number: int, held: Sequence[Mapping[int, Range]]) -> list[Mapping[int, Range]]:
        return [held[rank] for rank in self.nodes.ranks(number)]

    def _near(self, number: int, held: Sequence[Mapping[int, Range]], microbatches: int) -> Round:
        return Round([list(of.values()) for of in self._of(number, held)], microbatches)

    @property
    def sent_numel(self) -> int:
        """Elements that this rank sends to other nodes."""
        return 0 if self.far is None else sum(x.numel() for x in self.packed)

    @property
    def held_bytes(self) -> int:
        """Memory of what goes to other nodes."""
        return 0 if self.far is None else self.far.held_bytes + sum(x.nbytes for x in self.packed)

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None: ...

    def finish(self) -> None:
        """All ranks have their nodes of the tree complete when they call this."""
        node = self.nodes.node
        node.barrier()
        self._add() if self.far is None else self._add_far(self.far)
        node.barrier()
        if self.gather:
            for into, theirs in self.others:
                into.copy_(theirs)
            node.barrier()  # what was read may now be scaled, or written anew

    def _add(self) -> None:
        for parts, into in (pair for pairs in self.slices.values() for pair in pairs):
            self.near.total(parts, into)

    def _add_far(self, far: SentSum) -> None:
        at, wanted = 0, []
        for bucket, slices in self.slices.items():
            first = at
            for number, (parts, into) in enumerate(slices):
                stop = at + into.numel()
                for packed, result in zip(self.packed, self.near.results(parts)):
                    packed[at:stop].copy_(result)
                if self.gather or number == self.nodes.across.rank:
                    wanted.append((into, self.packed[0][at:stop]))
                at = stop
            far.start([packed[first:at] for packed in self.packed], bucket)
        far.finish()
        for into, total in wanted:
            into.copy_(total)
