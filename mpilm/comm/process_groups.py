"""Tensors moved by torch.distributed's process groups: gloo for CPUs, NCCL (RCCL) and XCCL for GPUs.

The groups only move bytes, so no library decides in which order numbers are added. A communicator over MPI carries the
rendezvous, reductions, JSON, barriers and the tensors of other devices. It also carries messages between two ranks where the
library matches them by their order alone: NCCL and XCCL have no tags.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from mpilm.comm.addresses import list_own_addresses
from mpilm.comm.base import Comm, Counts, Request, yield_until
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.errors import ConfigError, LostRankError, is_out_of_memory

LIBRARIES = {"cpu": "Gloo", "cuda": "NCCL", "xpu": "XCCL"}  # by type of device; torch's builds for AMD call RCCL NCCL
TIMEOUT = timedelta(days=30)  # of the libraries: the watchdog has the limits that count
STORE_TIMEOUT = timedelta(minutes=5)  # for all ranks to arrive where a group is created
CONNECT_S = 5.0  # for rank 0 to answer under one of its addresses
POLL_S = 2e-5  # between two looks at a pending operation
LOST_RANK_S = 10.0  # for the rank that has failed, or the launcher, to end this one: they know the cause
ADVICE = "write --train.device-transport mpi"


def has_process_groups(device: torch.device) -> bool:
    """Return whether this build of torch has process groups for such devices."""
    library = LIBRARIES.get(device.type)
    return distributed.is_available() and library is not None and hasattr(distributed, f"ProcessGroup{library}")


def connect_process_groups(control: Comm, device: torch.device) -> ProcessGroupComm:
    """Return the ranks of `control` as a communicator that moves the tensors of such devices through process groups.
    Collective; raises CollectiveError if they cannot connect."""
    store = run_on_all_ranks(control, lambda: _host_store() if control.rank == 0 else None)
    addresses, port = control.broadcast_json(store and [list_own_addresses() or ["127.0.0.1"], store.port])
    store = run_on_all_ranks(control, lambda: store or _join_store(addresses, port))
    assert store is not None
    return run_on_all_ranks(control, lambda: _connect(control, device, store))


def _host_store() -> distributed.TCPStore:
    try:
        return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
    except RuntimeError as error:
        problem = f"cannot listen on a port of {socket.gethostname()}: {_first_line(error)}"
        raise ConfigError(f"torch.distributed {problem}; {ADVICE}") from None


def _join_store(addresses: list[str], port: int) -> distributed.TCPStore:
    """Return the store of rank 0, found under the first of its addresses that answers."""
    for address in addresses:
        with contextlib.suppress(OSError, RuntimeError):
            socket.create_connection((address, port), CONNECT_S).close()  # TCPStore itself would try for long
            return distributed.TCPStore(address, port, wait_for_workers=False, timeout=STORE_TIMEOUT)
    places = " or ".join(f"{address}:{port}" for address in addresses)
    raise ConfigError(f"torch.distributed: {socket.gethostname()} cannot reach rank 0 at {places}; {ADVICE}")


def _connect(control: Comm, device: torch.device, store: distributed.Store) -> ProcessGroupComm:
    try:
        return ProcessGroupComm(control, device, store, "world")
    except (RuntimeError, LostRankError) as error:
        problem = f"{LIBRARIES[device.type]} cannot connect the ranks: {_first_line(error)}"
        raise ConfigError(f"torch.distributed: {problem}; {ADVICE}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class ProcessGroupComm(Comm):
    """One rank of `control`, with a process group that moves the tensors of `device`. `path`: the name of the group in `store`,
    which all its ranks share. Collective: the constructor connects the ranks, so no later call has to wait for that."""

    def __init__(self, control: Comm, device: torch.device, store: distributed.Store, path: str):
        self.control, self.device, self._store, self._path = control, device, store, path
        self.name, self.rank, self.size = control.name, control.rank, control.size
        self.mpi_library, self.mpi_details = control.mpi_library, control.mpi_details
        self.device_transport = LIBRARIES[device.type] if self.size > 1 else ""
        self._split_count = 0
        self._group: Any = None
        if self.size > 1:
            self._group = _create_group(device, distributed.PrefixStore(path, store), self.rank, self.size)
            ones = torch.ones(self.size, dtype=torch.uint8, device=device)
            self._iall_to_all(ones, torch.empty_like(ones), [1] * self.size, [1] * self.size).wait()

    def with_options(self, gpu_aware: bool, yield_while_waiting: bool) -> Comm:
        """Return the same ranks over MPI alone."""
        return self.control.with_options(gpu_aware, yield_while_waiting)

    def split(self, color: int, key: int, name: str) -> Comm:
        return self._add_group(self.control.split(color, key, name))

    def split_node(self, name: str = "node") -> Comm:
        return self._add_group(self.control.split_node(name))

    def _add_group(self, control: Comm) -> Comm:
        self._split_count += 1
        leader = control.broadcast_json(self.rank)  # no other part of this split has it
        return ProcessGroupComm(control, self.device, self._store, f"{self._path}/{self._split_count}.{leader}")

    def _can_move(self, x: Tensor) -> bool:
        return self._group is not None and x.device.type == self.device.type

    def _can_send(self, x: Tensor, peer: int) -> bool:
        """Return whether the group can send to this rank. NCCL and XCCL would confuse messages, or wait for each other."""
        return self._can_move(x) and self.device.type == "cpu" and peer != self.rank

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        if not self._can_move(x):
            return self.control._iall_gather(x, out, counts)
        longest = max(counts)
        if not longest:
            return Request()
        parts = _as_bytes(out).split([count * x.element_size() for count in counts])
        if min(counts) == longest:
            return self._request(lambda: self._group.allgather([list(parts)], [_as_bytes(x)]))
        padded = parts[0].new_empty(self.size, longest * x.element_size())  # the libraries gather parts of one length
        own = padded[self.rank].clone()
        own[: x.nbytes] = _as_bytes(x)
        request = self._request(lambda: self._group.allgather([list(padded)], [own]))

        def finish() -> None:
            request.wait()
            for part, received in zip(parts, padded):
                part.copy_(received[: part.numel()])

        return Request(finish)

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        if not self._can_move(x):
            return self.control._iall_to_all(x, out, send_counts, receive_counts)
        sends, receives = ([count * x.element_size() for count in counts] for counts in (send_counts, receive_counts))
        return self._request(lambda: self._group.alltoall_base(_as_bytes(out), _as_bytes(x), receives, sends))

    def _broadcast(self, x: Tensor, root: int) -> None:
        if not self._can_move(x):
            return self.control._broadcast(x, root)
        options = distributed.BroadcastOptions()
        options.rootRank = root
        if x.numel():
            self._request(lambda: self._group.broadcast([_as_bytes(x)], options)).wait()

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        if not self._can_send(x, to):
            return self.control._isend(x, to, tag)
        length = self.control._isend(torch.tensor([x.numel()], device="cpu"), to, tag)  # gloo does not tell it to the receiver
        data = self._request(lambda: self._group.send([_as_bytes(x)], to, tag), is_collective=False) if x.numel() else Request()

        def finish() -> None:
            length.wait()
            data.wait()

        return Request(finish)

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        if not self._can_send(out, source):
            return self.control._irecv(out, source, tag)
        sent = torch.zeros(1, dtype=torch.int64, device="cpu")
        length, data = self.control._irecv(sent, source, tag), Request()
        if out.numel():
            data = self._request(lambda: self._group.recv([_as_bytes(out)], source, tag), is_collective=False)

        def finish() -> None:
            length.wait()
            if int(sent) != out.numel():
                if int(sent):
                    data.wait()  # or gloo would disconnect the ranks
                raise RuntimeError(f"{self}: received {int(sent)} elements from rank {source} into a buffer of {out.numel()}")
            data.wait()

        return Request(finish)

    def _request(self, start: Callable[[], Any], is_collective: bool = True) -> Request:
        """Start an operation of the group. The request keeps its buffers; on GPUs, too, it waits until they can be used."""
        with self._name_lost_rank():
            return Request(partial(self._finish, start(), is_collective, start))

    def _finish(self, work: Any, is_collective: bool, start: object) -> None:
        """Wait. `start` is passed only to keep its buffers alive until then."""
        with self._name_lost_rank():
            if is_collective:  # of the others, gloo does not notice the end before somebody waits
                yield_until(partial(self._has_ended, work), POLL_S)
            work.wait()

    def _has_ended(self, work: Any) -> bool:
        self.control.progress()  # a rank that this one waits for may itself wait for a message over MPI
        return work.is_completed()

    @contextlib.contextmanager
    def _name_lost_rank(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            time.sleep(LOST_RANK_S)
            reason = f"another rank has failed ({self}: {LIBRARIES[self.device.type]}: {_first_line(error)})"
            raise LostRankError(f"{reason}; the same command resumes from the newest checkpoint") from error

    # Over MPI.

    def barrier(self) -> None:
        self.control.barrier()

    def all_gather_json(self, value: Any) -> list[Any]:
        return self.control.all_gather_json(value)

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        return self.control.broadcast_json(value, root)

    def allocate_shared(self, numel: int) -> list[Tensor] | None:
        return self.control.allocate_shared(numel)

    def is_rank_failure(self, error: BaseException) -> bool:
        return self.control.is_rank_failure(error)

    def abort(self, code: int) -> None:
        self.control.abort(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        return self.control._iall_reduce(x, op)


def _create_group(device: torch.device, store: distributed.Store, rank: int, size: int) -> Any:
    """Return a process group that is in no registry: its owner frees it."""
    kind = getattr(distributed, f"ProcessGroup{LIBRARIES[device.type]}")
    if device.type == "cpu":
        return kind(store, rank, size, timeout=TIMEOUT)
    options = kind.Options()
    options._timeout = TIMEOUT
    return kind(store, rank, size, options)


def _as_bytes(x: Tensor) -> Tensor:
    """Return the memory of a tensor as bytes: any dtype can be moved so."""
    return x.view(-1).view(torch.uint8)
