"""Reduction across ranks in memory that the ranks of a node share.

Each rank adds its slices of every bucket, in tree order, straight from the memory of the others; on one node nothing is sent.
Across nodes, ranks with equal local rank exchange partial sums, so each slice leaves a node once, not once per local rank. For
an all-reduce each rank then copies the other slices from where they were added. Of a short vector, whose sum takes less time
than a barrier, each rank adds everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.ops.tree import AccumulationPlan, Interval, TreeNode, count_buffers
from mpilm.ops.tree_reduce import GradientEncoding, TreeMerger
from mpilm.parallel.flat_layout import FlatLayout
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT, MessageReducer
from mpilm.parallel.reduce.step import CrossRankReducer

MAX_SHORT_NUMEL = 1 << 16  # elements of all ranks together that each rank may add itself


@dataclass(frozen=True)
class NodeTopology:
    """The ranks of a communicator on nodes of equal size, one node after the other."""

    intra_node: Comm  # the ranks of this node
    inter_node: Comm  # the ranks with this rank's local rank

    def ranks(self, node: int) -> range:
        return range(node * self.intra_node.size, (node + 1) * self.intra_node.size)


def detect_topology(comm: Comm) -> NodeTopology | None:
    """Return the topology; None for one rank a node, unequal nodes, or ranks that alternate between nodes. Collective."""
    intra_node = comm.split_node(f"{comm.name} within the node")
    size = intra_node.size
    actual = comm.all_gather_json([comm.rank - intra_node.rank, intra_node.rank, size])
    expected = [[rank // size * size, rank % size, size] for rank in range(comm.size)]
    if not all(comm.all_gather_json(size > 1 and actual == expected)):
        return None
    return NodeTopology(intra_node, comm.split(intra_node.rank, comm.rank, f"{comm.name} across nodes"))


class LocalRankSlices:
    """The slices of a flat layout owned by the ranks with one local rank, one after the other."""

    def __init__(self, layout: FlatLayout, local_rank: int, local_size: int):
        self.layout, self.ranks, self.longest_slice = layout, range(local_rank, layout.ranks, local_size), layout.longest_slice
        self.numel = sum(sum(self.slices(bucket)) for bucket in layout.buckets)

    def slices(self, bucket: Interval) -> list[int]:
        return [stop - start for start, stop in self.intervals(bucket)]

    def intervals(self, bucket: Interval) -> list[Interval]:
        """Return their positions in the flat vector."""
        return [self.layout.slice(bucket, rank) for rank in self.ranks]


class SharedMemoryReducer(CrossRankReducer):
    """Reduces in shared memory; the sum goes to buffer 0 of each rank: its slices, or with `gather` all of it. `buffers`: the
    flat vectors of each rank of this node. `nodes_held`: for each rank of the communicator, the tree node that each of its
    buffers holds. Collective over the topology's communicators."""

    uses_shared_buffers = True

    def __init__(
        self,
        topology: NodeTopology,
        layout: FlatLayout,
        buffers: Sequence[Sequence[Tensor]],
        nodes_held: Sequence[Mapping[int, TreeNode]],
        microbatches: int,
        gather: bool,
        encoding: GradientEncoding,
        halving: bool = False,
    ):
        self.topology, self.gather, self.adds_in_stages = topology, gather, topology.inter_node.size > 1
        local_rank, local_size = topology.intra_node.rank, topology.intra_node.size
        slices = [LocalRankSlices(layout, r, local_size) for r in range(local_size)]
        own_slices, self.own_buffers = slices[local_rank], buffers[local_rank]
        own_sums = self.own_buffers[0]
        by_node = [
            TreeMerger([list(nodes_held[rank].values()) for rank in topology.ranks(node)], microbatches)
            for node in range(topology.inter_node.size)
        ]
        self.intra_reduction = by_node[topology.inter_node.rank]
        held_here = [nodes_held[rank] for rank in topology.ranks(topology.inter_node.rank)]
        by_tree_node = {node: vectors[b] for vectors, held in zip(buffers, held_here) for b, node in held.items()}
        in_order = [by_tree_node[node] for node in sorted(by_tree_node)]
        self.views = {
            bucket: [([x[i:j] for x in in_order], own_sums[i:j]) for i, j in own_slices.intervals(bucket)]
            for bucket in layout.buckets
        }
        """For each bucket, this rank's parts and the place of their sum. Creating a view costs more than a few additions."""
        self.copies = [
            (own_sums[i:j], buffers[r][0][i:j])
            for r in range(local_size)
            if r != local_rank
            for bucket in layout.buckets
            for i, j in slices[r].intervals(bucket)
        ]
        """The place of each slice added by another rank of the node, and its source."""
        self.inter_node: MessageReducer | None = None
        if topology.inter_node.size > 1:
            self.packed = [torch.empty(own_slices.numel) for _ in self.intra_reduction.remaining]
            nodes, depth = [each.remaining for each in by_node], min(BUCKETS_IN_FLIGHT, len(layout.buckets))
            self.inter_node = MessageReducer(
                topology.inter_node, own_slices, nodes, microbatches, own_sums.device, gather, depth, encoding, halving
            )
            self.memory_bytes = self.inter_node.memory_bytes + sum(x.nbytes for x in self.packed)

    def reset_residuals(self) -> None:
        if self.inter_node is not None:
            self.inter_node.reset_residuals()

    def finish(self) -> None:
        """Reduce all buckets; every rank calls this once its tree nodes are complete."""
        node = self.topology.intra_node
        node.barrier()
        if self.inter_node is None:
            for parts, total in (pair for pairs in self.views.values() for pair in pairs):
                self.intra_reduction.merge_into(parts, total)
        else:
            self._reduce_across_nodes(self.inter_node)
        node.barrier()
        if self.gather:
            for out, source in self.copies:
                out.copy_(source)
            node.barrier()  # the sums may be scaled or overwritten from here on

    def _reduce_across_nodes(self, inter_node: MessageReducer) -> None:
        at, results = 0, []
        for bucket, slices in self.views.items():
            first = at
            for number, (parts, total) in enumerate(slices):
                stop = at + total.numel()
                for packed, partial_sum in zip(self.packed, self.intra_reduction.merge(parts)):
                    packed[at:stop].copy_(partial_sum)
                if self.gather or number == self.topology.inter_node.rank:
                    results.append((total, self.packed[0][at:stop]))
                at = stop
            inter_node.start([packed[first:at] for packed in self.packed], bucket)
        inter_node.finish()
        for total, result in results:
            total.copy_(result)


