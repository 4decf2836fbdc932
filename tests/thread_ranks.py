"""Ranks as threads of one process, for tests: they start in milliseconds, mpirun takes seconds."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Counts, Request, unpack_into

R = TypeVar("R")
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class PeerFailedError(RuntimeError):
    """Raised on a waiting rank after another rank has raised."""


class _ThreadWorld:
    """State shared by the threads: posted messages, and the first failure."""

    def __init__(self, timeout_s: float, ranks_per_node: int):
        self.ranks_per_node = ranks_per_node
        self.condition = threading.Condition()
        self.messages: dict[Any, Any] = {}
        self.failure: str | None = None
        self.timeout_s = timeout_s

    def post(self, messages: Mapping[Any, Any]) -> None:
        with self.condition:
            self.messages |= messages
            self.condition.notify_all()

    def take(self, key: Any) -> Any:
        """Return the message under `key` once it is posted, and delete it."""
        with self.condition:
            posted = self.condition.wait_for(lambda: self.failure or key in self.messages, self.timeout_s)
            if self.failure:
                raise PeerFailedError(self.failure)
            if not posted:
                raise TimeoutError(f"no message within {self.timeout_s} s for {key}")
            return self.messages.pop(key)

    def fail(self, reason: str) -> None:
        with self.condition:
            self.failure = self.failure or reason
            self.condition.notify_all()


class ThreadComm(Comm):
    """One rank of a group of threads. Sent data is copied when the operation starts."""

    def __init__(self, world: _ThreadWorld, group: tuple[int, ...], rank: int, name: str, path: tuple[Any, ...] = ()):
        self._world, self._group, self._path = world, group, path
        self.rank, self.size, self.name = rank, len(group), name
        self._call_count = 0
        self._message_counts: dict[Any, int] = defaultdict(int)

    def _exchange(self, op: str, value: Any) -> Callable[[], list[Any]]:
        """Post this rank's part of a collective; return a function that waits for the parts of all ranks."""
        call = self._call_count
        self._call_count += 1
        key = (self._path, self._group, call)
        self._world.post({(*key, self.rank, r): (op, value) for r in range(self.size)})

        def collect() -> list[Any]:
            posts = [self._world.take((*key, r, self.rank)) for r in range(self.size)]
            for r, (other, _) in enumerate(posts):
                if other != op:
                    raise RuntimeError(f"{self}: call {call} is {op} here and {other} on rank {r}")
            return [value for _, value in posts]

        return collect

    def barrier(self) -> None:
        self._exchange("barrier", None)()

    def split(self, color: int, key: int, name: str) -> Comm:
        parts = self._exchange(f"split {name}", (color, key))()
        members = sorted((k, r) for r, (c, k) in enumerate(parts) if c == color)
        ranks = [r for _, r in members]
        path = (*self._path, self._call_count, color)
        return ThreadComm(self._world, tuple(self._group[r] for r in ranks), ranks.index(self.rank), name, path)

    def split_node(self, name: str = "node") -> Comm:
        return self.split(self._node_of(self._group[self.rank]), self.rank, name)

    def _node_of(self, rank: int) -> int:
        return rank // self._world.ranks_per_node

    def allocate_shared(self, numel: int) -> list[Tensor] | None:
        same_node = len({self._node_of(rank) for rank in self._group}) == 1
        parts = self._exchange("allocate_shared", torch.zeros(numel))()
        return parts if same_node else None

    def abort(self, code: int) -> None:
        self._world.fail(f"rank {self.rank} aborted with {code}")
        raise SystemExit(code)

    def _iall_reduce(self, x: Tensor, op: str) -> Request:
        collect = self._exchange(f"all_reduce {op} {x.dtype} {x.numel()}", x.clone())
        combine = COMBINE[op]

        def finish() -> None:
            parts = collect()
            total = parts[0].clone()
            for part in parts[1:]:
                total = combine(total, part)
            x.copy_(total)

        return Request(finish)

    def _iall_gather(self, x: Tensor, out: Tensor, counts: Counts) -> Request:
        collect = self._exchange(f"all_gather {x.dtype} {list(counts)}", x.clone())
        return Request(lambda: unpack_into(collect(), out))

    def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
        collect = self._exchange(f"all_to_all {x.dtype}", x.clone().view(-1).split(list(send_counts)))

        def finish() -> None:
            parts = [parts[self.rank] for parts in collect()]
            if [part.numel() for part in parts] != list(receive_counts):
                raise RuntimeError(f"{self}: all_to_all receives {[p.numel() for p in parts]}, expected {list(receive_counts)}")
            unpack_into(parts, out)

        return Request(finish)

    def _next_message(self, direction: str, source: int, to: int, tag: int) -> Any:
        """Return the key of the next message; sender and receiver count separately, also if both are one rank."""
        count = self._message_counts[direction, source, to, tag] = self._message_counts[direction, source, to, tag] + 1
        return (self._path, self._group, "message", source, to, tag, count)

    def _isend(self, x: Tensor, to: int, tag: int) -> Request:
        key = self._next_message("send", self.rank, to, tag)
        self._world.post({key: x.clone()})
        return Request(partial(self._world.take, (*key, "receive started"))) if to != self.rank else Request()

    def _irecv(self, out: Tensor, source: int, tag: int) -> Request:
        key = self._next_message("receive", source, self.rank, tag)
        if source != self.rank:
            self._world.post({(*key, "receive started"): None})
        return Request(lambda: unpack_into([self._world.take(key)], out))

    def _broadcast(self, x: Tensor, root: int) -> None:
        parts = self._exchange(f"broadcast from {root} {x.dtype} {x.numel()}", x.clone() if self.rank == root else None)()
        x.copy_(parts[root].view_as(x))


def run_ranks(size: int, body: Callable[[Comm], R], timeout_s: float = 60.0, ranks_per_node: int = 0) -> list[R]:
    """Call `body(comm)` on `size` ranks, each a thread, and return their results in rank order.

    `ranks_per_node`: emulate nodes with so many ranks each; 0: one node. The exception of the first rank that fails is raised
    here with the rank added as a note; the other ranks are released.
    """
    world = _ThreadWorld(timeout_s, ranks_per_node or size)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = body(ThreadComm(world, tuple(range(size)), rank, "world"))
        except BaseException as error:  # re-raised below
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
