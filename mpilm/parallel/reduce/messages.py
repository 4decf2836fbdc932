"""Reduction across ranks by messages, bucket by bucket, with several buckets in flight."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.ops.tree import Interval, TreeNode
from mpilm.ops.tree_reduce import GradientEncoding, Sliceable, TreeMerger, TreeOrderReduceScatter
from mpilm.parallel.reduce.step import CrossRankReducer

BUCKETS_IN_FLIGHT = 2  # unless the reduction overlaps with backward


class AllReduceReducer(CrossRankReducer):
    """Reduces by the MPI library's all-reduce, in the order that the library chooses, with `depth` buckets in flight."""

    def __init__(self, comm: Comm, depth: int):
        self.comm, self.depth, self.requests = comm, depth, deque[Request]()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        if len(self.requests) == self.depth:
            self.requests.popleft().wait()
        self.requests.append(self.comm.iall_reduce(parts[0]))

    def finish(self) -> None:
        while self.requests:
            self.requests.popleft().wait()


class MessageReducer(CrossRankReducer):
    """Reduces in tree order, with `depth` buckets in flight. The sum goes to the first part of each bucket: this rank's slice,
    or with `gather` all of it. `nodes`: the tree nodes that each rank contributes."""

    def __init__(
        self,
        comm: Comm,
        layout: Sliceable,
        nodes: Sequence[Sequence[TreeNode]],
        microbatches: int,
        device: torch.device,
        gather: bool,
        depth: int,
        encoding: GradientEncoding,
    ):
        self.comm, self.layout, self.gather, self.encoding = comm, layout, gather, encoding
        self.reduction = TreeMerger(nodes, microbatches)
        self.idle = [TreeOrderReduceScatter(comm, layout, self.reduction.node_count, device, encoding) for _ in range(depth)]
        self.in_flight = deque[tuple[TreeOrderReduceScatter, Tensor, Interval]]()
        sent_numel = len(nodes[comm.rank]) * layout.numel
        self.memory_bytes = sum(each.workspace.nbytes for each in self.idle) + encoding.residual_bytes(sent_numel)

    def reset_residuals(self) -> None:
        self.encoding.reset_residuals()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        if not self.idle:
            self._finish_oldest().wait()  # the gather sends from the workspace
        exchange = self.idle.pop()
        exchange.start(self.reduction, parts, bucket)
        self.in_flight.append((exchange, parts[0], bucket))

    def finish(self) -> None:
        for gather in [self._finish_oldest() for _ in range(len(self.in_flight))]:
            gather.wait()

    def _finish_oldest(self) -> Request:
        """Wait for the sum of this rank's slice, and start to gather those of the other ranks."""
        exchange, sums, bucket = self.in_flight.popleft()
        self.idle.append(exchange)
        (total,) = exchange.finish()
        slices = self.layout.slices(bucket)
        if not self.gather:
            sums.split(slices)[self.comm.rank].copy_(total)
            return Request()
        sent = self.encoding.encode((bucket, "sum"), total)
        if sent.dtype == sums.dtype:
            return self.comm.iall_gather(sent, sums, slices)
        received = torch.empty_like(sums, dtype=sent.dtype)
        request = self.comm.iall_gather(sent, received, slices)

        def finish() -> None:
            request.wait()
            sums.copy_(received)

        return Request(finish)
