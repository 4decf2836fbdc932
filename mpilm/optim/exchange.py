"""One bucket's way over the data axis: each rank ends with the sum of its slice, added in tree order.

Ranks exchange slices (all-to-all), and each adds what it received; with a gather of the sums this moves 2 (p-1)/p n elements
a rank, as many as a ring all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.optim.wire import Exact
from mpilm.parallel.shard import Interval
from mpilm.parallel.tree import Range, combine


class Sliced(Protocol):
    """How buckets are cut into a slice for each rank of a communicator."""

    def slices(self, bucket: Interval) -> list[int]:
        """Elements of each rank's slice."""

    @property
    def longest_slice(self) -> int: ...


class Round:
    """Which nodes of the tree each rank brings to an exchange, the additions that they allow, and what remains of them."""

    def __init__(self, nodes: Sequence[Sequence[Range]], microbatches: int):
        in_order = sorted(node for theirs in nodes for node in theirs)
        place = {node: position for position, node in enumerate(in_order)}
        self.counts = [len(theirs) for theirs in nodes]
        self.places = [[place[node] for node in theirs] for theirs in nodes]
        self.adds, self._remaining = combine(in_order, microbatches)
        self.numel = len(in_order)

    @property
    def remaining(self) -> list[Range]:
        """The nodes that each rank has its slice of in the end: the root alone where the nodes cover the tree."""
        return [node for node, _ in self._remaining]

    def results(self, incoming: Sequence[Tensor]) -> list[Tensor]:
        """Add in tree order what came in; returns the slice of each node that remains."""
        for into, other in self.adds:
            incoming[into].add_(incoming[other])
        return [incoming[position] for _, position in self._remaining]

    def total(self, incoming: Sequence[Tensor], out: Tensor) -> None:
        """The same where the root alone remains, which comes to `out`: one of `incoming`, or apart from all of them."""
        for into, other in self.adds[:-1]:
            incoming[into].add_(incoming[other])
        for into, other in self.adds[-1:]:
            torch.add(incoming[into], incoming[other], out=out)
        if not self.adds:
            out.copy_(incoming[0])


class TreeExchange:
    """Exchanges one bucket at a time; `workspace` holds what comes in, of `most` nodes at most. `wire`: what travels."""

    def __init__(self, comm: Comm, layout: Sliced, most: int, device: torch.device, wire: Exact | None = None):
        self.comm, self.layout, self.wire = comm, layout, wire or Exact()
        self.workspace = torch.empty(most * layout.longest_slice, dtype=self.wire.dtype, device=device)
        self.requests: list[Request] = []

    def start(self, step: Round, parts: Sequence[Tensor], bucket: Interval) -> None:
        """Send the slices of this rank's nodes of a bucket, one message to each rank for each node."""
        comm, self.step = self.comm, step
        slices = self.layout.slices(bucket)
        mine, none = slices[comm.rank], [0] * comm.size
        self.incoming = [self.workspace[:0]] * step.numel
        at = 0
        for j in range(max(step.counts)):
            sources = [r for r in range(comm.size) if step.counts[r] > j]
            received = self.workspace[at : at + mine * len(sources)]
            for i, r in enumerate(sources):
                self.incoming[step.places[r][j]] = received[i * mine : (i + 1) * mine]
            at += received.numel()
            x, sends = self.workspace[:0], none
            if j < len(parts):
                x, sends = self.wire.encode((bucket, j), parts[j]), slices
            receives = [mine if step.counts[r] > j else 0 for r in range(comm.size)]
            self.requests.append(comm.iall_to_all(x, received, sends, receives))

    def finish(self) -> list[Tensor]:
        """Wait; returns this rank's slice of each node that remains."""
        while self.requests:
            self.requests.pop(0).wait()
        return self.step.results([x.float() for x in self.incoming])
