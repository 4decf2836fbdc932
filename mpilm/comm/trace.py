"""A communicator around a communicator: counts what is said and, when asked, checks that all ranks say the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mpilm.comm.activity import Activity, Call, place
from mpilm.comm.base import Comm, Counts, Request
from mpilm.errors import RanksDisagreeError


class Traced(Comm):
    """Passes every operation on to `inner`. `calls` and `sent_bytes` count by operation; `activity` is told of every call.

    While `check` is true each collective first compares its fingerprint (operation, dtype, counts, position in the
    order of calls) over the ranks, and raises RanksDisagreeError on all of them before any data is touched: plain MPI
    returns garbage without an error. `ranks`: the numbers of this communicator's ranks in the world.
    """

    def __init__(self, inner: Comm, check: bool = False, activity: Activity | None = None, ranks: Sequence[int] | None = None):
        self.inner, self.check = inner, check
        self.name, self.rank, self.size = inner.name, inner.rank, inner.size
        self.mpi_library = inner.mpi_library
        self.activity = activity or Activity()
        self.ranks = range(inner.size) if ranks is None else ranks
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self._collectives = self._messages = 0

    def _record(self, op: str, x: Tensor, sent: int) -> int:
        """Count a call, and the bytes that it sends."""
        self.calls[op] += 1
        self.sent_bytes[op] += sent * x.element_size()
        return sent * x.element_size()

    def _agree(self, op: str, *what: Any, sent: int = 0) -> Call:
        """Count one collective, and compare it over the ranks; messages between two ranks have no place in its order."""
        self._collectives += 1
        call = Call(op, self.name, self._collectives, self.ranks, sent_bytes=sent)
        self.activity.calls.append(call)
        if self.check:
            mine = [self._collectives, op, *map(str, what), f"({place(sys._getframe())})"]
            self.activity.wait(call, lambda: self._compare(mine))
        return call

    def _compare(self, mine: Sequence[Any]) -> None:
        groups: dict[str, list[int]] = {}
        calls = set[str]()
        for rank, theirs in enumerate(self.inner.all_gather_json(mine)):
            groups.setdefault(f"call {theirs[0]}: {' '.join(map(str, theirs[1:]))}", []).append(rank)
            calls.add(str(theirs[:-1]))
        if len(calls) > 1:  # the places are not compared: one call may be made from two
            table = "".join(f"\n  {_ranks(ranks)}: {call}" for call, ranks in sorted(groups.items(), key=lambda g: len(g[1])))
            raise RanksDisagreeError(f"{self.name}: the ranks do not make the same call:{table}")

    def _later(self, call: Call, request: Request) -> Request:
        return Request(partial(self.activity.wait, call, request.wait))

    def barrier(self) -> None:
        self.activity.wait(self._agree("barrier"), self.inner.barrier)

    def split(self, color: int, key: int, name: str) -> Comm:
        self._agree("split", name)
        return self._part(self.inner.split(color, key, name))

    def split_node(self, name: str = "node") -> Comm:
        self._agree("split_node", name)
        return self._part(self.inner.split_node(name))

    def _part(self, inner: Comm) -> Comm:
        ranks = inner.all_gather_json(self.ranks[self.rank])
        return Traced(inner, self.check, self.activity, ranks)

    def share(self, numel: int) -> list[Tensor] | None:
        self._agree("share")
        return self.inner.share(numel)

    def lost(self, error: BaseException) -> bool:
        return self.inner.lost(error)

    def abort(self, code: int) -> None:
        self.inner.abort(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        sent = self._record("all_reduce", x, x.numel())
        call = self._agree("all_reduce", op, x.dtype, x.numel(), sent=sent)
        return self._later(call, self.inner._iall_reduce(x, op))

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        sent = self._record("all_gather", x, x.numel() * (self.size - 1))
        call = self._agree("all_gather", x.dtype, list(counts), sent=sent)
        return self._later(call, self.inner._iall_gather(x, out, counts))

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        sent = self._record("all_to_all", x, x.numel() - send_counts[self.rank])
        call = self._agree("all_to_all", x.dtype, sent=sent)
        if self.check:
            everyone = self.inner.all_gather_json(list(send_counts))
            self._expect([theirs[self.rank] for theirs in everyone], list(receive_counts))
        return self._later(call, self.inner._iall_to_all(x, out, send_counts, receive_counts))

    def _expect(self, coming: list[int], expected: list[int]) -> None:
        verdicts = self.inner.all_gather_json(None if coming == expected else [coming, expected])
        for rank, verdict in enumerate(verdicts):
            if verdict is not None:
                came, wanted = verdict
                raise RanksDisagreeError(f"{self.name}: all_to_all brings rank {rank} {came} elements, it expects {wanted}")

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        sent = self._record("send", x, x.numel())
        return self._later(self._message("send", to, tag, sent), self.inner._isend(x, to, tag))

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        return self._later(self._message("receive", source, tag, out.nbytes), self.inner._irecv(out, source, tag))

    def _message(self, op: str, peer: int, tag: int, sent: int) -> Call:
        self.activity.at(f"p2p.{op}")
        self._messages += 1
        call = Call(op, self.name, self._messages, (self.ranks[peer],), f"tag {tag}", sent)
        self.activity.calls.append(call)
        return call

    def _broadcast(self, x: Tensor, root: int) -> None:
        sent = self._record("broadcast", x, x.numel() if self.rank == root else 0)
        call = self._agree("broadcast", x.dtype, x.numel(), f"from rank {root}", sent=sent)
        self.activity.wait(call, lambda: self.inner._broadcast(x, root))


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
