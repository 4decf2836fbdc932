"""Ranks as MPI processes. The only file that imports mpi4py; nothing of mpi4py leaves it.

What MPI would do silently and wrong is kept from it here: bf16 travels as 16-bit words and is never reduced, GPU memory
goes through pinned memory unless the user says that the site's MPI takes it, and the world is duplicated so that no
message can meet one of another library.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm.base import Comm, Counts, Request
from mpilm.comm.launcher import end_in_time, end_this_rank_after
from mpilm.comm.shared import share

MOVE = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T}  # by item size
REDUCE = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
OP = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
LOST = [getattr(MPI, f"ERR_{name}", None) for name in ("PROC_FAILED", "PROC_FAILED_PENDING", "REVOKED")]
ULFM = "OMPI_MCA_mpi_ft_enable"  # set by Open MPI's mpirun --with-ft ulfm
LARGEST_COUNT = 2**31 - 1  # Open MPI 5 has no calls with larger ones
LEAVE_S = 60  # for MPI_Finalize, once all ranks have come to it
YIELDS_BEFORE_SLEEP = 200
LONGEST_SLEEP_S = 0.0005


class MpiComm(Comm):
    """One rank of an MPI communicator.

    `gpu_aware`: hand device pointers to MPI. `patient`: give the core away while waiting, for more ranks than cores
    (MPI itself spins, and would take the cores from the ranks that still work).
    """

    def __init__(
        self, comm: MPI.Comm, name: str, gpu_aware: bool = False, patient: bool = False, family: list[MPI.Comm] | None = None
    ):
        self._comm, self.name = comm, name
        self._family = [comm] if family is None else family  # all that were split from one world
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.gpu_aware, self.patient = gpu_aware, patient
        self.mpi_library = library()

    @property
    def mpi_details(self) -> str:  # type: ignore[override]
        levels = ("single", "funneled", "serialized", "multiple")
        return f"{_library_file()}, threads: {levels[MPI.Query_thread()]}"

    def with_options(self, gpu_aware: bool, patient: bool) -> MpiComm:
        """The same communicator with other ways of moving and waiting."""
        return type(self)(self._comm, self.name, gpu_aware, patient, self._family)

    def barrier(self) -> None:
        self._wait(self._comm.Ibarrier())

    def split(self, color: int, key: int, name: str) -> Comm:
        return self._part(self._comm.Split(color, key), name)

    def split_node(self, name: str = "node") -> Comm:
        return self._part(self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank), name)

    def _part(self, comm: MPI.Comm, name: str) -> Comm:
        self._family.append(comm)
        return type(self)(comm, name, self.gpu_aware, self.patient, self._family)

    @property
    def survives(self) -> bool:  # type: ignore[override]
        return os.environ.get(ULFM, "").lower() in ("1", "true") and None not in LOST

    def lost(self, error: BaseException) -> bool:
        return isinstance(error, MPI.Exception) and error.Get_error_class() in LOST

    def shrink(self) -> None:
        for comm in self._family:
            comm.Revoke()
        self._comm = self._comm.Shrink()
        self._family[:] = [self._comm]
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()

    def share(self, numel: int) -> list[Tensor] | None:
        return share(self, numel) if self.split_node().size == self.size else None

    def abort(self, code: int) -> None:
        end_in_time()
        self._comm.Abort(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        host, finish = self._stage(x, x)
        request = self._comm.Iallreduce(MPI.IN_PLACE, _reducible(host), op=OP[op])
        return Request(partial(self._complete, request, finish, host))

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        host_x, _ = self._stage(x, None)
        host_out, finish = self._stage(None, out)
        own = host_out.data_ptr() + sum(counts[: self.rank]) * out.element_size()
        in_place = x.numel() > 0 and host_x.data_ptr() == own  # MPI refuses buffers that overlap
        source = MPI.IN_PLACE if in_place else _movable(host_x)
        request = self._comm.Iallgatherv(source, _movable(host_out, counts))
        return Request(partial(self._complete, request, finish, host_x, host_out))

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        host_x, _ = self._stage(x, None)
        host_out, finish = self._stage(None, out)
        request = self._comm.Ialltoallv(_movable(host_x, send_counts), _movable(host_out, receive_counts))
        return Request(partial(self._complete, request, finish, host_x, host_out))

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        host, _ = self._stage(x, None)
        request = self._comm.Issend(_movable(host), to, tag)
        return Request(partial(self._complete, request, _nothing, host))

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        host, finish = self._stage(None, out)
        request = self._comm.Irecv(_movable(host), source, tag)

        def complete() -> None:
            came = self._wait(request).Get_count(MOVE[host.element_size()])
            if came != host.numel():  # MPI itself takes a shorter message without a word
                raise RuntimeError(f"{self}: received {came} elements from rank {source} into a buffer of {host.numel()}")
            finish()

        return Request(complete)

    def _broadcast(self, x: Tensor, root: int) -> None:
        host, finish = self._stage(x, x)
        flat = host.view(-1)
        for part in flat.split(LARGEST_COUNT) if flat.numel() else (flat,):
            self._wait(self._comm.Ibcast(_movable(part), root))
        finish()

    def _complete(self, request: MPI.Request, finish: Callable[[], object], *buffers: Tensor) -> None:
        """Wait, then bring the result home; `buffers` are named here to live until then."""
        self._wait(request)
        finish()

    def _wait(self, request: MPI.Request) -> MPI.Status:
        status = MPI.Status()
        if not self.patient:
            request.Wait(status)
            return status
        tries = 0
        while not request.Test(status):
            tries += 1
            if tries < YIELDS_BEFORE_SLEEP:
                os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0)
            else:
                time.sleep(min(LONGEST_SLEEP_S, 1e-6 * tries))
        return status

    def _reads(self, tensor: Tensor) -> bool:
        """Whether MPI can read and write this memory itself."""
        return not tensor.is_cuda or self.gpu_aware

    def _stage(self, source: Tensor | None, out: Tensor | None) -> tuple[Tensor, Callable[[], object]]:
        """The memory that MPI is given for `source` or `out`, and what brings the result from there into `out`."""
        tensor = source if source is not None else out
        assert tensor is not None
        if self._reads(tensor):
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()  # MPI reads at once, not in stream order
            return tensor, _nothing
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        if source is not None:
            host.copy_(source)
        return host, (lambda: out.copy_(host)) if out is not None else _nothing


def _nothing() -> None:
    pass


def _memory(x: Tensor) -> MPI.buffer:
    return MPI.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())


def _reducible(x: Tensor) -> list[object]:
    _countable(x)
    return [_memory(x), x.numel(), REDUCE[x.dtype]]


def _movable(x: Tensor, counts: Counts | None = None) -> list[object]:
    """The buffer as words of its item size: any dtype may be moved, bf16 and bool included."""
    _countable(x)
    return [_memory(x), x.numel() if counts is None else list(counts), MOVE[x.element_size()]]


def _countable(x: Tensor) -> None:
    if x.numel() > LARGEST_COUNT:
        raise ValueError(f"one message of {x.numel()} elements; MPI takes {LARGEST_COUNT} at most: cut it into buckets")


def mpi_world() -> MpiComm:
    """A duplicate of MPI's world."""
    return MpiComm(MPI.COMM_WORLD.Dup(), "world")


def library() -> str:
    """The MPI library in use, in a few words."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _library_file() -> str:
    """Where the library was found that is loaded."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if re.match(r"libmpi(ch)?\.so", Path(line.split()[-1]).name):
                return line.split()[-1]
    return "a file that cannot be told"


def finalize(code: int) -> None:
    """Leave MPI in good order; after this no communicator may be used. Where ranks were lost MPI would wait for them: this
    process ends here."""
    if MPI.Is_finalized():
        return
    if os.environ.get(ULFM) and MPI.COMM_WORLD.Get_failed().Get_size():
        os._exit(code)
    together = MPI.COMM_WORLD.Ibarrier()  # some may have work of their own to do, for hours
    while not together.Test():
        time.sleep(LONGEST_SLEEP_S)
    end_this_rank_after(LEAVE_S)  # MPI holds the interpreter lock while it waits for a rank that hangs
    MPI.Finalize()
    signal.alarm(0)
