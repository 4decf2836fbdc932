"""Gradient reduction in every round of microbatches; each rank keeps only its shard of the sum (ZeRO-2 and 3).

Rank r of d computes the microbatches r, r + d, r + 2d, ... Backward reduces a round of d microbatches group by group, and each
rank accumulates its slices in the order of the fixed tree (ops/tree.py). So it never holds more of the gradient than one group
and 1 + log2(M/d) shards (Rajbhandari et al., arXiv 1910.02054, section 5).
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.formatting import name_some
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tree import Interval, TreeNode, count_buffers, plan_accumulation, plan_merges
from mpilm.ops.tree_reduce import TreeMerger, make_encoding
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ReduceGroup
from mpilm.parallel.fsdp import all_gather_shards
from mpilm.parallel.pipeline.stage import GradientReducer
from mpilm.parallel.plan import copy_name, fsdp_unit
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT, Exchange, make_exchanges
from mpilm.parallel.reduce.record import GradientRecord


class MicrobatchRoundReducer(GradientReducer):
    """Collects and reduces the gradient of each of this rank's microbatches. Collective over the ranks of `flat`, in every
    backward. A rank without a microbatch in a round calls `join_round`. With ZeRO 0 the sums are gathered on all ranks.

    `sequence`: each microbatch belongs to the ranks of the context axis together, which are neighbours. The tree adds the
    gradients of their sequence parts before those of microbatches. The copies of an expert have gradients of as many adjacent
    microbatches, which the rank adds as far as the tree allows."""

    def __init__(
        self,
        flat: FlatParameters,
        model: nn.Module,
        microbatches: int,
        wire_dtype: str = "float32",
        sequence: SequenceAxis | None = None,
        halving: bool = False,
    ):
        self.flat, self.comm, self.groups = flat, flat.comm, flat.layout.groups
        nodes, size = ([(0, 1)], 1) if sequence is None else sequence.gradient_nodes()  # of the ranks in a tree of parts
        total = microbatches * size
        leaves = _list_leaves(self.comm.size, flat.copies, microbatches, nodes, size)
        self.leaves = [each[self.comm.rank] for each in leaves]
        self.record: GradientRecord | None = None  # of this step
        self.folds = [plan_merges(each[self.comm.rank], total) for each in leaves]
        remaining = [[[node for node, _ in plan_merges(own, total)[1]] for own in each] for each in leaves]
        reduced = [TreeMerger(each, total).remaining for each in remaining]
        ops, _ = plan_accumulation([node for each in reduced for node in each], total)
        whole = [(0, flat.layout.numel)] if flat.zero == 0 else flat.shard
        self.buffers = [flat.zeros("gradients", flat.shard if i else whole) for i in range(count_buffers(ops))]
        self.ops = [[ops.pop(0) for _ in each] for each in reduced]
        self.sums = self.buffers[0]
        self.memory_bytes = {
            "gradients": sum(buffer.tensor.nbytes for buffer in self.buffers),
            "exchange": 0,
            "passing": 4 * max(layout.numel for _, layout in flat.layout.spans.values()),  # the gradient of one parameter
        }
        self.names = [[[copy_name(name, copy) for name in each.names] for copy in range(flat.copies)] for each in self.groups]
        self.waiting = [set[str]().union(*each) for each in self.names]
        self.parameters = {name: model.get_parameter(name) for each in self.waiting for name in each}
        self.unit_names = [group.names[0] for group in self.groups]
        self.current: int | None = None
        self._prepare_exchange(remaining, total, wire_dtype, halving)
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))

    def _prepare_exchange(
        self, nodes: Sequence[Sequence[Sequence[TreeNode]]], total: int, wire_dtype: str, halving: bool
    ) -> None:
        """Allocate what exchanges need. `nodes`: those that each rank contributes to each round."""
        flat, self.adds_in_stages, self.encoding = self.flat, halving, make_encoding(wire_dtype)
        spans = [(group.start, group.stop) for group in self.groups]
        longest = max(stop - start for start, stop in spans)
        group_gradient = torch.zeros(flat.copies, longest, device=flat.device)  # of each group in turn
        # For each group, one for each copy of its parameters.
        self.gradients = [[FlatVector([span], row[: span[1] - span[0]]) for row in group_gradient] for span in spans]
        most = max(nodes, key=lambda each: sum(map(len, each)))
        self.idle = make_exchanges(BUCKETS_IN_FLIGHT, self.comm, flat.layout, most, flat.device, self.encoding, halving)
        self.rounds = [self.idle[0].plan(each, total) for each in nodes]
        self.in_flight = deque[tuple[Exchange, Interval]]()
        workspace_bytes = sum(exchange.memory_bytes for exchange in self.idle)
        residual_bytes = self.encoding.residual_bytes(flat.copies * flat.layout.numel)
        self.memory_bytes["exchange"] = group_gradient.nbytes + workspace_bytes + residual_bytes
        self.places: dict[str, tuple[int, Tensor, Tensor]] = {}  # of each gradient: its group, elements, and the padding behind
        for i, (group, gradients, copies) in enumerate(zip(self.groups, self.gradients, self.names)):
            for gradient, names in zip(gradients, copies):
                for name, copy in zip(group.names, names):
                    at, stop = flat.layout.padded_span(name)
                    padding = gradient.view(at + flat.layout.spans[name][1].numel, stop)
                    self.places[copy] = i, flat.parameter(name, gradient), padding

    def reset_residuals(self) -> None:
        self.encoding.reset_residuals()

    def begin_microbatch(self, i: int) -> None:
        """Attribute the gradients that follow to this rank's i-th microbatch."""
        self.current, self.next_group = i, 0
        self.complete = set[str]()  # parameters whose gradient has arrived
        for parameter in self.parameters.values():
            parameter.grad = None

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add a gradient computed outside backward, between `begin_microbatch` and `end_microbatch`."""
        parameter = self.parameters[name]
        gradient = gradient.to(parameter.dtype)  # exact: of a 16-bit copy, it was computed in 16 bits
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._on_gradient(name, parameter)

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        """Reduce the groups that are complete, in the order that is the same on all ranks."""
        if self.current is None:
            return
        self.complete.add(name)
        if self.places[name][0] == self.next_group:
            self._move_gradient(name)
        while self.next_group < len(self.groups) and self.complete.issuperset(self.waiting[self.next_group]):
            self._reduce_group(self.current, self.groups[self.next_group], self.gradients[self.next_group])
            self.next_group += 1
            for early in self.waiting[self.next_group] & self.complete if self.next_group < len(self.groups) else ():
                self._move_gradient(early)

    def _move_gradient(self, name: str) -> None:
        """Move a gradient of the group that is next into the send buffer, which was another group's before."""
        _, elements, padding = self.places[name]
        gradient, self.parameters[name].grad = self.parameters[name].grad, None
        assert gradient is not None
        torch.add(gradient, 0.0, out=elements)  # -0.0 becomes 0.0, as it does when it is added to something
        padding.zero_()

    def end_microbatch(self, i: int) -> None:
        if self.next_group < len(self.groups):
            raise RuntimeError(f"backward left no gradient for some of {', '.join(self.groups[self.next_group].names)}")
        self.current = None

    def join_round(self, i: int, begin_backward: Callable[[str], None]) -> None:
        """Join a round's collectives without a microbatch. Calls `begin_backward(name)` once per group."""
        for name, group in zip(self.unit_names, self.groups):
            begin_backward(name)
            self._reduce_group(i, group, [])

    def reduce(self) -> None:
        if self.flat.zero == 0:
            all_gather_shards(self.flat, self.sums)
        if self.record is not None:
            self.record.note_sum(self.sums)

    def _reduce_group(self, i: int, group: ReduceGroup, gradients: Sequence[FlatVector]) -> None:
        merges, remaining = self.folds[i]
        for bucket in group.buckets:
            if not self.idle:
                self._finish_oldest(i)
            exchange = self.idle.pop()
            parts = [gradient.view(*bucket) for gradient in gradients]
            if self.record is not None:
                for node, x in zip(self.leaves[i], parts):
                    self.record.note_leaf(node, bucket[0], x)
            for into, other in merges if parts else ():
                parts[into].add_(parts[other])
            if self.record is not None:
                for node, place in remaining if parts else ():
                    self.record.note_node(node, bucket[0], parts[place])
            exchange.start(self.rounds[i], [parts[place] for _, place in remaining] if parts else [], bucket)
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


