"""Reduction across ranks by messages, bucket by bucket, with several buckets in flight."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.ops.tree import Interval, TreeNode
from mpilm.ops.tree_reduce import GradientEncoding, Sliceable, TreeReduceScatter, TreeReduction
from mpilm.parallel.reduce.step import CrossRankReducer

BUCKETS_IN_FLIGHT = 2  # unless the reduction overlaps with backward


class AllReduceBucketReducer:
    """Reduces one bucket at a time by the MPI library's all-reduce, in whatever order that adds."""

    memory_bytes = 0

    def __init__(self, comm: Comm):
        self.comm, self.gathering = comm, Request()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        self.gathering.wait()
        self.gathering = self.comm.iall_reduce(parts[0])

    def finish(self) -> None:
        pass


class TreeBucketReducer:
    """Reduces a bucket in tree order. The sum goes to `parts[0]`: this rank's slice, or with `gather` all of it."""

    def __init__(self, reduce_scatter: TreeReduceScatter, reduction: TreeReduction, gather: bool):
        self.reduce_scatter, self.reduction, self.gather, self.gathering = reduce_scatter, reduction, gather, Request()

    @property
    def memory_bytes(self) -> int:
        return self.reduce_scatter.workspace.nbytes

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        self.gathering.wait()
        self.parts, self.bucket = parts, bucket
        self.reduce_scatter.start(self.reduction, parts, bucket)

    def finish(self) -> None:
        (total,) = self.reduce_scatter.finish()
        comm, sums, encoding = self.reduce_scatter.comm, self.parts[0], self.reduce_scatter.encoding
        slices = self.reduce_scatter.layout.slices(self.bucket)
        if not self.gather:
            sums.split(slices)[comm.rank].copy_(total)
            return
        sent = encoding.encode((self.bucket, "sum"), total)
        out = sums if sent.dtype == sums.dtype else torch.empty_like(sums, dtype=sent.dtype)
        self.gathering = _chain(comm.iall_gather(sent, out, slices), lambda: None if out is sums else sums.copy_(out))


def _chain(request: Request, action: Callable[[], object]) -> Request:
    def finish() -> None:
        request.wait()
        action()

    return Request(finish)


class MessageReducer(CrossRankReducer):
    """Reduces buckets one after the other, one in flight for each of `slots`; a rank sends `sent_numel` elements in a step."""

    def __init__(
        self,
        slots: Sequence[AllReduceBucketReducer | TreeBucketReducer],
        encoding: GradientEncoding | None = None,
        sent_numel: int = 0,
    ):
        self.slots, self.encoding, self.sent_numel, self.started = slots, encoding or GradientEncoding(), sent_numel, 0

    @property
    def memory_bytes(self) -> int:
        return sum(slot.memory_bytes for slot in self.slots) + self.encoding.residual_bytes(self.sent_numel)

    def reset_residuals(self) -> None:
        self.encoding.reset_residuals()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        slot = self.slots[self.started % len(self.slots)]
        if self.started >= len(self.slots):
            slot.finish()
        slot.start(parts, bucket)
        self.started += 1

    def finish(self) -> None:
        for number in range(max(0, self.started - len(self.slots)), self.started):
            self.slots[number % len(self.slots)].finish()
        for slot in self.slots:
            slot.gathering.wait()
        self.started = 0


def tree_message_reducer(
    comm: Comm,
    layout: Sliceable,
    nodes: Sequence[Sequence[TreeNode]],
    microbatches: int,
    device: torch.device,
    gather: bool,
    depth: int,
    encoding: GradientEncoding,
) -> MessageReducer:
    """Return a reducer that adds in tree order, with `depth` buckets in flight. `nodes`: those each rank contributes."""
    reduction = TreeReduction(nodes, microbatches)
    exchanges = [TreeReduceScatter(comm, layout, reduction.node_count, device, encoding) for _ in range(depth)]
    slots = [TreeBucketReducer(exchange, reduction, gather) for exchange in exchanges]
    return MessageReducer(slots, encoding, len(nodes[comm.rank]) * layout.numel)
