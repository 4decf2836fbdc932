"""The gradient of a stage, summed each round of microbatches, of which a rank keeps its shard alone (ZeRO-2 and 3).

Rank r of d takes the microbatches r, r + d, r + 2d, ...; a round of d of them is exchanged group by group while backward goes
on, and each rank folds its slices in the order of the same fixed tree (parallel/tree.py). So it never has more of the gradient
than one group, and 1 + log2(M/d) shards (Rajbhandari et al., arXiv 1910.02054, section 5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.optim.exchange import Round, TreeExchange
from mpilm.optim.wire import wire_of
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Group, Interval
from mpilm.parallel.tree import dealt, fold


class DealtSum:
    """Collects the gradient of each of this rank's microbatches; the calls are those of BlockSum.

    Collective over `comm`, the data axis, in every backward: a rank without a microbatch in the last round calls `join`.
    """

    def __init__(self, flat: FlatParameters, model: nn.Module, comm: Comm, microbatches: int, wire_dtype: str = "float32"):
        self.flat, self.comm, self.groups = flat, comm, flat.layout.groups
        self.numbers = dealt(comm.rank, comm.size, microbatches)
        self.rounds = [_round(at, comm.size, microbatches) for at in range(0, microbatches, comm.size)]
        folds, _ = fold([node for step in self.rounds for node in step.remaining], microbatches)
        self.folds = [[folds.pop(0) for _ in step.remaining] for step in self.rounds]
        count = 1 + max(f.buffer for theirs in self.folds for f in theirs)
        self.buffers = [FlatVector.zeros(flat.shard, flat.device) for _ in range(count)]
        self.sums = self.buffers[0]
        self.largest = max(layout.numel for _, layout in flat.layout.slots.values())
        self.whole = torch.zeros(max(group.stop - group.start for group in self.groups), device=flat.device)
        self.wire = wire_of(wire_dtype)
        self.exchanges = [TreeExchange(comm, flat.layout, comm.size, flat.device, self.wire) for _ in range(2)]
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.slots}
        self.current: int | None = None
        number_of = {name: number for number, group in enumerate(self.groups) for name in group.names}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, number=number_of[name]: self._arrived(number))
        self.number_of = number_of

    @property
    def held_bytes(self) -> dict[str, int]:
        """Memory of the partial sums, of one group's gradient and its exchange, and, passing, of one parameter's."""
        sums = sum(buffer.tensor.numel() for buffer in self.buffers)
        exchange = (
            self.whole.nbytes
            + sum(exchange.workspace.nbytes for exchange in self.exchanges)
            + self.wire.owed_bytes(self.flat.layout.numel)
        )
        return {"gradients": 4 * sums, "exchange": exchange, "passing": 4 * self.largest}

    def forget(self) -> None:
        """Another state has been loaded."""
        self.wire.forget()

    def begin(self, i: int) -> None:
        """From now on gradients belong to this rank's i-th microbatch."""
        self.current, self.next = i, 0
        self.waiting = [len(group.names) for group in self.groups]
        for parameter in self.parameters.values():
            parameter.grad = None
        self._open(self.groups[0])

    def deliver(self, name: str, gradient: Tensor) -> None:
        """Take a gradient that was computed apart from backward, between `begin` and `end`."""
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._arrived(self.number_of[name])

    def _open(self, group: Group) -> None:
        """Let backward put the gradients of this group where they are sent from; what came early is taken there."""
        whole = self.whole[: group.stop - group.start].zero_()
        for name in group.names:
            at, layout = self.flat.layout.slots[name]
            part = whole[at - group.start : at - group.start + layout.numel].view(layout.shape)
            early, self.parameters[name].grad = self.parameters[name].grad, part
            if early is not None:
                part.add_(early)

    def _arrived(self, number: int) -> None:
        """Exchange the groups that are complete, in the order that is the same on all ranks."""
        if self.current is None:
            return
        self.waiting[number] -= 1
        while self.next < len(self.groups) and not self.waiting[self.next]:
            group = self.groups[self.next]
            self._exchange(self.current, group, self.whole[: group.stop - group.start])
            for name in group.names:
                self.parameters[name].grad = None
            self.next += 1
            if self.next < len(self.groups):
                self._open(self.groups[self.next])

    def end(self, i: int) -> None:
        if self.next < len(self.groups):
            raise RuntimeError(f"backward left no gradient for some of {', '.join(self.groups[self.next].names)}")
        self.current = None

    def join(self, i: int, begin_backward: Callable[[str], None]) -> None:
        """Take part in a round for which this rank has no microbatch; `begin_backward` is told each parameter it comes to."""
        for group in self.groups:
            begin_backward(group.names[0])
            self._exchange(i, group, None)

    def reduce(self) -> None:
        """The sums are complete: each round has been summed when it was there."""

    def _exchange(self, i: int, group: Group, gradient: Tensor | None) -> None:
        buckets = self.flat.layout.buckets_of(group)
        for number, bucket in enumerate(buckets):
            if number >= len(self.exchanges):
                self._fold(i, buckets[number - len(self.exchanges)], self.exchanges[number % len(self.exchanges)])
            parts = [gradient[bucket[0] - group.start : bucket[1] - group.start]] if gradient is not None else []
            self.exchanges[number % len(self.exchanges)].start(self.rounds[i], parts, bucket)
        for number in range(max(0, len(buckets) - len(self.exchanges)), len(buckets)):
            self._fold(i, buckets[number], self.exchanges[number % len(self.exchanges)])

    def _fold(self, i: int, bucket: Interval, exchange: TreeExchange) -> None:
        """Finish a bucket and put this rank's slice of it where the tree wants it."""
        start, stop = self.flat.layout.slice(bucket, self.comm.rank)
        nodes = exchange.finish()
        if stop == start:
            return
        views = [buffer.view(start, stop) for buffer in self.buffers]
        for step, node in zip(self.folds[i], nodes):
            views[step.buffer].copy_(node) if step.fresh else views[step.buffer].add_(node)
            for into, other in step.adds:
                views[into].add_(views[other])


def _round(at: int, ranks: int, microbatches: int) -> Round:
    return Round([[(m, m + 1)] if m < microbatches else [] for m in range(at, at + ranks)], microbatches)
