"""A communicator around a communicator: counts what is said and, when asked, checks that all ranks say the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from mpilm.comm.base import Comm, Counts, Request
from mpilm.errors import RanksDisagreeError


class Traced(Comm):
    """Passes every operation on to `inner`. `calls` and `sent_bytes` count by operation.

    While `check` is true each collective first compares its fingerprint (operation, dtype, counts, position in the
    order of calls) over the ranks, and raises RanksDisagreeError on all of them before any data is touched: plain MPI
    returns garbage without an error.
    """

    def __init__(self, inner: Comm, check: bool = False):
        self.inner, self.check = inner, check
        self.name, self.rank, self.size = inner.name, inner.rank, inner.size
        self.mpi_library = inner.mpi_library
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self._collectives = 0

    def _record(self, op: str, x: Tensor, sent: int) -> None:
        self.calls[op] += 1
        self.sent_bytes[op] += sent * x.element_size()

    def _agree(self, op: str, *what: Any) -> None:
        """Compare one collective over the ranks; messages between two ranks have no place in its order."""
        self._collectives += 1
        if not self.check:
            return
        groups: dict[str, list[int]] = {}
        for rank, theirs in enumerate(self.inner.all_gather_json([self._collectives, op, *map(str, what)])):
            groups.setdefault(f"call {theirs[0]}: {' '.join(map(str, theirs[1:]))}", []).append(rank)
        if len(groups) > 1:
            table = "".join(f"\n  {_ranks(ranks)}: {call}" for call, ranks in sorted(groups.items(), key=lambda g: len(g[1])))
            raise RanksDisagreeError(f"{self.name}: the ranks do not make the same call:{table}")

    def barrier(self) -> None:
        self._agree("barrier")
        self.inner.barrier()

    def split(self, color: int, key: int, name: str) -> Comm:
        self._agree("split", name)
        return Traced(self.inner.split(color, key, name), self.check)

    def split_node(self, name: str = "node") -> Comm:
        self._agree("split_node", name)
        return Traced(self.inner.split_node(name), self.check)

    def share(self, numel: int) -> list[Tensor] | None:
        self._agree("share")
        return self.inner.share(numel)

    def abort(self, code: int) -> None:
        self.inner.abort(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        self._record("all_reduce", x, x.numel())
        self._agree("all_reduce", op, x.dtype, x.numel())
        return self.inner._iall_reduce(x, op)

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        self._record("all_gather", x, x.numel() * (self.size - 1))
        self._agree("all_gather", x.dtype, list(counts))
        return self.inner._iall_gather(x, out, counts)

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        self._record("all_to_all", x, x.numel() - send_counts[self.rank])
        self._agree("all_to_all", x.dtype)
        if self.check:
            everyone = self.inner.all_gather_json(list(send_counts))
            self._expect([theirs[self.rank] for theirs in everyone], list(receive_counts))
        return self.inner._iall_to_all(x, out, send_counts, receive_counts)

    def _expect(self, coming: list[int], expected: list[int]) -> None:
        verdicts = self.inner.all_gather_json(None if coming == expected else [coming, expected])
        for rank, verdict in enumerate(verdicts):
            if verdict is not None:
                came, wanted = verdict
                raise RanksDisagreeError(f"{self.name}: all_to_all brings rank {rank} {came} elements, it expects {wanted}")

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        self._record("send", x, x.numel())
        return self.inner._isend(x, to, tag)

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        return self.inner._irecv(out, source, tag)

    def _broadcast(self, x: Tensor, root: int) -> None:
        self._record("broadcast", x, x.numel() if self.rank == root else 0)
        self._agree("broadcast", x.dtype, x.numel(), f"from rank {root}")
        self.inner._broadcast(x, root)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
