"""Ranks as MPI processes. The only file that imports mpi4py; no mpi4py object leaves it.

It guards against errors that MPI makes silently: bf16 is sent as 16-bit words and never reduced, GPU memory is staged through
pinned memory unless the user declares the site's MPI GPU-aware, and the world is duplicated so that no message can match one
of another library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor

from mpilm.comm.base import MAX_SLEEP_S, Comm, Counts, Request, yield_until
from mpilm.comm.node_barrier import SEMAPHORE_NUMEL, NodeBarrier
from mpilm.comm.processes import LAUNCHERS, find_ancestor, kill_later, lengthen_time_slice
from mpilm.comm.shared_memory import map_shared_memory

MOVE_TYPES = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T}  # by item size
REDUCE_TYPES = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T}
GPU_KINDS = {"cuda": ("cuda",), "xpu": ("ze",)}  # as functions of MPICH and Open MPI name them, by torch's device type
REDUCE_OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
FAILURE_CLASSES = [getattr(MPI, f"ERR_{name}", None) for name in ("PROC_FAILED", "PROC_FAILED_PENDING", "REVOKED")]
ULFM_VARIABLE = "OMPI_MCA_mpi_ft_enable"  # set by Open MPI's mpirun --with-ft ulfm
MAX_COUNT = 2**31 - 1  # Open MPI 5 has no calls with larger counts
FINALIZE_TIMEOUT_S = 60  # for MPI_Finalize, once all ranks have reached it
RANK_TIMEOUT_S = 5  # for MPI_Abort to end this rank
LAUNCHER_TIMEOUT_S = 60  # for the launcher to exit: it first notifies the other hosts


class MpiComm(Comm):
    """One rank of an MPI communicator. `gpu_aware`: pass device pointers to MPI. `yield_while_waiting`: yield the core while
    waiting, for more ranks than cores; MPI itself spins, and would take the core from a rank that still computes."""

    def __init__(self, comm: MPI.Comm, name: str):
        self._comm, self.name, self.rank, self.size = comm, name, comm.Get_rank(), comm.Get_size()
        self._family = [comm]  # all communicators split from one world, to be revoked together
        self.gpu_aware = self.yield_while_waiting = self._has_node_barrier = False
        self._node_barrier: NodeBarrier | None = None
        self.mpi_library = mpi_library_name()
        self.is_fault_tolerant = os.environ.get(ULFM_VARIABLE, "").lower() in ("1", "true") and None not in FAILURE_CLASSES

    @property
    def mpi_details(self) -> str:  # type: ignore[override]
        levels = ("single", "funneled", "serialized", "multiple")
        return f"{_library_path()}, threads: {levels[MPI.Query_thread()]}"

    def with_options(self, gpu_aware: bool, yield_while_waiting: bool) -> MpiComm:
        other = self._copy()
        other.gpu_aware, other.yield_while_waiting = gpu_aware, yield_while_waiting
        if yield_while_waiting:
            lengthen_time_slice()
        return other

    def _copy(self) -> MpiComm:
        other = copy(self)
        other._node_barrier, other._has_node_barrier = None, False
        return other

    def barrier(self) -> None:
        self._sleep()
        if self._node_barrier is None:
            self._wait(self._comm.Ibarrier())

    def _collective(self, finish: Callable[[], object]) -> Request:
        """Return the request of a collective that no rank can complete before all have started it."""

        def finish_together() -> None:
            self._sleep()
            finish()

        return Request(finish, finish_together)

    def _sleep(self) -> None:
        """Sleep until all ranks call this, if they share a node and its cores; otherwise do nothing. The others are not woken
        by a rank that fails, so ranks that outlive one do not sleep."""
        if not self.yield_while_waiting or self.size == 1 or self.is_fault_tolerant:
            return
        if not self._has_node_barrier:
            self._has_node_barrier = True  # before the calls that follow, which come here again
            if (memory := self.allocate_shared(SEMAPHORE_NUMEL)) is not None:
                barrier = NodeBarrier(self.rank, memory, self.progress)
                self._wait(self._comm.Ibarrier())
                self._node_barrier = barrier
        if self._node_barrier is not None:
            self._node_barrier.wait()

    def split(self, color: int, key: int, name: str) -> Comm:
        return self._wrap(self._comm.Split(color, key), name)

    def split_node(self, name: str = "node") -> Comm:
        return self._wrap(self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank), name)

    def _wrap(self, comm: MPI.Comm, name: str) -> Comm:
        self._family.append(comm)
        other = self._copy()
        other._comm, other.name, other.rank, other.size = comm, name, comm.Get_rank(), comm.Get_size()
        return other

    def is_rank_failure(self, error: BaseException) -> bool:
        is_unreadable = "process_vm_readv failed (errno 3)" in str(error)  # MPICH copies from a process that no longer exists
        if not isinstance(error, MPI.Exception):
            return False
        if is_unreadable or error.Get_error_class() in FAILURE_CLASSES:
            return True
        return self.is_fault_tolerant and any(comm.Is_revoked() for comm in self._family)  # which has many faces

    def revoke(self) -> None:
        for comm in self._family:
            comm.Revoke()

    def agree(self, flag: bool) -> bool:
        try:
            return bool(self._comm.Agree(int(flag)))
        except MPI.Exception:  # the same on all ranks
            return False

    def shrink(self) -> None:
        self.revoke()
        self._comm = self._comm.Shrink()
        self._family[:] = [self._comm]
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()

    def allocate_shared(self, numel: int) -> list[Tensor] | None:
        return map_shared_memory(self, numel) if self.split_node().size == self.size else None

    def progress(self) -> None:
        self._comm.Iprobe()

    def is_gpu_aware(self, device: torch.device) -> bool:
        kinds = ("hip", "rocm") if torch.version.hip else GPU_KINDS.get(device.type, ())  # torch calls AMD's devices cuda, too
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(_library_path())
            return any(query() for kind in kinds if (query := getattr(library, f"MPIX_Query_{kind}_support", None)))
        return False

    def abort(self, code: int) -> None:
        force_exit()
        self._comm.Abort(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        host = self._host_buffer(x)
        numbers = [_memory(host), host.numel(), REDUCE_TYPES[host.dtype]]
        request = self._comm.Iallreduce(MPI.IN_PLACE, numbers, op=REDUCE_OPS[op])
        return self._collective(partial(self._complete, request, host, x))

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        host_x, host_out = self._host_buffer(x), self._host_buffer(out, copy=False)
        own_address = host_out.data_ptr() + sum(counts[: self.rank]) * out.element_size()
        in_place = x.numel() > 0 and host_x.data_ptr() == own_address  # MPI refuses buffers that overlap
        source = MPI.IN_PLACE if in_place else _as_words(host_x)
        request = self._comm.Iallgatherv(source, _as_words(host_out, counts))
        return self._collective(partial(self._complete, request, host_out, out, host_x))

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        host_x, host_out = self._host_buffer(x), self._host_buffer(out, copy=False)
        request = self._comm.Ialltoallv(_as_words(host_x, send_counts), _as_words(host_out, receive_counts))
        return Request(partial(self._complete, request, host_out, out, host_x))

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        host = self._host_buffer(x)
        request = self._comm.Issend(_as_words(host), to, tag)
        return Request(partial(self._complete, request, host, host))

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        host = self._host_buffer(out, copy=False)
        request = self._comm.Irecv(_as_words(host), source, tag)

        def complete() -> None:
            received = self._complete(request, host, out).Get_count(MOVE_TYPES[host.element_size()])
            if received != host.numel():  # MPI accepts a shorter message silently
                raise RuntimeError(f"{self}: received {received} elements from rank {source} into a buffer of {host.numel()}")

        return Request(complete)

    def _broadcast(self, x: Tensor, root: int) -> None:
        host = self._host_buffer(x)
        for part in host.view(-1).split(MAX_COUNT):
            self._wait(self._comm.Ibcast(_as_words(part), root))
        if host is not x:
            x.copy_(host)

    def _complete(self, request: MPI.Request, host: Tensor, out: Tensor, *sources: Tensor) -> MPI.Status:
        """Wait, then copy the result from `host` to `out`. `sources` are passed only to keep them alive until then."""
        status = self._wait(request)
        if host is not out:
            out.copy_(host)
        return status

    def _wait(self, request: MPI.Request) -> MPI.Status:
        status = MPI.Status()
        if self.yield_while_waiting:
            yield_until(lambda: request.Test(status))
        else:
            request.Wait(status)
        return status

    def _can_read(self, tensor: Tensor) -> bool:
        """Return whether MPI can read and write this memory itself."""
        return tensor.device.type == "cpu" or self.gpu_aware

    def _host_buffer(self, tensor: Tensor, copy: bool = True) -> Tensor:
        """Return the memory to pass to MPI for a tensor: its own, or a host buffer, with its values if `copy` is true."""
        if self._can_read(tensor):
            if tensor.device.type != "cpu":  # MPI reads at once, not in stream order
                torch.get_device_module(tensor.device).current_stream(tensor.device).synchronize()
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type != "cpu")
        return host.copy_(tensor) if copy else host


def _memory(x: Tensor) -> MPI.buffer:
    if x.numel() > MAX_COUNT:
        raise ValueError(f"one message of {x.numel()} elements; MPI takes at most {MAX_COUNT}: split it into buckets")
    return MPI.buffer.fromaddress(x.data_ptr(), x.nbytes)


def _as_words(x: Tensor, counts: Counts | None = None) -> list[object]:
    """Describe a buffer as words of its item size: any dtype can be moved so, bf16 and bool included."""
    return [_memory(x), x.numel() if counts is None else list(counts), MOVE_TYPES[x.element_size()]]


def mpi_world() -> MpiComm:
    return MpiComm(MPI.COMM_WORLD.Dup(), "world")


def mpi_library_name() -> str:
    """Return name and version of the MPI library in use."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _library_path() -> str:
    """Return the file from which the MPI library was loaded."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if re.match(r"libmpi(ch)?\.so", Path(line.split()[-1]).name):
                return line.split()[-1]
    return "an unknown file"


def finalize(code: int) -> None:
    """Finalize MPI. If ranks have failed, MPI would wait for them: this process exits here with `code`, and its launcher, which
    waits for hosts that cannot be reached, is killed later."""
    if MPI.Is_finalized():
        return
    if os.environ.get(ULFM_VARIABLE) and MPI.COMM_WORLD.Get_failed().Get_size():
        _kill_launcher_later()
        os._exit(code)
    barrier = MPI.COMM_WORLD.Ibarrier()  # other ranks may still work for hours
    while not barrier.Test():
        time.sleep(MAX_SLEEP_S)
    exit_after(FINALIZE_TIMEOUT_S)  # MPI holds the interpreter lock while it waits for a hanging rank
    MPI.Finalize()
    signal.alarm(0)


def force_exit() -> None:
    """Let this rank and its launcher exit soon; call before MPI_Abort. A kernel timer ends the rank, since MPI_Abort may hold
    the interpreter lock. A process kills a launcher of this host: else the job would last until its time limit."""
    exit_after(RANK_TIMEOUT_S)
    _kill_launcher_later()


def _kill_launcher_later() -> None:
    if (pid := find_ancestor(LAUNCHERS)) is not None:
        kill_later(pid, LAUNCHER_TIMEOUT_S)


def exit_after(seconds: int) -> None:
    """Let the kernel end this rank after so many seconds. `signal.alarm(0)` cancels it."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
