"""Reduction across ranks by messages, bucket by bucket, with several buckets in flight."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.ops.recursive_halving import RecursiveHalvingReduceScatter
from mpilm.ops.tree import Interval, TreeNode
from mpilm.ops.tree_reduce import GradientEncoding, Sliceable, TreeOrderReduceScatter
from mpilm.parallel.reduce.step import CrossRankReducer

BUCKETS_IN_FLIGHT = 2  # unless the reduction overlaps with backward
Exchange = Any  # TreeOrderReduceScatter or RecursiveHalvingReduceScatter


def make_exchanges(
    count: int,
    comm: Comm,
    layout: Sliceable,
    nodes: Sequence[Sequence[TreeNode]],
    device: torch.device,
    encoding: GradientEncoding,
    halving: bool,
) -> list[Exchange]:
    """Return so many exchanges of one bucket, to which ranks contribute at most `nodes`. `halving`: by recursive halving, with
    few messages, unless the messages are encoded, which would round each partial sum."""
    if halving and comm.size > 1 and encoding.dtype == torch.float32:
        return [RecursiveHalvingReduceScatter(comm, layout, nodes, device) for _ in range(count)]
    return [TreeOrderReduceScatter(comm, layout, nodes, device, encoding) for _ in range(count)]


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

    can_overlap = True

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
        halving: bool = False,
    ):
        self.comm, self.layout, self.gather, self.encoding, self.adds_in_stages = comm, layout, gather, encoding, halving
        self.idle = make_exchanges(depth, comm, layout, nodes, device, encoding, halving)
        self.reduction = self.idle[0].plan(nodes, microbatches)
        self.in_flight = deque[tuple[Exchange, Tensor, Interval]]()
        sent_numel = len(nodes[comm.rank]) * layout.numel
        self.memory_bytes = sum(each.memory_bytes for each in self.idle) + encoding.residual_bytes(sent_numel)

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
        if self.gather:
            request: Request = exchange.gather(total, sums, bucket)
            return request
        sums.split(self.layout.slices(bucket))[self.comm.rank].copy_(total)
        return Request()