class ShortVectorReducer(CrossRankReducer):
    """All-reduces with one barrier: each rank copies its vectors to where the others read them, and adds those of all ranks.
    `buffers`: three times the flat vectors of each rank of this node; the sum goes to the first of the last third, and the
    others are places that take turns, because a rank that has passed the barrier fills one while others still read the other.
    `nodes_held` as above. Collective over `comm`, the ranks of one node."""

    uses_shared_buffers = True

    def __init__(
        self, comm: Comm, buffers: Sequence[Sequence[Tensor]], nodes_held: Sequence[Mapping[int, TreeNode]], microbatches: int
    ):
        self.comm, held = comm, nodes_held[comm.rank]
        *places, own = ([vectors[third::3] for vectors in buffers] for third in range(3))
        self.own_buffers = own[comm.rank]
        merger = TreeMerger([list(each.values()) for each in nodes_held], microbatches)
        sums = [*(torch.empty_like(self.own_buffers[0]) for _ in merger.merges[1:]), self.own_buffers[0]]
        self.turns = [
            ([(turn[comm.rank][b], self.own_buffers[b]) for b in held], _plan_additions(turn, nodes_held, merger, sums))
            for turn in places
        ]
        self.memory_bytes = sum(x.nbytes for x in [*sums[:-1], *self.own_buffers, *self.own_buffers])

    def finish(self) -> None:
        """Reduce all buckets; every rank calls this once its tree nodes are complete."""
        copies, additions = self.turns[0]
        self.turns.reverse()
        for place, vector in copies:
            place.copy_(vector)
        self.comm.barrier()
        for a, b, out in additions:
            torch.add(a, b, out=out)


def _plan_additions(
    turn: Sequence[Sequence[Tensor]], nodes_held: Sequence[Mapping[int, TreeNode]], merger: TreeMerger, sums: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the additions (a, b, sum) of a turn, which leave what other ranks read unchanged."""
    by_tree_node = {node: vectors[b] for vectors, held in zip(turn, nodes_held) for b, node in held.items()}
    values, additions = [by_tree_node[node] for node in sorted(by_tree_node)], list[tuple[Tensor, Tensor, Tensor]]()
    for (into, other), out in zip(merger.merges, sums):
        additions.append((values[into], values[other], out))
        values[into] = out
    return additions


def make_shared_memory_reducer(
    comm: Comm,
    layout: FlatLayout,
    plans: list[AccumulationPlan],
    microbatches: int,
    gather: bool,
    encoding: GradientEncoding,
    halving: bool = False,
) -> SharedMemoryReducer | ShortVectorReducer | None:
    """Return a reducer of buffers in shared memory, as plans need them; None on all ranks if a node has none. Collective."""
    if (topology := detect_topology(comm)) is None:
        return None
    is_short = gather and topology.inter_node.size == 1 and layout.numel * comm.size <= MAX_SHORT_NUMEL
    counts = [count_buffers(ops) * (3 if is_short else 1) for ops, _ in plans]
    parts = topology.intra_node.allocate_shared(counts[comm.rank] * layout.numel)
    if not all(comm.all_gather_json(parts is not None)) or parts is None:
        return None
    local_counts = [counts[rank] for rank in topology.ranks(topology.inter_node.rank)]
    buffers = [part[: count * layout.numel].split(layout.numel) for part, count in zip(parts, local_counts)]
    held = [held for _, held in plans]
    if is_short:
        return ShortVectorReducer(comm, buffers, held, microbatches)
    return SharedMemoryReducer(topology, layout, buffers, held, microbatches, gather, encoding, halving)
