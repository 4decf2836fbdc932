"""A communicator around a communicator that records calls and can check that all ranks make the same ones."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Counts, Request
from mpilm.comm.flight_recorder import CommCall, FlightRecorder, locate_caller
from mpilm.errors import RanksDisagreeError
from mpilm.formatting import name_ranks


@dataclass
class _Switch:
    """A setting that several communicators share."""

    on: bool


class InstrumentedComm(Comm):
    """Passes every operation on to `inner` and records it in `recorder`. While `checks_calls` is true, each collective first
    compares its operation, dtype, counts and position in the order of calls over the ranks, and raises RanksDisagreeError on
    all of them before any data is touched: plain MPI returns garbage without an error. The communicators that are made from
    this one follow it in that. `world_ranks`: of this communicator's ranks, if it is not the world."""

    def __init__(
        self, inner: Comm, checks_calls: bool = False, recorder: FlightRecorder | None = None, world_ranks: Sequence[int] = ()
    ):
        self.inner, self._checking = inner, _Switch(checks_calls)
        self.name, self.rank, self.size = inner.name, inner.rank, inner.size
        self.mpi_library, self.mpi_details = inner.mpi_library, inner.mpi_details
        self.device_transport = inner.device_transport
        self.is_fault_tolerant = inner.is_fault_tolerant
        self.recorder = recorder or FlightRecorder()
        self.world_ranks = world_ranks or range(inner.size)
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()  # of collectives and messages

    @property
    def checks_calls(self) -> bool:
        return self._checking.on

    @checks_calls.setter
    def checks_calls(self, enabled: bool) -> None:
        self._checking.on = enabled

    def with_options(self, gpu_aware: bool, yield_while_waiting: bool) -> Comm:
        return self._around(self.inner.with_options(gpu_aware, yield_while_waiting))

    def replace_inner(self, op: str, make: Callable[[Comm], Comm]) -> InstrumentedComm:
        """Return this communicator around `make(inner)`, another one of the same ranks. Collective, and recorded as `op`."""
        call = self._record_collective(op)
        return self._around(self.recorder.wait(call, lambda: make(self.inner)))

    def _around(self, inner: Comm) -> InstrumentedComm:
        other = self._derive(inner, self.world_ranks)
        other._counts = self._counts  # the same calls in the order of all ranks
        return other

    def _derive(self, inner: Comm, world_ranks: Sequence[int]) -> InstrumentedComm:
        other = InstrumentedComm(inner, recorder=self.recorder, world_ranks=world_ranks)
        other._checking = self._checking
        return other

    def revoke(self) -> None:
        self.inner.revoke()

    def agree(self, flag: bool) -> bool:
        return self.inner.agree(flag)

    def shrink(self) -> None:
        own = self.world_ranks[self.rank]
        self.inner.shrink()
        self.rank, self.size = self.inner.rank, self.inner.size
        self.world_ranks = self.inner.all_gather_json(own)

    def _record(self, call: CommCall) -> CommCall:
        self.recorder.calls.append(call)
        if call.op != "receive":  # counted where it is sent
            self.calls[call.op] += 1
            self.sent_bytes[call.op] += call.sent_bytes
        return call

    def _record_collective(self, op: str, *arguments: Any, sent_bytes: int = 0) -> CommCall:
        """Record a collective and compare it over the ranks. Messages between two ranks have no place in this order."""
        self._counts["collective"] += 1
        number = self._counts["collective"]
        call = self._record(CommCall(op, self.name, number, self.world_ranks, sent_bytes=sent_bytes))
        if self.checks_calls:
            signature, frame = f"call {number}: {' '.join(map(str, (op, *arguments)))}", sys._getframe()
            self.recorder.wait(call, lambda: self._compare(signature, frame))
        return call

    def _compare(self, signature: str, frame: FrameType) -> None:
        """Raise RanksDisagreeError if other ranks make another call. The line that makes it may be another."""
        digests = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        own = int.from_bytes(blake2b(signature.encode(), digest_size=8).digest(), "little", signed=True)
        self.inner.all_gather(torch.tensor([own], device="cpu"), digests)
        if len(set(digests.tolist())) == 1:
            return
        groups: dict[str, list[int]] = {}
        for rank, other in enumerate(self.inner.all_gather_json(f"{signature} ({locate_caller(frame)})")):
            groups.setdefault(other, []).append(rank)
        rows = sorted(groups.items(), key=lambda row: len(row[1]))
        table = "".join(f"\n  {name_ranks(ranks)}: {call}" for call, ranks in rows)
        raise RanksDisagreeError(f"{self.name}: the ranks do not make the same call:{table}")

    def _record_wait(self, call: CommCall, request: Request) -> Request:
        record = partial(self.recorder.wait, call)
        return Request(partial(record, request.wait), partial(record, request.wait_together))

    def barrier(self) -> None:
        self.recorder.wait(self._record_collective("barrier"), self.inner.barrier)

    def split(self, color: int, key: int, name: str) -> Comm:
        call = self._record_collective("split", name)
        return self._instrument(self.recorder.wait(call, lambda: self.inner.split(color, key, name)))

    def split_node(self, name: str = "node") -> Comm:
        call = self._record_collective("split_node", name)
        return self._instrument(self.recorder.wait(call, lambda: self.inner.split_node(name)))

    def _instrument(self, inner: Comm) -> Comm:
        return self._derive(inner, inner.all_gather_json(self.world_ranks[self.rank]))

    def allocate_shared(self, numel: int) -> list[Tensor] | None:
        call = self._record_collective("allocate_shared")
        return self.recorder.wait(call, lambda: self.inner.allocate_shared(numel))

    def progress(self) -> None:
        self.inner.progress()

    def is_gpu_aware(self, device: torch.device) -> bool:
        return self.inner.is_gpu_aware(device)

    def is_rank_failure(self, error: BaseException) -> bool:
        return self.inner.is_rank_failure(error)

    def abort(self, code: int) -> None:
        self.inner.abort(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        call = self._record_collective("all_reduce", op, x.dtype, x.numel(), sent_bytes=x.nbytes)
        return self._record_wait(call, self.inner._iall_reduce(x, op))

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        call = self._record_collective("all_gather", x.dtype, list(counts), sent_bytes=x.nbytes * (self.size - 1))
        return self._record_wait(call, self.inner._iall_gather(x, out, counts))

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        sent_bytes = (x.numel() - send_counts[self.rank]) * x.element_size()
        call = self._record_collective("all_to_all", x.dtype, sent_bytes=sent_bytes)
        if self.checks_calls:
            everyone = self.inner.all_gather_json([list(send_counts), list(receive_counts)])
            for rank, (_, expected) in enumerate(everyone):
                if (actual := [sent[rank] for sent, _ in everyone]) != expected:
                    problem = f"all_to_all brings rank {rank} {actual} elements, it expects {expected}"
                    raise RanksDisagreeError(f"{self.name}: {problem}")
        return self._record_wait(call, self.inner._iall_to_all(x, out, send_counts, receive_counts))

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        return self._record_wait(self._record_message("send", to, tag, x.nbytes), self.inner._isend(x, to, tag))

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        return self._record_wait(self._record_message("receive", source, tag, out.nbytes), self.inner._irecv(out, source, tag))

    def _record_message(self, op: str, peer: int, tag: int, nbytes: int) -> CommCall:
        self._counts["message"] += 1
        return self._record(CommCall(op, self.name, self._counts["message"], (self.world_ranks[peer],), f"tag {tag}", nbytes))

    def _broadcast(self, x: Tensor, root: int) -> None:
        sent_bytes = x.nbytes if self.rank == root else 0
        call = self._record_collective("broadcast", x.dtype, x.numel(), f"from rank {root}", sent_bytes=sent_bytes)
        self.recorder.wait(call, lambda: self.inner._broadcast(x, root))


def instrument(comm: Comm, checks_calls: bool = False) -> InstrumentedComm:
    """Return `comm` instrumented, with the recorder that it has if it is already."""
    if not isinstance(comm, InstrumentedComm):
        return InstrumentedComm(comm, checks_calls)
    return InstrumentedComm(comm.inner, checks_calls, comm.recorder, comm.world_ranks)
