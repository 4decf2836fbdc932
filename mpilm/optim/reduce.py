"""The sum of the microbatch gradients of a step, over this rank's microbatches and over the data axis.

Reproducible: the order of additions is the fixed tree of parallel/tree.py. Ranks exchange slices (all-to-all), each adds
its slice in tree order, the sums are gathered (all-gather): 2 (p-1)/p n elements a rank, as many as a ring all-reduce
moves. Otherwise: the MPI library's own all-reduce, whose order is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm, Request
from mpilm.parallel.flat import ALIGNMENT, FlatParameters
from mpilm.parallel.tree import Fold, Range, block, finish, fold_block

BUCKET = 1 << 20  # elements; 4 MiB stay in the cache between the exchange, the addition and the gather
IN_FLIGHT = 2  # buckets under way at once where nothing is to be overlapped


def slice_counts(numel: int, parts: int) -> list[int]:
    """The aligned slices of a bucket, one a rank; the last ones may be short or empty."""
    each = -(-numel // (parts * ALIGNMENT)) * ALIGNMENT
    return [max(0, min(each, numel - r * each)) for r in range(parts)]


class TreeExchange:
    """One bucket's way through the exchange; `workspace` holds what comes in."""

    def __init__(self, comm: Comm, nodes: Sequence[Sequence[Range]], microbatches: int, device: torch.device):
        self.comm, self.counts = comm, [len(n) for n in nodes]
        self.adds = finish([node for theirs in nodes for node in theirs], microbatches)
        first = [sum(self.counts[:r]) for r in range(comm.size)]
        self.rounds = max(self.counts)
        self.place = {(j, r): first[r] + j for r in range(comm.size) for j in range(self.counts[r])}  # in leaf order
        self.workspace = torch.empty(len(self.place) * slice_counts(BUCKET, comm.size)[0], device=device)
        self.requests: list[Request] = []
        self.gathering = Request()

    def start(self, parts: Sequence[Tensor]) -> None:
        """Send the slices of this rank's partial sums of a bucket, a round for each; `parts[0]` receives the sum."""
        self.gathering.wait()
        self.parts = parts
        self.slices = slice_counts(parts[0].numel(), self.comm.size)
        mine, none = self.slices[self.comm.rank], [0] * self.comm.size
        self.incoming: dict[int, Tensor] = {}
        at = 0
        for j in range(self.rounds):
            sources = [r for r in range(self.comm.size) if self.counts[r] > j]
            received = self.workspace[at : at + mine * len(sources)]
            for i, r in enumerate(sources):
                self.incoming[self.place[j, r]] = received[i * mine : (i + 1) * mine]
            at += received.numel()
            sends = (parts[j], self.slices) if j < len(parts) else (parts[0][:0], none)
            counts = [mine if self.counts[r] > j else 0 for r in range(self.comm.size)]
            self.requests.append(self.comm.iall_to_all(sends[0], received, sends[1], counts))

    def finish(self) -> None:
        """Add the slices in tree order and start to gather the sums."""
        while self.requests:
            self.requests.pop().wait()
        for into, other in self.adds:
            self.incoming[into].add_(self.incoming[other])
        self.gathering = self.comm.iall_gather(self.incoming[0], self.parts[0], self.slices)


class LibraryExchange:
    """The same by the MPI library's all-reduce."""

    def __init__(self, comm: Comm):
        self.comm, self.gathering = comm, Request()

    def start(self, parts: Sequence[Tensor]) -> None:
        self.gathering.wait()
        self.gathering = self.comm.iall_reduce(parts[0])

    def finish(self) -> None:
        pass


class GradientSum:
    """Collects the gradient of each microbatch and sums them all.

    Call `begin` before the backward of this rank's i-th microbatch, `end` after it, and `reduce` after the last one.
    `overlap`: start a bucket as soon as the last backward is done with it. Collective over `comm`, the data axis.
    """

    def __init__(
        self, flat: FlatParameters, model: nn.Module, comm: Comm, microbatches: int, reproducible: bool, overlap: bool
    ):
        self.flat, self.overlap = flat, overlap
        start, stop = block(comm.rank, comm.size, microbatches)
        nodes = [[(r, r + 1)] for r in range(comm.size)]
        self.folds = [Fold(0, i == 0, ()) for i in range(stop - start)]
        if reproducible:
            self.folds, _ = fold_block(start, stop, microbatches)
            nodes = [list(fold_block(*block(r, comm.size, microbatches), microbatches)[1].values()) for r in range(comm.size)]
        self.buffers = [flat.new_gradient() for _ in range(1 + max(fold.buffer for fold in self.folds))]
        self.views = [flat.gradients.views(buffer) for buffer in self.buffers]
        self.kept = list(fold_block(start, stop, microbatches)[1]) if reproducible else [0]
        numel = flat.gradients.numel
        self.buckets = [(at, min(at + BUCKET, numel)) for at in range(0, numel, BUCKET)] if comm.size > 1 else []
        depth = len(self.buckets) if overlap else min(IN_FLIGHT, len(self.buckets))
        self.exchanges: list[TreeExchange | LibraryExchange] = [
            TreeExchange(comm, nodes, microbatches, flat.device) if reproducible else LibraryExchange(comm)
            for _ in range(depth)
        ]
        self.parameters = dict(model.named_parameters())
        self.started = len(self.buckets)
        self._watch()

    @property
    def workspace_bytes(self) -> int:
        """Memory of the exchanges beside the gradient buffers."""
        return sum(e.workspace.numel() * 4 for e in self.exchanges if isinstance(e, TreeExchange))

    def begin(self, i: int) -> None:
        """Let the next backward put its gradients where the tree wants them."""
        fold = self.folds[i]
        if fold.fresh:
            self.buffers[fold.buffer].zero_()
        for name, parameter in self.parameters.items():
            parameter.grad = self.views[fold.buffer][name]
        if i == len(self.folds) - 1:
            self.started = 0
            self.waiting = list(self.touching)

    def end(self, i: int) -> None:
        """Fold the finished gradient; that of the last microbatch is folded bucket by bucket in `reduce`."""
        if i < len(self.folds) - 1:
            self._add(i, 0, self.flat.gradients.numel)

    def reduce(self) -> Tensor:
        """The sum over all microbatches of all ranks, for the owned parameters: flat, in the order of `flat.owned`."""
        while self.started < len(self.buckets):
            self._start_next()
        if not self.buckets:
            self._add(len(self.folds) - 1, 0, self.flat.gradients.numel)
        for number in range(max(0, len(self.buckets) - len(self.exchanges)), len(self.buckets)):
            self.exchanges[number % len(self.exchanges)].finish()
        for exchange in self.exchanges:
            exchange.gathering.wait()
        return self.flat.add_tied(self.buffers[0])

    def _add(self, i: int, start: int, stop: int) -> None:
        for into, other in self.folds[i].adds:
            self.buffers[into][start:stop].add_(self.buffers[other][start:stop])

    def _start_next(self) -> None:
        number = self.started
        self.started += 1
        start, stop = self.buckets[number]
        self._add(len(self.folds) - 1, start, stop)
        exchange = self.exchanges[number % len(self.exchanges)]
        if number >= len(self.exchanges):
            exchange.finish()
        exchange.start([self.buffers[b][start:stop] for b in self.kept])

    def _watch(self) -> None:
        """Count, for each bucket, the parameters whose gradient it is still waiting for."""
        self.touching = [0] * len(self.buckets)
        self.waiting = list(self.touching)
        for name, (at, layout) in self.flat.gradients.slots.items() if self.overlap else ():
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
