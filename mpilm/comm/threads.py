"""Ranks as threads of one process: for tests, which then take milliseconds instead of the seconds of mpirun."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Counts, Request, lay

R = TypeVar("R")
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class PeerFailedError(RuntimeError):
    """Another rank has raised, so what this rank waits for will never come."""


class _World:
    """What the threads share: a board of notes, and whether a rank has failed."""

    def __init__(self, timeout_s: float, ranks_per_node: int):
        self.ranks_per_node = ranks_per_node
        self.changed = threading.Condition()
        self.board: dict[Any, Any] = {}
        self.taken: dict[Any, int] = defaultdict(int)
        self.failed: str | None = None
        self.timeout_s = timeout_s

    def post(self, key: Any, value: Any) -> None:
        with self.changed:
            self.board[key] = value
            self.changed.notify_all()

    def take(self, key: Any, takers: int) -> Any:
        """The note under `key`, once it is there; gone after `takers` have read it."""
        with self.changed:
            there = self.changed.wait_for(lambda: self.failed or key in self.board, self.timeout_s)
            if self.failed:
                raise PeerFailedError(self.failed)
            if not there:
                raise TimeoutError(f"nothing came within {self.timeout_s} s for {key}")
            value = self.board[key]
            self.taken[key] += 1
            if self.taken[key] == takers:
                del self.board[key], self.taken[key]
            return value

    def fail(self, why: str) -> None:
        with self.changed:
            self.failed = self.failed or why
            self.changed.notify_all()


class ThreadComm(Comm):
    """One rank of a group of threads. Sent data is copied when the operation starts."""

    def __init__(self, world: _World, group: tuple[int, ...], rank: int, name: str, path: tuple[Any, ...] = ()):
        self._world, self._group, self._path = world, group, path
        self.rank, self.size, self.name = rank, len(group), name
        self._calls = 0
        self._messages: dict[Any, int] = defaultdict(int)

    def _share(self, op: str, value: Any) -> Callable[[], list[Any]]:
        """Post this rank's part of a collective; the returned function waits for everybody's."""
        call = self._calls
        self._calls += 1
        key = (self._path, self._group, call)
        self._world.post((*key, self.rank), (op, value))

        def collect() -> list[Any]:
            notes = [self._world.take((*key, r), self.size) for r in range(self.size)]
            for r, (theirs, _) in enumerate(notes):
                if theirs != op:
                    raise RuntimeError(f"{self}: call {call} is {op} here and {theirs} on rank {r}")
            return [value for _, value in notes]

        return collect

    def barrier(self) -> None:
        self._share("barrier", None)()

    def split(self, color: int, key: int, name: str) -> Comm:
        parts = self._share(f"split {name}", (color, key))()
        members = sorted((k, r) for r, (c, k) in enumerate(parts) if c == color)
        ranks = [r for _, r in members]
        path = (*self._path, self._calls, color)
        return ThreadComm(self._world, tuple(self._group[r] for r in ranks), ranks.index(self.rank), name, path)

    def split_node(self, name: str = "node") -> Comm:
        return self.split(self._node(self._group[self.rank]), self.rank, name)

    def _node(self, rank: int) -> int:
        return rank // self._world.ranks_per_node

    def share(self, numel: int) -> list[Tensor] | None:
        together = len({self._node(rank) for rank in self._group}) == 1
        parts = self._share("share", torch.zeros(numel))()
        return parts if together else None

    def abort(self, code: int) -> None:
        self._world.fail(f"rank {self.rank} aborted with {code}")
        raise SystemExit(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        collect = self._share(f"all_reduce {op} {x.dtype} {x.numel()}", x.clone())
        combine = COMBINE[op]

        def finish() -> None:
            parts = collect()
            total = parts[0].clone()
            for part in parts[1:]:
                total = combine(total, part)
            x.copy_(total)

        return Request(finish)

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        collect = self._share(f"all_gather {x.dtype} {list(counts)}", x.clone())
        return Request(lambda: lay(collect(), out))

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        collect = self._share(f"all_to_all {x.dtype}", x.clone().view(-1).split(list(send_counts)))

        def finish() -> None:
            parts = [parts[self.rank] for parts in collect()]
            if [part.numel() for part in parts] != list(receive_counts):
                raise RuntimeError(f"{self}: all_to_all receives {[p.numel() for p in parts]}, expected {list(receive_counts)}")
            lay(parts, out)

        return Request(finish)

    def _message(self, way: str, source: int, to: int, tag: int) -> Any:
        """The key of the next message on this way; each end counts for itself, also where both ends are one rank."""
        self._messages[way, source, to, tag] += 1
        return (self._path, self._group, "message", source, to, tag, self._messages[way, source, to, tag])

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        key = self._message("send", self.rank, to, tag)
        self._world.post(key, x.clone())
        return Request(partial(self._world.take, (*key, "begun"), 1)) if to != self.rank else Request()

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        key = self._message("receive", source, self.rank, tag)
        if source != self.rank:
            self._world.post((*key, "begun"), None)
        return Request(lambda: lay([self._world.take(key, 1)], out))

    def _broadcast(self, x: Tensor, root: int) -> None:
        parts = self._share(f"broadcast from {root} {x.dtype} {x.numel()}", x.clone() if self.rank == root else None)()
        x.copy_(parts[root].view_as(x))


def run_ranks(
    size: int, body: Callable[[Comm], R], timeout_s: float = 60.0, ranks_per_node: int = 0
) -> list[R]:  # fmt: skip
    """Call `body(comm)` on `size` ranks, each a thread, and return their results in rank order.

    `ranks_per_node`: as if only so many shared a memory; 0: all. The exception of the first rank that fails is raised here,
    with the rank in its notes; the others are released.
    """
    world = _World(timeout_s, ranks_per_node or size)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = body(ThreadComm(world, tuple(range(size)), rank, "world"))
        except BaseException as error:  # whatever ended a rank is raised again below
            errors.append((rank, error))
            world.fail(f"rank {rank} raised {type(error).__name__}: {error}")

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error = next(((r, e) for r, e in errors if not isinstance(e, PeerFailedError)), errors[0])
        if hasattr(error, "add_note"):
            error.add_note(f"(on rank {rank} of {size})")
        raise error
    return results
