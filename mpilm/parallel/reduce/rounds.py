"""Gradient reduction in every round of microbatches; each rank keeps only its shard of the sum (ZeRO-2 and 3).

Rank r of d computes the microbatches r, r + d, r + 2d, ... Backward reduces a round of d microbatches group by group, and each
rank accumulates its slices in the order of the fixed tree (ops/tree.py). So it never holds more of the gradient than one group
and 1 + log2(M/d) shards (Rajbhandari et al., arXiv 1910.02054, section 5).
"""

from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tree import Interval, count_buffers, plan_accumulation
from mpilm.ops.tree_reduce import TreeMerger, TreeOrderReduceScatter, make_encoding
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ReduceGroup
from mpilm.parallel.fsdp import all_gather_shards
from mpilm.parallel.pipeline.stage import GradientReducer
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT


class MicrobatchRoundReducer(GradientReducer):
    """Collects and reduces the gradient of each of this rank's microbatches. Collective over `comm`, the reduce axes, in every
    backward. A rank without a microbatch in a round calls `join_round`. With ZeRO 0 the sums are gathered on all ranks.

    `sequence`: each microbatch belongs to the ranks of the context axis together, which are neighbours in `comm`. The tree adds
    the gradients of their sequence parts before those of microbatches."""

    def __init__(
        self,
        flat: FlatParameters,
        model: nn.Module,
        comm: Comm,
        microbatches: int,
        wire_dtype: str = "float32",
        sequence: SequenceAxis | None = None,
    ):
        self.flat, self.comm, self.groups = flat, comm, flat.layout.groups
        nodes, size = ([(0, 1)], 1) if sequence is None else sequence.gradient_nodes()  # of the ranks in a tree of parts
        total = microbatches * size
        leaves = [[(m * size + a, m * size + b)] for m in range(microbatches) for a, b in nodes]
        leaves += [[] for _ in range(-len(leaves) % comm.size)]
        self.rounds = [TreeMerger(leaves[at : at + comm.size], total) for at in range(0, len(leaves), comm.size)]
        ops, _ = plan_accumulation([node for each in self.rounds for node in each.remaining], total)
        whole = [(0, flat.layout.numel)] if flat.zero == 0 else flat.shard
        self.buffers = [FlatVector.zeros(flat.shard if i else whole, flat.device) for i in range(count_buffers(ops))]
        self.ops = [[ops.pop(0) for _ in each.remaining] for each in self.rounds]
        self.sums = self.buffers[0]
        spans = [(group.start, group.stop) for group in self.groups]
        group_gradient = torch.zeros(max(stop - start for start, stop in spans), device=flat.device)  # of each group in turn
        self.gradients = [FlatVector([(start, stop)], group_gradient[: stop - start]) for start, stop in spans]
        self.encoding = make_encoding(wire_dtype)
        self.idle = [
            TreeOrderReduceScatter(comm, flat.layout, comm.size, flat.device, self.encoding) for _ in range(BUCKETS_IN_FLIGHT)
        ]
        self.in_flight = deque[tuple[TreeOrderReduceScatter, Interval]]()
        workspace_bytes = sum(exchange.workspace.nbytes for exchange in self.idle)
        self.memory_bytes = {
            "gradients": sum(buffer.tensor.nbytes for buffer in self.buffers),
            "exchange": group_gradient.nbytes + workspace_bytes + self.encoding.residual_bytes(flat.layout.numel),
            "passing": 4 * max(layout.numel for _, layout in flat.layout.spans.values()),  # the gradient of one parameter
        }
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.spans}
        self.current: int | None = None
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))

    def reset_residuals(self) -> None:
        self.encoding.reset_residuals()

    def begin_microbatch(self, i: int) -> None:
        """Attribute the gradients that follow to this rank's i-th microbatch."""
        self.current, self.next_group = i, 0
        self.complete = set[str]()  # parameters whose gradient has arrived
        for parameter in self.parameters.values():
            parameter.grad = None
        self._open_group()

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add a gradient computed outside backward, between `begin_microbatch` and `end_microbatch`."""
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._on_gradient(name, parameter)

    def _open_group(self) -> None:
        """Point the next group's `.grad`s into the send buffer; copy gradients that arrived before it was free."""
        self.gradients[self.next_group].tensor.zero_()
        for name in self.groups[self.next_group].names:
            parameter, part = self.parameters[name], self.flat.parameter(name, self.gradients[self.next_group])
            early, parameter.grad = parameter.grad, part
            if early is not None:
                part.add_(early)

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        """Reduce the groups that are complete, in the order that is the same on all ranks."""
        if self.current is None:
            return
        self.complete.add(name)
        while self.next_group < len(self.groups) and self.complete.issuperset(self.groups[self.next_group].names):
            group = self.groups[self.next_group]
            self._reduce_group(self.current, group, self.gradients[self.next_group])
            for reduced in group.names:
                self.parameters[reduced].grad = None
            self.next_group += 1
            if self.next_group < len(self.groups):
                self._open_group()

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
        if self.flat.zero == 0:
            all_gather_shards(self.flat.layout, self.sums, self.comm)

    def _reduce_group(self, i: int, group: ReduceGroup, gradient: FlatVector | None) -> None:
        for bucket in group.buckets:
            if not self.idle:
                self._finish_oldest(i)
            exchange = self.idle.pop()
            exchange.start(self.rounds[i], [] if gradient is None else [gradient.view(*bucket)], bucket)
            self.in_flight.append((exchange, bucket))
        while self.in_flight:
            self._finish_oldest(i)

    def _finish_oldest(self, i: int) -> None:
        """Finish a bucket and accumulate this rank's slice of it in tree order."""
        exchange, bucket = self.in_flight.popleft()
        self.idle.append(exchange)
        start, stop = self.flat.layout.slice(bucket, self.comm.rank)
        nodes = exchange.finish()
        if stop == start:
            return
        views = [buffer.view(start, stop) for buffer in self.buffers]
        for op, node in zip(self.ops[i], nodes):
            views[op.buffer].copy_(node) if op.overwrite else views[op.buffer].add_(node)
            for into, other in op.merges:
                views[into].add_(views[other])
