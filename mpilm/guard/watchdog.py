"""A job that hangs ends, and says who waits for whom.

A thread on every rank looks how long the present part of the run has lasted. Past its limit the rank writes down what it is
doing; the first of those that did says what can be seen of all, and ends the job.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpilm.comm.activity import Activity, place
from mpilm.comm.base import Comm

CODE = 86
TICK_S = 1.0
SUSPENDED_S = 10.0  # a tick that took so much longer: the machine slept, or the job was stopped and goes on
LEARNED = 20  # times the longest step
SHORTEST_S = 60.0  # of a limit that is learned
UNKNOWN_S = 3600.0  # of what has not been seen before
PREPARATION = "preparation"  # of texts, which may take days and says how far it is
LEAVING = "leaving"  # all that is left is to wait for the others
HURRIED_S = 5.0  # for a step, once a signal has asked for the end
GRACE_S = 5.0  # for other ranks to come to their limits

Words = Mapping[str, Any]  # what a rank has written down


class Watchdog:
    """Watches `activity` from construction to `close`. `stated_s`: limit of a step; 0: learned. Collective, to learn of the
    others' processes. Until `write_below` has been called every rank speaks for itself."""

    def __init__(self, activity: Activity, world: Comm, stated_s: float):
        self.activity, self.world, self.stated_s = activity, world, stated_s
        self.processes = world.all_gather_json([socket.gethostname(), os.getpid()])
        self.stamp = world.broadcast_json(time.strftime("%Y%m%d-%H%M%S"))
        self.folder: Path | None = None
        self.hurried: Callable[[], bool] = lambda: False
        self.main = threading.current_thread().ident
        self._closed = threading.Event()
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # where a signal cannot be had
            faulthandler.register(signal.SIGUSR2, all_threads=True)  # works also where the interpreter lock is held
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def write_below(self, folder: Path) -> None:
        """Where the ranks write down what they do; all see it."""
        self.folder = folder / "watchdog" / self.stamp

    def close(self) -> None:
        """The thread is gone afterwards: it holds the run, and tensors that it frees while Python ends crash the process."""
        self._closed.set()
        self._thread.join()

    def limit_s(self) -> float:
        """How long the present part of the run may last."""
        phase, longest = self.activity.phase, self.activity.longest_s.get(self.activity.phase)
        if phase == "step" and longest is not None and self.hurried():  # srun -K1: a rank has died, and this one is to go
            return min(max(HURRIED_S, 3 * longest), self.stated_s or math.inf)
        if phase == LEAVING:
            return max(self.stated_s, SHORTEST_S)
        if self.stated_s and phase == "step":
            return self.stated_s
        if phase == PREPARATION:
            return math.inf
        return UNKNOWN_S if longest is None else max(SHORTEST_S, LEARNED * longest)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            if now - looked > TICK_S + SUSPENDED_S:
                self.activity.since += now - looked
            looked = now
            if now - self.activity.since > self.limit_s():
                try:
                    self._end()
                finally:
                    os._exit(CODE)  # whatever has kept the report from being made

    def _end(self) -> None:
        """Report, and end the job."""
        self.activity.end()
        limit_s = self.limit_s()
        words = self._words(limit_s)
        grace_s = GRACE_S + 0.05 * limit_s
        if self.folder is None:
            sys.stderr.write(report({self.world.rank: words}, self.processes, {}))
            return time.sleep(grace_s)  # the others have something to say too
        self._write(self.folder, words)
        found = self._gathered(self.folder, grace_s)
        if min(found) != self.world.rank:
            return time.sleep(2 * grace_s)  # the first one speaks and ends all
        missing = [rank for rank in range(self.world.size) if rank not in found]
        states = {rank: self._state(rank) for rank in missing}
        sys.stdout.flush()
        sys.stderr.write(report(found, self.processes, states) + f"  written down in {self.folder}\n")
        sys.stderr.flush()
        _rest_on_crashes()
        if self.world.size > 1:
            self.world.abort(CODE)

    def _words(self, limit_s: float) -> dict[str, Any]:
        """What this rank is doing, for whoever reports."""
        activity, now, frames = self.activity, time.monotonic(), sys._current_frames()
        call, since = activity.waiting or (None, now)
        return {
            "rank": self.world.rank,
            "step": activity.step + 1,
            "phase": activity.phase,
            "lasted_s": now - activity.since,
            "limit_s": limit_s,
            "waiting": None if call is None else [*call[:3], list(call.waits_for), call.detail, now - since],
            "reached": {call.axis: call.number for call in list(activity.calls) if call.op not in ("send", "receive")},
            "calls": [str(call) for call in list(activity.calls)],
            "at": place(frames.get(self.main or 0)),
            "stacks": {
                thread.name: traceback.format_stack(frames[thread.ident])
                for thread in threading.enumerate()
                if thread.ident in frames and thread.ident != threading.get_ident()
            },
        }

    def _write(self, folder: Path, words: Words) -> None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            path = _path(folder, self.world.rank)
            path.with_suffix(".tmp").write_text(json.dumps(words, indent=1))
            path.with_suffix(".tmp").rename(path)

    def _gathered(self, folder: Path, grace_s: float) -> dict[int, Words]:
        """What all ranks have written, as far as it comes in time."""
        end, found = time.monotonic() + grace_s, dict[int, Words]()
        while len(found) < self.world.size and time.monotonic() < end:
            for rank in range(self.world.size):
                if rank not in found and _path(folder, rank).exists():
                    found[rank] = json.loads(_path(folder, rank).read_text())
            time.sleep(0.1)
        return found or {self.world.rank: {"rank": self.world.rank, "step": self.activity.step + 1}}

    def _state(self, rank: int) -> str:
        """What can be seen of a rank that has said nothing, where it is on this host."""
        host, pid = self.processes[rank]
        if host != socket.gethostname():
            return ""
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "the process is not there any more"
        if state in "Tt":
            return "the process has been stopped (SIGSTOP, a debugger)"
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR2)  # it prints its stack
            time.sleep(0.5)
        return f"the process is there (state {state}) and does not answer: probably native code keeps the interpreter lock"


