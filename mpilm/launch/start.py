"""Supervision of the start, before MPI is up: it holds the interpreter lock, so no thread of a rank could report anything."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

from mpilm.comm.processes import DAEMONS, find_ancestor, find_ranks, process_fields
from mpilm.launch.hang_report import STOPPED, format_report

POLL_S = 0.5
DETECTOR = {"detector": "1", "detector_thread": "1", "detector_timeout": "20", "propagator_with_rbcast": "1"}  # seconds


def detect_lost_hosts() -> None:
    """Let a fault-tolerant Open MPI notice within 20 s that a host, or the network to it, is down, if this job has several
    hosts; call before MPI starts. By itself it notices processes that end. Variables that the user has set win."""
    environment = os.environ
    names = ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE")
    if environment.get("OMPI_MCA_mpi_ft_enable") and environment.get(names[0]) != environment.get(names[1]):
        for name, value in DETECTOR.items():
            environment.setdefault(f"OMPI_MCA_mpi_ft_{name}", value)


@contextlib.contextmanager
def watch_start(rank: int, size: int, limit_s: float) -> Iterator[None]:
    """Let a child process watch the other ranks of this host during the block, if a launcher has started them here. If one is
    stopped for longer than `limit_s`, the child of the lowest other rank reports it and ends the job by killing its parent."""
    daemon = find_ancestor(DAEMONS) if size > 1 else None
    child = os.fork() if daemon else None
    if daemon and child == 0:
        try:
            _watch_ranks(daemon, os.getppid(), rank, limit_s)
        finally:
            os._exit(0)
    yield
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _watch_ranks(daemon: int, parent: int, own_rank: int, limit_s: float) -> None:
    since, seen = dict[int, float](), set[int]()
    while os.getppid() == parent:
        time.sleep(POLL_S)
        ranks, now = find_ranks(daemon), time.monotonic()
        seen |= set(ranks)  # the one that has reported may be gone already
        stopped = {rank: pid for rank, pids in ranks.items() for pid in pids if process_fields(pid)[1:2] in (["T"], ["t"])}
        since = {rank: since.get(rank, now) for rank in stopped}
        late = [rank for rank in stopped if now - since[rank] > limit_s]
        if late and own_rank == min(seen - set(stopped)):
            processes = {rank: (socket.gethostname(), pid) for rank, pid in stopped.items()}
            problem = f"MPI does not start for {limit_s:.0f} s"
            os.write(2, format_report(problem, {}, processes, dict.fromkeys(stopped, STOPPED)).encode())
            return os.kill(parent, signal.SIGKILL)