class LocalRoundReducer(MicrobatchRoundReducer):
    """The same for a rank that sums alone, such as that of experts which no other rank has: each gradient is added as soon as
    those of all copies of its parameter have arrived."""

    def _prepare_exchange(
        self, nodes: Sequence[Sequence[Sequence[TreeNode]]], total: int, wire_dtype: str, halving: bool
    ) -> None:
        self.views = [{name: self.flat.parameter(name, buffer) for name in self.flat.layout.spans} for buffer in self.buffers]
        self.copies = {name: copies for each in self.names for copies in zip(*each) for name in copies}  # of one parameter
        if self.flat.copies > 1:  # the gradients of a block wait for those of its last copy
            units = Counter[str]()
            for name, (_, layout) in self.flat.layout.spans.items():
                units[fsdp_unit(name)] += layout.numel
            self.memory_bytes["passing"] = 4 * self.flat.copies * max(units.values())

    def reset_residuals(self) -> None:
        """Nothing is sent."""

    def begin_microbatch(self, i: int) -> None:
        super().begin_microbatch(i)
        if self.record is not None:
            for node in self.leaves[i]:
                self.record.note_leaf(node)

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        if self.current is None:
            return
        self.complete.add(name)
        if self.complete.issuperset(self.copies[name]):
            self._add_gradients(self.current, self.copies[name])

    def _add_gradients(self, i: int, copies: Sequence[str]) -> None:
        """Add the gradients of all copies of a parameter in tree order."""
        gradients = list[Tensor]()
        for copy in copies:
            gradient, self.parameters[copy].grad = self.parameters[copy].grad, None
            assert gradient is not None
            gradients.append(gradient.float())
        name, (merges, remaining) = copies[0], self.folds[i]
        at = self.flat.layout.spans[name][0]
        if self.record is not None:
            for node, x in zip(self.leaves[i], gradients):
                self.record.note_leaf(node, at, x)
        for into, other in merges:
            gradients[into].add_(gradients[other])
        for op, (node, place) in zip(self.ops[i], remaining, strict=True):
            if self.record is not None:
                self.record.note_node(node, at, gradients[place])
            total = self.views[op.buffer][name]
            torch.add(gradients[place], 0.0, out=total) if op.overwrite else total.add_(gradients[place])
            for into, other in op.merges:
                self.views[into][name].add_(self.views[other][name])

    def end_microbatch(self, i: int) -> None:
        if missing := [name for name in self.parameters if name not in self.complete]:
            raise RuntimeError(f"backward left no gradient for some of {name_some(missing)}")
        self.current = None

    def join_round(self, i: int, begin_backward: Callable[[str], None]) -> None:
        for name in self.unit_names:
            begin_backward(name)


def _list_leaves(
    ranks: int, copies: int, microbatches: int, nodes: Sequence[TreeNode], size: int
) -> list[list[list[TreeNode]]]:
    """Return the leaves of the gradient tree that each rank has in each round: of as many microbatches as it has `copies`, but
    for the last. `nodes`: of the ranks that share a microbatch, in its tree of `size` leaves."""
    rounds, groups = [], ranks // len(nodes)
    for first in range(0, microbatches, groups * copies):
        blocks = [range(at, min(at + copies, microbatches)) for at in range(first, first + groups * copies, copies)]
        rounds.append([[(m * size + a, m * size + b) for m in block] for block in blocks for a, b in nodes])
    return rounds
