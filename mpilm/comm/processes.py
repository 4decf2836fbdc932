"""Processes of this host as /proc shows them: their state, the work they do, the ranks a launcher has started."""

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen

from mpilm.errors import RANK_VARIABLES

LAUNCHERS = ("mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun")
DAEMONS = (*LAUNCHERS, "hydra_pmi_proxy", "prted", "orted", "slurmstepd", "palsd", "flux-shell")  # parents of the ranks
KILL_LATER = "for second in $(seq {seconds}); do kill -0 {pid} 2>/dev/null || exit; sleep 1; done; kill -9 {pid}"
SCHED_ATTR_BYTES = 48  # of struct sched_attr
TIME_SLICE_NS = 20_000_000  # 7 times the usual one
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def process_fields(pid: int | str) -> list[str]:
    """Return the name of a process, or of a thread ("self/task/ID"), and the fields behind it in its stat, from its state on;
    empty if it is gone."""
    with contextlib.suppress(OSError):
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")
        name, _, fields = rest.rpartition(")")
        return [name, *fields.split()]
    return []


def kill_later(pid: int, seconds: int) -> None:
    """Let another process, which outlives this one, kill a process that still exists after so many seconds."""
    command = ["sh", "-c", KILL_LATER.format(seconds=seconds, pid=pid)]
    with contextlib.suppress(OSError):  # DEVNULL: a launcher waits until every process has closed the output it inherited
        Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)


def work_of_other_threads() -> tuple[float, int]:
    """Return the CPU seconds that this process and its descendants have used, and the bytes that it has read and written, both
    without those of the calling thread."""
    children_s = sum(sum(map(int, process_fields(child)[12:16])) / TICKS_PER_S for child in descendants(os.getpid()))
    ended = os.times()
    cpu_s = time.process_time() - time.thread_time() + ended.children_user + ended.children_system + children_s
    nbytes = 0
    with contextlib.suppress(OSError, ValueError):
        for path, sign in (("io", 1), (f"task/{threading.get_native_id()}/io", -1)):
            lines = Path(f"/proc/self/{path}").read_text().splitlines()
            nbytes += sign * sum(int(line.split()[1]) for line in lines[:2])
    return cpu_s, nbytes


def waits_for_disk_or_core() -> bool:
    """Return whether a thread of this process, other than the calling one, waits for a disk or a network file system, as in
    fsync, or for a core: a host may not let a virtual core run for seconds."""
    own = str(threading.get_native_id())
    with contextlib.suppress(OSError):
        others = [thread for thread in os.listdir("/proc/self/task") if thread != own]
        return any(process_fields(f"self/task/{thread}")[1:2] in (["D"], ["R"]) for thread in others)
    return False


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process, or one of its descendants, has started."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def find_ancestor(names: Sequence[str]) -> int | None:
    """Return the nearest ancestor of this process that has one of the names, if it runs on this host."""
    pid = os.getppid()
    while pid > 1 and (fields := process_fields(pid)):
        if fields[0] in names:
            return pid
        pid = int(fields[2])
    return None


def find_ranks(daemon: int) -> dict[int, list[int]]:
    """Return the processes below a launcher's daemon by the rank that their environment names."""
    ranks: dict[int, list[int]] = {}
    for pid in descendants(daemon):
        with contextlib.suppress(OSError, ValueError):
            variables = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            rank = next((int(variables[name]) for name in RANK_VARIABLES if name in variables), None)
            if rank is not None:
                ranks.setdefault(rank, []).append(pid)
    return ranks


def lengthen_time_slice() -> None:
    """Let the kernel interrupt this thread less often for others on its core, as far as it allows (Linux 6.12): ranks that
    share a core then find more of their data in the cache. Does nothing where it is not allowed."""
    number = {"x86_64": 314, "aarch64": 274}.get(platform.machine())  # of the system call sched_setattr
    if number is None or sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("IIQiIQQQ", SCHED_ATTR_BYTES, os.SCHED_OTHER, 0, nice, 0, TIME_SLICE_NS, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)
