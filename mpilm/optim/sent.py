"""The sum of a gradient by messages, bucket by bucket, some of them under way at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.optim.exchange import Round, TreeExchange
from mpilm.parallel.shard import Interval


class Way(Protocol):
    """How the nodes of a tree that ranks have made of their microbatches become one sum."""

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        """This rank's nodes of a bucket are complete: the first of them is where the sum is wanted."""

    def finish(self) -> None:
        """Returns when all sums are there that this rank is to have."""

    @property
    def held_bytes(self) -> int:
        """Memory that it takes for itself."""


class Nothing:
    """There is one rank, whose sum is complete."""

    held_bytes = 0

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None: ...

    def finish(self) -> None: ...


class Bucket(Protocol):
    """One bucket under way."""

    gathering: Request

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None: ...

    def finish(self) -> None: ...

    @property
    def held_bytes(self) -> int: ...


class BucketSum:
    """One bucket's exchange, after which the sum lies in `parts[0]`: this rank's slice of it, or with `gather` all of it."""

    def __init__(self, exchange: TreeExchange, step: Round, gather: bool):
        self.exchange, self.step, self.gather, self.gathering = exchange, step, gather, Request()

    @property
    def held_bytes(self) -> int:
        return self.exchange.workspace.nbytes

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        self.gathering.wait()
        self.parts, self.bucket = parts, bucket
        self.exchange.start(self.step, parts, bucket)

    def finish(self) -> None:
        (total,) = self.exchange.finish()
        comm, sums, wire = self.exchange.comm, self.parts[0], self.exchange.wire
        slices = self.exchange.layout.slices(self.bucket)
        if not self.gather:
            sums.split(slices)[comm.rank].copy_(total)
            return
        sent = wire.encode((self.bucket, "sum"), total)
        out = sums if sent.dtype == sums.dtype else torch.empty_like(sums, dtype=sent.dtype)
        self.gathering = _then(comm.iall_gather(sent, out, slices), lambda: None if out is sums else sums.copy_(out))


def _then(request: Request, action: Callable[[], object]) -> Request:
    def finish() -> None:
        request.wait()
        action()

    return Request(finish)


class LibrarySum:
    """The same by the MPI library's all-reduce."""

    held_bytes = 0

    def __init__(self, comm: Comm):
        self.comm, self.gathering = comm, Request()

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        self.gathering.wait()
        self.gathering = self.comm.iall_reduce(parts[0])

    def finish(self) -> None:
        pass


class SentSum:
    """Buckets one after the other, as many under way as there are `places`."""

    def __init__(self, places: Sequence[Bucket]):
        self.places, self.started = places, 0

    @property
    def held_bytes(self) -> int:
        return sum(place.held_bytes for place in self.places)

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        place = self.places[self.started % len(self.places)]
        if self.started >= len(self.places):
            place.finish()
        place.start(parts, bucket)
        self.started += 1

    def finish(self) -> None:
        for number in range(max(0, self.started - len(self.places)), self.started):
            self.places[number % len(self.places)].finish()
        for place in self.places:
            place.gathering.wait()
        self.started = 0
