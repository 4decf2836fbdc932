"""What ranks can say to each other: a small interface, the guards on it, and the world of one rank.

Buffers are one-dimensional or not, but always contiguous, detached tensors; counts are elements. Collectives must be
called by every rank of the communicator in the same order. A name such as "data" appears in every message.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Counts = Sequence[int]
REDUCIBLE = (torch.float32, torch.float64, torch.int32, torch.int64)  # bf16 cannot be added by MPI: move it, add in float32
OPS = ("sum", "max", "min")


class Request:
    """Something under way; the buffers belong to it until `wait` returns."""

    def __init__(self, finish: Callable[[], object] = lambda: None):
        self._finish: Callable[[], object] | None = finish

    def wait(self) -> None:
        """Returns when the buffers may be read and written again; a second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Comm(ABC):
    """A group of ranks that talk to each other. Subclasses implement the methods with a leading underscore."""

    name: str
    rank: int
    size: int
    mpi_library = "no MPI"  # what carries the messages, in a few words
    mpi_details = ""  # where its library lies, and what it lets threads do
    survives = False  # whether the other ranks can go on when one is lost
    check = False  # whether every collective first compares the ranks' calls (Traced does)

    # Collectives that start and are waited for later.

    def iall_reduce(self, x: Tensor, op: str = "sum") -> Request:
        """Combine x over the ranks, in place. float32, float64, int32 and int64 only."""
        self._guard("all_reduce", x)
        if x.dtype not in REDUCIBLE or op not in OPS:
            raise TypeError(f"{self}: all_reduce cannot {op} {x.dtype}; exchange it and add in float32")
        return self._iall_reduce(x, op)

    def iall_gather(self, x: Tensor, out: Tensor, counts: Counts | None = None) -> Request:
        """Lay every rank's x one after the other into the flat `out`; `counts[r]` elements come from rank r.

        x may be this rank's own part of `out`.
        """
        counts = self._counts("all_gather", counts, out.numel())
        self._guard("all_gather", x, out, (x.numel(), counts[self.rank]), (out.numel(), sum(counts)))
        return self._iall_gather(x, out, counts)

    def iall_to_all(
        self, x: Tensor, out: Tensor, send_counts: Counts | None = None, receive_counts: Counts | None = None
    ) -> Request:
        """Send the r-th part of the flat x to rank r; part r of `out` comes from rank r."""
        sends = self._counts("all_to_all", send_counts, x.numel())
        receives = self._counts("all_to_all", receive_counts, out.numel())
        if x.numel() and x.data_ptr() == out.data_ptr():
            raise ValueError(f"{self}: all_to_all into the buffer that it sends from; give another one")
        self._guard("all_to_all", x, out, (x.numel(), sum(sends)), (out.numel(), sum(receives)))
        return self._iall_to_all(x, out, sends, receives)

    def isend(self, x: Tensor, to: int, tag: int = 0) -> Request:
        """Send x to one rank. Messages between two ranks with one tag arrive in order.

        Other than to oneself, the send is over only once its receive has begun: a rank cannot run ahead and fill the memory
        of another, and a program that would hang with long messages hangs with short ones too.
        """
        self._guard("send", x)
        return self._isend(x, self._peer("send", to), tag)

    def irecv(self, out: Tensor, source: int, tag: int = 0) -> Request:
        """Receive into `out` from one rank."""
        self._guard("receive", out)
        return self._irecv(out, self._peer("receive", source), tag)

    # The same, finished on return.

    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        self.iall_reduce(x, op).wait()

    def all_gather(self, x: Tensor, out: Tensor, counts: Counts | None = None) -> None:
        self.iall_gather(x, out, counts).wait()

    def all_to_all(
        self, x: Tensor, out: Tensor, send_counts: Counts | None = None, receive_counts: Counts | None = None
    ) -> None:
        self.iall_to_all(x, out, send_counts, receive_counts).wait()

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        """Copy root's x to every rank, in place."""
        self._guard("broadcast", x)
        self._broadcast(x, self._peer("broadcast", root))

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; values are what JSON can hold. For small and rare things."""
        sizes = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        mine = _encode(value)
        self.all_gather(torch.tensor([mine.numel()], device="cpu"), sizes)
        counts = sizes.tolist()
        out = torch.empty(sum(counts), dtype=torch.uint8, device="cpu")
        self.all_gather(mine, out, counts)
        return [_decode(part) for part in out.split(counts)]

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        """Root's value, on every rank; values are what JSON can hold. For small and rare things."""
        data = _encode(value) if self.rank == root else torch.empty(0, dtype=torch.uint8, device="cpu")
        size = torch.tensor([data.numel()], device="cpu")
        self.broadcast(size, root)
        data = data if self.rank == root else torch.empty(int(size), dtype=torch.uint8, device="cpu")
        self.broadcast(data, root)
        return _decode(data)

    @abstractmethod
    def barrier(self) -> None:
        """Returns when every rank has called it."""

    @abstractmethod
    def split(self, color: int, key: int, name: str) -> Comm:
        """The communicator of the ranks that give the same color, ordered by key. Collective."""

    @abstractmethod
    def split_node(self, name: str = "node") -> Comm:
        """The communicator of the ranks that share this rank's memory. Collective."""

    @abstractmethod
    def share(self, numel: int) -> list[Tensor] | None:
        """Memory that every rank sees: float32, zero, a part for each rank, of as many elements as that rank asks for (or a few
        more). What a rank has written there another may read after a barrier. None on all ranks where they have no memory
        together. Collective."""

    def with_options(self, gpu_aware: bool, patient: bool) -> Comm:
        """The same ranks with other ways of moving and waiting, where the implementation has any (see MpiComm)."""
        return self

    def lost(self, error: BaseException) -> bool:
        """Whether an error of this world says that a rank is not there any more."""
        return False

    def shrink(self) -> None:
        """Become the communicator of the ranks that are left, in their order. All that was split from it is of no use any more:
        whoever waits there is woken by an error. Collective over those who are left."""
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

    # Guards. A buffer that MPI would misread gives wrong numbers on every rank without an error, so it is refused here.

    def _guard(self, op: str, x: Tensor, out: Tensor | None = None, *lengths: tuple[int, int]) -> None:
        for tensor in (x,) if out is None else (x, out):
            if tensor.requires_grad:
                raise ValueError(f"{self}: {op} of a tensor that requires grad, shape {tuple(tensor.shape)}; detach() it")
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{self}: {op} of a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
                    "that is not contiguous; call contiguous() where the copy is wanted"
                )
        if out is not None and (x.dtype, x.device) != (out.dtype, out.device):
            raise ValueError(f"{self}: {op} from {x.dtype} on {x.device} to {out.dtype} on {out.device}")
        for have, want in lengths:
            if have != want:
                raise ValueError(f"{self}: {op} of a buffer of {have} elements where the counts say {want}")

    def _counts(self, op: str, counts: Counts | None, total: int) -> Counts:
        if counts is None:
            if total % self.size:
                raise ValueError(f"{self}: {op} of {total} elements, which do not divide by {self.size} ranks; give the counts")
            return [total // self.size] * self.size
        if len(counts) != self.size:
            raise ValueError(f"{self}: {op} with {len(counts)} counts for {self.size} ranks")
        return counts

    def _peer(self, op: str, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(f"{self}: {op} with rank {rank}, which does not exist")
        return rank


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def lay(parts: Sequence[Tensor], out: Tensor) -> None:
    """Put what was received, one part after the other, into `out`."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    if flat.numel() != out.numel() or flat.dtype != out.dtype:
        raise RuntimeError(f"received {flat.numel()} x {flat.dtype} into a buffer of {out.numel()} x {out.dtype}")
    out.view(-1).copy_(flat)


class SelfComm(Comm):
    """The world of one rank: nothing travels, the meaning stays."""

    rank, size = 0, 1

    def __init__(self, name: str = "self"):
        self.name = name
        self._sent: dict[tuple[int, int], Tensor] = {}
        self._messages: Counter[tuple[str, int]] = Counter()

    def barrier(self) -> None:
        pass

    def split(self, color: int, key: int, name: str) -> Comm:
        return SelfComm(name)

    def split_node(self, name: str = "node") -> Comm:
        return SelfComm(name)

    def share(self, numel: int) -> list[Tensor] | None:
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
        self._sent[self._message("send", tag)] = x.clone()
        return Request()

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        key = self._message("receive", tag)

        def finish() -> None:
            if key not in self._sent:
                raise RuntimeError(f"{self}: receive with tag {tag}, and nothing was sent with it")
            lay([self._sent.pop(key)], out)

        return Request(finish)

    def _message(self, way: str, tag: int) -> tuple[int, int]:
        """The tag, and which message with this tag: a receive takes its place in the order when it starts."""
        self._messages[way, tag] += 1
        return tag, self._messages[way, tag]

    def _broadcast(self, x: Tensor, root: int) -> None:
        pass