def _rest_on_crashes() -> None:
    """Let a thread that crashes from here on sleep: MPI_Abort takes the libraries down under a thread that computes with them,
    and the crash would take the place of the exit code."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
            libc.signal(int(number), ctypes.cast(libc.pause, ctypes.c_void_p))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.json"


def report(found: Mapping[int, Words], processes: Sequence[Sequence[Any]], states: Mapping[int, str]) -> str:
    """Who waits for whom, and who is missing, from what the ranks have written down; `states`: of those that have not."""
    first = found[min(found)]
    lines = [
        f"mpilm: watchdog: {_part(first)} has lasted {first.get('lasted_s', 0):.0f} s, and "
        f"{first.get('limit_s', 0):.0f} s is the limit (--fault.step-timeout; 0 learns it from the run). "
        f"{_verdict(found, states)}"
    ]
    for rank, (host, pid) in enumerate(processes):
        who = f"  rank {rank} on {host} (process {pid})"
        if rank in states:
            lines.append(f"{who}: no word from it" + f"; {states[rank]}" * bool(states[rank]))
        elif rank in found:
            lines.append(f"{who}: {_doing(found[rank], found)}")
    return "\n".join(lines) + "\n"


def _verdict(found: Mapping[int, Words], states: Mapping[int, str]) -> str:
    if states:
        return f"Missing: {_ranks(list(states))}."
    busy = [rank for rank, words in found.items() if not words.get("waiting")]
    if busy:
        return f"The others wait for {_ranks(busy)}."
    return "All ranks wait for each other: a message is lost, or they do not make the same calls."


def _part(words: Words) -> str:
    """The part of the run that a rank is in."""
    return "the end, all being done" if words.get("phase") == LEAVING else f"{words.get('phase')} {words.get('step')}"


def _doing(words: Words, found: Mapping[int, Words]) -> str:
    place = f"{_part(words)}, at {words.get('at')}"
    if not words.get("waiting"):
        return f"waits for nobody; {place}"
    op, axis, number, ranks, detail, since_s = words["waiting"]
    behind = [r for r in ranks if r != words["rank"] and _reached(found.get(r), axis, op) < number]
    whom = _ranks(behind or [r for r in ranks if r != words["rank"]])
    return f"waits {since_s:.0f} s for {whom} in {op} on {axis} (call {number}{', ' * bool(detail)}{detail}); {place}"


def _reached(words: Words | None, axis: str, op: str) -> float:
    """How many calls on an axis a rank has come to; messages between two ranks are not counted on both sides alike."""
    if words is None or op in ("send", "receive"):
        return -1
    return float(words.get("reached", {}).get(axis, 0))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
