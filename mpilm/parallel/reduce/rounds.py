"""Gradient reduction in every round of microbatches; each rank keeps only its shard of the sum (ZeRO-2 and 3).

Rank r of d computes the microbatches r, r + d, r + 2d, ... Backward reduces a round of d microbatches group by group, and each
rank accumulates its slices in the order of the fixed tree (ops/tree.py). So it never holds more of the gradient than one group
and 1 + log2(M/d) shards (Rajbhandari et al., arXiv 1910.02054, section 5).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.ops.tree import Interval, plan_accumulation, strided_assignment
from mpilm.ops.tree_reduce import TreeReduceScatter, TreeReduction, make_encoding
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ReduceGroup
from mpilm.parallel.pipeline.stage import GradientReducer
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT


class RoundReducer(GradientReducer):
    """Collects and reduces the gradient of each of this rank's microbatches.

    Collective over `comm`, the reduce axes, in every backward. A rank without a microbatch in a round calls `join_round`.
    """

    def __init__(self, flat: FlatParameters, model: nn.Module, comm: Comm, microbatches: int, wire_dtype: str = "float32"):
        self.flat, self.comm, self.groups = flat, comm, flat.layout.groups
        self.microbatch_ids = strided_assignment(comm.rank, comm.size, microbatches)
        self.rounds = [_plan_round(first, comm.size, microbatches) for first in range(0, microbatches, comm.size)]
        ops, _ = plan_accumulation([node for each in self.rounds for node in each.remaining], microbatches)
        self.ops = [[ops.pop(0) for _ in each.remaining] for each in self.rounds]
        count = 1 + max(op.buffer for of_round in self.ops for op in of_round)
        self.buffers = [FlatVector.zeros(flat.shard, flat.device) for _ in range(count)]
        self.sums = self.buffers[0]
        self.largest_numel = max(layout.numel for _, layout in flat.layout.spans.values())
        self.group_gradient = torch.zeros(max(group.stop - group.start for group in self.groups), device=flat.device)
        self.encoding = make_encoding(wire_dtype)
        self.exchanges = [
            TreeReduceScatter(comm, flat.layout, comm.size, flat.device, self.encoding) for _ in range(BUCKETS_IN_FLIGHT)
        ]
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.spans}
        self.current: int | None = None
        self.group_of = {name: number for number, group in enumerate(self.groups) for name in group.names}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, group=self.group_of[name]: self._on_gradient(group))

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Memory of the partial sums, of one group's gradient and its exchange, and transiently of one parameter's."""
        sums = sum(buffer.tensor.numel() for buffer in self.buffers)
        workspace = sum(exchange.workspace.nbytes for exchange in self.exchanges)
        exchange = self.group_gradient.nbytes + workspace + self.encoding.residual_bytes(self.flat.layout.numel)
        return {"gradients": 4 * sums, "exchange": exchange, "passing": 4 * self.largest_numel}

    def reset_residuals(self) -> None:
        self.encoding.reset_residuals()

    def begin_microbatch(self, i: int) -> None:
        """Attribute the gradients that follow to this rank's i-th microbatch."""
        self.current, self.next_group = i, 0
        self.remaining = [len(group.names) for group in self.groups]
        for parameter in self.parameters.values():
            parameter.grad = None
        self._open_group(self.groups[0])

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add a gradient computed outside backward, between `begin_microbatch` and `end_microbatch`."""
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._on_gradient(self.group_of[name])

    def _open_group(self, group: ReduceGroup) -> None:
        """Point the group's `.grad`s into the send buffer; copy gradients that arrived before it was free."""
        buffer = self.group_gradient[: group.stop - group.start].zero_()
        for name in group.names:
            at, layout = self.flat.layout.spans[name]
            part = buffer[at - group.start : at - group.start + layout.numel].view(layout.local_shape)
            early, self.parameters[name].grad = self.parameters[name].grad, part
            if early is not None:
                part.add_(early)

    def _on_gradient(self, group_number: int) -> None:
        """Reduce the groups that are complete, in the order that is the same on all ranks."""
        if self.current is None:
            return
        self.remaining[group_number] -= 1
        while self.next_group < len(self.groups) and not self.remaining[self.next_group]:
            group = self.groups[self.next_group]
            self._reduce_group(self.current, group, self.group_gradient[: group.stop - group.start])
            for name in group.names:
                self.parameters[name].grad = None
            self.next_group += 1
            if self.next_group < len(self.groups):
                self._open_group(self.groups[self.next_group])

    def end_microbatch(self, i: int) -> None:
        if self.next_group < len(self.groups):
            raise RuntimeError(f"backward left no gradient for some of {', '.join(self.groups[self.next_group].names)}")
        self.current = None

    def join_round(self, i: int, begin_backward: Callable[[str], None]) -> None:
        """Join a round's collectives without a microbatch. Calls `begin_backward(name)` once per group."""
        for group in self.groups:
            begin_backward(group.names[0])
            self._reduce_group(i, group, None)

    def reduce(self) -> None:
        """Do nothing: every round has been reduced already."""

    def _reduce_group(self, i: int, group: ReduceGroup, gradient: Tensor | None) -> None:
        buckets = self.flat.layout.buckets_of(group)
        for number, bucket in enumerate(buckets):
            if number >= len(self.exchanges):
                self._finish_bucket(i, buckets[number - len(self.exchanges)], self.exchanges[number % len(self.exchanges)])
            parts = [gradient[bucket[0] - group.start : bucket[1] - group.start]] if gradient is not None else []
            self.exchanges[number % len(self.exchanges)].start(self.rounds[i], parts, bucket)
        for number in range(max(0, len(buckets) - len(self.exchanges)), len(buckets)):
            self._finish_bucket(i, buckets[number], self.exchanges[number % len(self.exchanges)])

    def _finish_bucket(self, i: int, bucket: Interval, exchange: TreeReduceScatter) -> None:
        """Finish a bucket and accumulate this rank's slice of it in tree order."""
        start, stop = self.flat.layout.slice(bucket, self.comm.rank)
        nodes = exchange.finish()
        if stop == start:
            return
        views = [buffer.view(start, stop) for buffer in self.buffers]
        for op, node in zip(self.ops[i], nodes):
            views[op.buffer].copy_(node) if op.overwrite else views[op.buffer].add_(node)
            for into, other in op.merges:
                views[into].add_(views[other])


def _plan_round(first: int, ranks: int, microbatches: int) -> TreeReduction:
    return TreeReduction([[(m, m + 1)] if m < microbatches else [] for m in range(first, first + ranks)], microbatches)
