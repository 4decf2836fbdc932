"""The communicator interface, its argument checks, and the communicator of one rank.

Buffers are contiguous, detached tensors of any shape; counts are elements. Every rank of the communicator must call the
collectives in the same order. The communicator's name, such as "data", appears in every message.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

Counts = Sequence[int]
REDUCIBLE = (torch.float32, torch.float64, torch.int32, torch.int64)  # MPI cannot add bf16: exchange it, add in float32
OPS = ("sum", "max", "min")
YIELDS_BEFORE_SLEEP = 200
MAX_SLEEP_S = 0.0005


class Request:
    """A pending operation, which owns its buffers until `wait` returns."""

    def __init__(self, finish: Callable[[], object] = lambda: None, finish_together: Callable[[], object] | None = None):
        self._finish: Callable[[], object] | None = finish
        self._finish_together = finish_together or finish  # the same, for `wait_together`

    def wait(self) -> None:
        """Return when the buffers may be read and written again. A second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def wait_together(self) -> None:
        """Do the same for a collective that all ranks start and wait for at once: until the last has come, they may sleep."""
        if self._finish is not None:
            self._finish = self._finish_together
        self.wait()


class Comm(ABC):
    """A group of ranks that exchange messages. Subclasses implement the methods with a leading underscore."""

    name: str
    rank: int
    size: int
    mpi_library = "no MPI"  # name and version of the library that carries the messages
    mpi_details = ""  # path of that library, and its thread level
    device_transport = ""  # the library that moves tensors, if MPI does not, and how it was chosen
    is_fault_tolerant = False  # the other ranks can continue when one fails
    checks_calls = False  # every collective first compares the calls of all ranks (InstrumentedComm)

    def iall_reduce(self, x: Tensor, op: str = "sum") -> Request:
        """Combine x over the ranks, in place. float32, float64, int32 and int64 only."""
        self._check_buffers("all_reduce", x)
        if x.dtype not in REDUCIBLE or op not in OPS:
            raise TypeError(f"{self}: all_reduce cannot {op} {x.dtype}; exchange it and add in float32")
        return self._iall_reduce(x, op)

    def iall_gather(self, x: Tensor, out: Tensor, counts: Counts | None = None) -> Request:
        """Concatenate the x of all ranks into the flat `out`: `counts[r]` elements of rank r; x may lie in `out` already."""
        counts = self._check_counts("all_gather", counts, out.numel())
        self._check_buffers("all_gather", x, out, (x.numel(), counts[self.rank]), (out.numel(), sum(counts)))
        return self._iall_gather(x, out, counts)

    def iall_to_all(
        self, x: Tensor, out: Tensor, send_counts: Counts | None = None, receive_counts: Counts | None = None
    ) -> Request:
        """Send part r of the flat x to rank r, and receive part r of `out` from rank r."""
        sends = self._check_counts("all_to_all", send_counts, x.numel())
        receives = self._check_counts("all_to_all", receive_counts, out.numel())
        if x.numel() and x.data_ptr() == out.data_ptr():
            raise ValueError(f"{self}: all_to_all into the buffer that it sends from; use another one")
        self._check_buffers("all_to_all", x, out, (x.numel(), sum(sends)), (out.numel(), sum(receives)))
        return self._iall_to_all(x, out, sends, receives)

    def isend(self, x: Tensor, to: int, tag: int = 0) -> Request:
        """Send x to one rank. Messages between two ranks with one tag arrive in order. A send to another rank completes only
        after its receive has started. So a fast rank cannot fill the memory of a slow one, and a program that would hang with
        long messages hangs with short ones too."""
        self._check_buffers("send", x)
        return self._isend(x, self._check_peer("send", to), tag)

    def irecv(self, out: Tensor, source: int, tag: int = 0) -> Request:
        """Receive into `out` from one rank."""
        self._check_buffers("receive", out)
        return self._irecv(out, self._check_peer("receive", source), tag)

    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        self.iall_reduce(x, op).wait_together()

    def all_gather(self, x: Tensor, out: Tensor, counts: Counts | None = None) -> None:
        self.iall_gather(x, out, counts).wait_together()

    def all_to_all(
        self, x: Tensor, out: Tensor, send_counts: Counts | None = None, receive_counts: Counts | None = None
    ) -> None:
        self.iall_to_all(x, out, send_counts, receive_counts).wait()

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        """Copy root's x to every rank, in place."""
        self._check_buffers("broadcast", x)
        self._broadcast(x, self._check_peer("broadcast", root))

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order. For small, rare, JSON-serialisable values."""
        sizes = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        encoded = _encode(value)
        self.all_gather(torch.tensor([encoded.numel()], device="cpu"), sizes)
        counts = sizes.tolist()
        out = torch.empty(sum(counts), dtype=torch.uint8, device="cpu")
        self.all_gather(encoded, out, counts)
        return [_decode(part) for part in out.split(counts)]

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        """Return root's value on every rank. For small, rare, JSON-serialisable values."""
        data = _encode(value if self.rank == root else None)
        size = torch.tensor([data.numel()], device="cpu")
        self.broadcast(size, root)
        if self.rank != root:
            data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        self.broadcast(data, root)
        return _decode(data)

    def progress(self) -> None:  # noqa: B027 - most have nothing to do
        """Let pending operations proceed while this rank waits for something else. MPI makes no progress by itself."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called it."""

    @abstractmethod
    def split(self, color: int, key: int, name: str) -> Comm:
        """Return the communicator of the ranks that pass the same color, ordered by key. Collective."""

    @abstractmethod
    def split_node(self, name: str = "node") -> Comm:
        """Return the communicator of the ranks on this rank's node. Collective."""

    @abstractmethod
    def allocate_shared(self, numel: int) -> list[Tensor] | None:
        """Allocate zeroed float32 memory that every rank can access; return one tensor for each rank. Collective. Each tensor
        has at least the number of elements its rank asked for. After a barrier a rank may read what another has written.
        Returns None on all ranks if they have no common memory."""

    def with_options(self, gpu_aware: bool, yield_while_waiting: bool) -> Comm:
        """Return the same ranks with other transport options, if the implementation has any (MpiComm)."""
        return self

    def is_gpu_aware(self, device: torch.device) -> bool:
        """Return whether the implementation reports that it can read the memory of such devices itself."""
        return False

    def is_rank_failure(self, error: BaseException) -> bool:
        """Return whether `error` means that a peer has failed."""
        return False

    def revoke(self) -> None:
        """Let pending and later operations on this communicator, and on those split from it, raise on all ranks."""
        raise RuntimeError(f"{self}: {self.mpi_library} does not let ranks survive the loss of another")

    def agree(self, flag: bool) -> bool:
        """Return True on all ranks if all have passed True and none has failed, else False on all that survive. Collective over
        the survivors, even if this communicator is revoked."""
        return all(self.all_gather_json(flag))

    def shrink(self) -> None:
        """Shrink to the surviving ranks, keeping their order. Collective over the survivors. Communicators split from this one
        become invalid; pending operations on them raise."""
        raise RuntimeError(f"{self}: {self.mpi_library} does not let ranks survive the loss of another")

    @abstractmethod
    def abort(self, code: int) -> None:
        """End every rank of the job now."""

    @abstractmethod
    def _iall_reduce(self, x: Tensor, op: str) -> Request: ...

    @abstractmethod
    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request: ...

    @abstractmethod
    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request: ...

    @abstractmethod
    def _isend(self, x: Tensor, to: int, tag: int) -> Request: ...

    @abstractmethod
    def _irecv(self, out: Tensor, source: int, tag: int) -> Request: ...

    @abstractmethod
    def _broadcast(self, x: Tensor, root: int) -> None: ...

    def __str__(self) -> str:
        return f"{self.name}@rank {self.rank} of {self.size}"

    # Argument checks. MPI would misread such a buffer and return wrong numbers on every rank without an error.

    def _check_buffers(self, op: str, x: Tensor, out: Tensor | None = None, *lengths: tuple[int, int]) -> None:
        for tensor in (x,) if out is None else (x, out):
            if tensor.requires_grad:
                raise ValueError(f"{self}: {op} of a tensor that requires grad, shape {tuple(tensor.shape)}; detach() it")
            if not tensor.is_contiguous():
                what = f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} that is not contiguous"
                raise ValueError(f"{self}: {op} of {what}; call contiguous() if a copy is acceptable")
        if out is not None and (x.dtype, x.device) != (out.dtype, out.device):
            raise ValueError(f"{self}: {op} from {x.dtype} on {x.device} to {out.dtype} on {out.device}")
        for actual, expected in lengths:
            if actual != expected:
                raise ValueError(f"{self}: {op} of a buffer of {actual} elements, but the counts add up to {expected}")

    def _check_counts(self, op: str, counts: Counts | None, total: int) -> Counts:
        if counts is None:
            if total % self.size:
                raise ValueError(f"{self}: {op} of {total} elements, which {self.size} ranks do not divide; pass the counts")
            return [total // self.size] * self.size
        if len(counts) != self.size:
            raise ValueError(f"{self}: {op} with {len(counts)} counts for {self.size} ranks")
        return counts

    def _check_peer(self, op: str, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(f"{self}: {op} with rank {rank}, which does not exist")
        return rank


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def yield_until(is_done: Callable[[], object], max_sleep_s: float = MAX_SLEEP_S) -> None:
    """Return when `is_done` returns true; yield the core between the calls, longer and longer."""
    tries = 0
    while not is_done():
        tries += 1
        if tries < YIELDS_BEFORE_SLEEP:
            os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0)
        else:
            time.sleep(min(max_sleep_s, 1e-6 * tries))


def unpack_into(parts: Sequence[Tensor], out: Tensor) -> None:
    """Concatenate received parts into `out`; raise RuntimeError if they do not fit."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    if flat.numel() != out.numel() or flat.dtype != out.dtype:
        raise RuntimeError(f"received {flat.numel()} x {flat.dtype} into a buffer of {out.numel()} x {out.dtype}")
    out.view(-1).copy_(flat)


class SelfComm(Comm):
    """A communicator of one rank: every collective is the identity."""

    rank, size = 0, 1

    def __init__(self, name: str = "self"):
        self.name = name
        self._sent: dict[tuple[int, int], Tensor] = {}  # by tag and number
        self._numbers: dict[tuple[str, int], Iterator[int]] = defaultdict(count)  # of messages, by direction and tag

    def barrier(self) -> None:
        pass

    def split(self, color: int, key: int, name: str) -> Comm:
        return SelfComm(name)

    def split_node(self, name: str = "node") -> Comm:
        return SelfComm(name)

    def allocate_shared(self, numel: int) -> list[Tensor] | None:
        return [torch.zeros(numel)]

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        return Request()

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        if x.data_ptr() != out.data_ptr():
            out.view(-1).copy_(x.view(-1))
        return Request()

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        return self._iall_gather(x, out, receive_counts)

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        self._sent[tag, next(self._numbers["send", tag])] = x.clone()
        return Request()

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        key = tag, next(self._numbers["receive", tag])  # a receive takes its place in the order when it starts

        def finish() -> None:
            if key not in self._sent:
                raise RuntimeError(f"{self}: receive with tag {tag}, but nothing was sent with it")
            unpack_into([self._sent.pop(key)], out)

        return Request(finish)

    def _broadcast(self, x: Tensor, root: int) -> None:
        pass
