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

from mpilm.comm.base import Comm, Request
from mpilm.optim.exchange import Round, TreeExchange
from mpilm.optim.shared import SharedSum
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.shard import Interval
from mpilm.parallel.tree import Fold, block, fold_block

IN_FLIGHT = 2  # buckets under way at once where nothing is to be overlapped


class BucketSum:
    """One bucket's exchange, after which the sum lies in `parts[0]`: this rank's slice of it, or with `gather` all of it."""

    def __init__(self, exchange: TreeExchange, step: Round, gather: bool):
        self.exchange, self.step, self.gather, self.gathering = exchange, step, gather, Request()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        self.gathering.wait()
        self.parts, self.bucket = parts, bucket
        self.exchange.start(self.step, parts, bucket)

    def finish(self) -> None:
        (total,) = self.exchange.finish()
        comm, sums = self.exchange.comm, self.parts[0]
        slices = self.exchange.layout.slices(self.bucket)
        if self.gather:
            self.gathering = comm.iall_gather(total, sums, slices)
        else:
            sums.split(slices)[comm.rank].copy_(total)


class LibrarySum:
    """The same by the MPI library's all-reduce."""

    def __init__(self, comm: Comm):
        self.comm, self.gathering = comm, Request()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        self.gathering.wait()
        self.gathering = self.comm.iall_reduce(parts[0])

    def finish(self) -> None:
        pass


class BlockSum:
    """Collects the gradient of each microbatch of this rank's block, and sums them all (ZeRO-0 and 1).

    Call `begin` before the backward of this rank's i-th microbatch, `end` after it, and `reduce` after the last one.
    `overlap`: start a bucket as soon as the last backward is done with it. `shared`: add in memory that all ranks see, where
    there is some. Collective over `comm`, the data axis.
    """

    def __init__(
        self, flat: FlatParameters, model: nn.Module, comm: Comm, microbatches: int, reproducible: bool = True,
        overlap: bool = False, shared: bool = True,
    ):  # fmt: skip
        self.flat, self.overlap = flat, overlap
        start, stop = block(comm.rank, comm.size, microbatches)
        self.numbers = range(start, stop)
        self.folds = [Fold(0, i == 0, ()) for i in range(stop - start)]
        self.kept = [0]
        if reproducible:
            self.folds, nodes = fold_block(start, stop, microbatches)
            self.kept = list(nodes)
        shared = shared and reproducible and comm.size > 1 and flat.device.type == "cpu"
        self.shared = self._share(comm, microbatches) if shared else None
        if self.shared is None:
            count = 1 + max(f.buffer for f in self.folds)
            self.buffers = [FlatVector.zeros([(0, flat.layout.numel)], flat.device) for _ in range(count)]
        self.views = [{name: flat.parameter(name, buffer) for name in flat.layout.slots} for buffer in self.buffers]
        self.sums = self.buffers[0]
        self.buckets = flat.layout.buckets if comm.size > 1 and self.shared is None else []
        depth = len(self.buckets) if overlap else min(IN_FLIGHT, len(self.buckets))
        self.exchanges = [self._exchange(comm, microbatches, reproducible) for _ in range(depth)]
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.slots}
        self.started = len(self.buckets)
        self.fresh, self.owed = False, dict[str, Tensor]()  # where the first gradients of a buffer have still to be put
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))
        self._watch()

    def _share(self, comm: Comm, microbatches: int) -> SharedSum | None:
        """Put the buffers where all ranks see them; None where there is no such memory. Collective."""
        numel = self.flat.layout.numel
        blocks = [fold_block(*block(r, comm.size, microbatches), microbatches) for r in range(comm.size)]
        counts = [1 + max(fold.buffer for fold in folds) for folds, _ in blocks]
        parts = comm.share(counts[comm.rank] * numel)
        if parts is None:
            return None
        buffers = [[part[i * numel : (i + 1) * numel] for i in range(count)] for part, count in zip(parts, counts)]
        self.buffers = [FlatVector([(0, numel)], buffer) for buffer in buffers[comm.rank]]
        nodes = [held for _, held in blocks]
        return SharedSum(comm, self.flat.layout, buffers, nodes, microbatches, gather=self.flat.zero == 0)

    def _exchange(self, comm: Comm, microbatches: int, reproducible: bool) -> BucketSum | LibrarySum:
        if not reproducible:
            return LibrarySum(comm)
        nodes = [list(fold_block(*block(r, comm.size, microbatches), microbatches)[1].values()) for r in range(comm.size)]
        step = Round(nodes, microbatches)
        exchange = TreeExchange(comm, self.flat.layout, step.numel, self.flat.device)
        return BucketSum(exchange, step, gather=self.flat.zero == 0)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Memory of the partial sums, and of the exchanges beside them."""
        workspaces = [e.exchange.workspace for e in self.exchanges if isinstance(e, BucketSum)]
        return {
            "gradients": 4 * sum(b.tensor.numel() for b in self.buffers),
            "exchange": 4 * sum(w.numel() for w in workspaces),
        }

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
        if not self.buckets:
            self._add(len(self.folds) - 1, 0, self.flat.layout.numel)
        if self.shared is not None:
            self.shared.reduce()
        for number in range(max(0, len(self.buckets) - len(self.exchanges)), len(self.buckets)):
            self.exchanges[number % len(self.exchanges)].finish()
        for exchange in self.exchanges:
            exchange.gathering.wait()

    def _add(self, i: int, start: int, stop: int) -> None:
        for into, other in self.folds[i].adds:
            self.buffers[into].view(start, stop).add_(self.buffers[other].view(start, stop))

    def _start_next(self) -> None:
        number = self.started
        self.started += 1
        bucket = self.buckets[number]
        self._add(len(self.folds) - 1, *bucket)
        exchange = self.exchanges[number % len(self.exchanges)]
        if number >= len(self.exchanges):
            exchange.finish()
        exchange.start([self.buffers[b].view(*bucket) for b in self.kept], bucket)

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
