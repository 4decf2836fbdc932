"""The gradient of a stage, summed over the microbatches of a step and over the data axis, once a step.

Reproducible: the order of additions is the fixed tree of parallel/tree.py. Each rank folds its contiguous block of
microbatches; the tree is finished from the nodes of all ranks. Otherwise: the MPI library's own all-reduce, whose order is
its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.optim.compressed import CompressedSum
from mpilm.optim.exchange import Round, TreeExchange
from mpilm.optim.sent import Bucket, BucketSum, LibrarySum, Nothing, SentSum, Way
from mpilm.optim.shared import SharedSum, nodes_of
from mpilm.optim.wire import wire_of
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.tree import Fold, block, fold_block

MakeWay = Callable[[FlatVector], Way]
IN_FLIGHT = 2  # buckets under way at once where nothing is to be overlapped


class BlockSum:
    """Collects the gradient of each microbatch of this rank's block, and sums them all (ZeRO-0 and 1).

    Call `begin` before the backward of this rank's i-th microbatch, `end` after it, and `reduce` after the last one.
    `overlap`: start a bucket as soon as the last backward is done with it. `shared`: add in memory that all ranks of a node
    see, where there is some. `wire_dtype`: what is sent. `other`: makes another way to sum, from where the sum of this rank's
    block lies, in which it is one. Collective over `comm`, the data axis.
    """

    def __init__(
        self, flat: FlatParameters, model: nn.Module, comm: Comm, microbatches: int, reproducible: bool = True,
        overlap: bool = False, shared: bool = True, wire_dtype: str = "float32",
        other: MakeWay | None = None,
    ):  # fmt: skip
        self.flat, self.overlap, self.wire = flat, overlap, wire_of(wire_dtype)
        start, stop = block(comm.rank, comm.size, microbatches)
        self.numbers = range(start, stop)
        self.folds = [Fold(0, i == 0, ()) for i in range(stop - start)]
        self.kept = [0]
        if other is not None:
            self.folds, _ = fold_block(0, stop - start, stop - start)
        elif reproducible:
            self.folds, nodes = fold_block(start, stop, microbatches)
            self.kept = list(nodes)
        self.count = 1 + max(f.buffer for f in self.folds)
        self.buckets = flat.layout.buckets
        shared = shared and reproducible and other is None and comm.size > 1 and flat.device.type == "cpu"
        way: Way | None = self._share(comm, microbatches) if shared else None
        self.shared = way is not None
        if way is None:
            self.buffers = [FlatVector.zeros([(0, flat.layout.numel)], flat.device) for _ in range(self.count)]
            if other is not None:
                way = other(self.buffers[0])
            else:
                way = self._send(comm, microbatches, reproducible) if comm.size > 1 else Nothing()
        self.way: Way = way
        self.views = [{name: flat.parameter(name, buffer) for name in flat.layout.slots} for buffer in self.buffers]
        self.sums = self.buffers[0]
        self.parts = {bucket: [self.buffers[b].view(*bucket) for b in self.kept] for bucket in self.buckets}
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.slots}
        self.started = len(self.buckets)
        self.fresh, self.owed = False, dict[str, Tensor]()  # where the first gradients of a buffer have still to be put
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))
        self._watch()

    def _share(self, comm: Comm, microbatches: int) -> SharedSum | None:
        """Put the buffers where all ranks of the node see them; None where there is no such memory. Collective."""
        nodes, numel = nodes_of(comm), self.flat.layout.numel
        if nodes is None:
            return None
        blocks = [fold_block(*block(r, comm.size, microbatches), microbatches) for r in range(comm.size)]
        counts = [1 + max(fold.buffer for fold in folds) for folds, _ in blocks]
        parts = nodes.node.share(self.count * numel)
        if not all(comm.all_gather_json(parts is not None)) or parts is None:
            return None
        here = [counts[rank] for rank in nodes.ranks(nodes.across.rank)]
        buffers = [[part[i * numel : (i + 1) * numel] for i in range(count)] for part, count in zip(parts, here)]
        self.buffers = [FlatVector([(0, numel)], buffer) for buffer in buffers[nodes.node.rank]]
        held = [nodes for _, nodes in blocks]
        return SharedSum(nodes, self.flat.layout, buffers, held, microbatches, self.flat.zero == 0, self.wire)

    def _send(self, comm: Comm, microbatches: int, reproducible: bool) -> SentSum:
        depth = len(self.buckets) if self.overlap else min(IN_FLIGHT, len(self.buckets))
        if not reproducible:
            return SentSum([LibrarySum(comm) for _ in range(depth)])
        nodes = [list(fold_block(*block(r, comm.size, microbatches), microbatches)[1].values()) for r in range(comm.size)]
        step, layout = Round(nodes, microbatches), self.flat.layout
        places: list[Bucket] = [
            BucketSum(TreeExchange(comm, layout, step.numel, self.flat.device, self.wire), step, gather=self.flat.zero == 0)
            for _ in range(depth)
        ]
        return SentSum(places)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Memory of the partial sums, and of what sums them."""
        return {
            "gradients": 4 * sum(b.tensor.numel() for b in self.buffers),
            "exchange": self.way.held_bytes + self.wire.owed_bytes(self._sent_numel()),
        }

    def _sent_numel(self) -> int:
        """Elements that this rank sends in a step."""
        if isinstance(self.way, SharedSum):
            return self.way.sent_numel
        return len(self.kept) * self.flat.layout.numel if isinstance(self.way, SentSum) else 0

    def forget(self) -> None:
        """Another state has been loaded."""
        self.wire.forget()
        if isinstance(self.way, CompressedSum):
            self.way.forget()

    def begin(self, i: int) -> None:
        """Let the next backward put its gradients where the tree wants them: into a fresh buffer they are copied as they come,
        which reads and writes half of what adding them to zeros would."""
        fold = self.folds[i]
        self.fresh, self.into = fold.fresh, self.views[fold.buffer]
        self.owed = dict(self.into) if fold.fresh else {}
        for name, parameter in self.parameters.items():
            parameter.grad = None if fold.fresh else self.into[name]
        if i == len(self.folds) - 1:
            self.started = 0
            self.waiting = list(self.touching)

    def deliver(self, name: str, gradient: Tensor) -> None:
        """Take a gradient that was computed apart from backward, between `begin` and `end`."""
        place = self.owed.pop(name, None)
        if place is None:
            self.into[name].add_(gradient)
        else:
            torch.add(gradient, 0.0, out=place)  # -0.0 becomes 0.0, as where it is added to something

    def _take(self, name: str, parameter: Tensor) -> None:
        """Backward is done with a parameter."""
        if self.fresh and parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            self.deliver(name, gradient.to_dense())

    def end(self, i: int) -> None:
        """Fold the finished gradient; that of the last microbatch is folded bucket by bucket in `reduce`."""
        for place in self.owed.values():  # what this microbatch has not used
            place.zero_()
        self.fresh, self.owed = False, {}
        if i < len(self.folds) - 1:
            self._add(i, 0, self.flat.layout.numel)

    def join(self, i: int, begin_backward: Callable[[str], None]) -> None:
        """A round in which this rank has no microbatch: nothing is exchanged before `reduce`."""

    def reduce(self) -> None:
        """Leave the sum over all microbatches of all ranks in `sums`, in the intervals that `flat.summed` names."""
        while self.started < len(self.buckets):
            self._start_next()
        self.way.finish()

    def _add(self, i: int, start: int, stop: int) -> None:
        for into, other in self.folds[i].adds:
            self.buffers[into].view(start, stop).add_(self.buffers[other].view(start, stop))

    def _start_next(self) -> None:
        bucket = self.buckets[self.started]
        self.started += 1
        self._add(len(self.folds) - 1, *bucket)
        self.way.start(self.parts[bucket], bucket)

    def _watch(self) -> None:
        """Count, for each bucket, the parameters whose gradient it is still waiting for."""
        self.touching = [0] * len(self.buckets)
        self.waiting = list(self.touching)
        for name, (at, layout) in self.flat.layout.slots.items() if self.overlap else ():
            touched = [b for b, (start, stop) in enumerate(self.buckets) if at < stop and at + layout.numel > start]
            for b in touched:
                self.touching[b] += 1
            self.parameters[name].register_post_accumulate_grad_hook(lambda _, touched=touched: self._ready(touched))

    def _ready(self, touched: Sequence[int]) -> None:
        if self.started == len(self.buckets):
            return  # not the last microbatch
        for b in touched:
            self.waiting[b] -= 1
        while self.started < len(self.buckets) and self.waiting[self.started] == 0:
            self._start_next()
