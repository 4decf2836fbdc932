"""A watchdog that ends a job that hangs and reports which rank waits for which.

A thread on every rank checks how long the current phase has lasted. A rank past its limit writes a snapshot of its state; the
lowest of these ranks reports on all of them and ends the job.
"""

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

from mpilm.comm.base import Comm
from mpilm.comm.flight_recorder import FlightRecorder, locate_caller
from mpilm.formatting import name_ranks

EXIT_CODE = 86
TICK_S = 1.0
SUSPENDED_S = 10.0  # a tick later than this: the machine slept, or the job was suspended and resumed
TIMEOUT_FACTOR = 20  # times the longest phase of its kind so far
MIN_TIMEOUT_S = 60.0  # least learned limit
FIRST_TIMEOUT_S = 3600.0  # limit of a phase that has not run before
SIGNALLED_TIMEOUT_S = 5.0  # limit of a step after a signal has asked the run to stop
GRACE_S = 5.0  # wait for other ranks to reach their limits
PREPARATION = "preparation"  # the corpus is prepared, without a limit: it may take days, and prints its progress
EXITING = "exiting"  # only the exit barrier is left

Snapshot = Mapping[str, Any]  # state of a rank, as written to its file


class Watchdog:
    """Watches `recorder` from construction to `close`. Collective: the constructor gathers host and process of every rank.

    `step_timeout_s`: limit of a step; 0: learned. Until `set_run_folder` is called every rank reports for itself.
    """

    def __init__(self, recorder: FlightRecorder, world: Comm, step_timeout_s: float):
        self.recorder, self.world, self.step_timeout_s = recorder, world, step_timeout_s
        self.processes = world.all_gather_json([socket.gethostname(), os.getpid()])
        self.stamp = world.broadcast_json(time.strftime("%Y%m%d-%H%M%S"))
        self.folder: Path | None = None
        self.is_signalled: Callable[[], bool] = lambda: False
        self.main_thread = threading.current_thread().ident
        self._closed = threading.Event()
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # signals are not available everywhere
            faulthandler.register(signal.SIGUSR2, all_threads=True)  # works even if the interpreter lock is held
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def set_run_folder(self, folder: Path) -> None:
        """Set the folder, seen by all ranks, for the snapshots."""
        self.folder = folder / "watchdog" / self.stamp

    def close(self) -> None:
        """Stop watching and join the thread: it refers to the run, whose tensors must not be freed while Python exits."""
        self._closed.set()
        self._thread.join()

    def limit_s(self) -> float:
        """Return the time limit of the current phase."""
        phase, longest_s = self.recorder.phase, self.recorder.longest_s.get(self.recorder.phase)
        if phase == PREPARATION:
            return math.inf
        if phase == EXITING:
            return max(self.step_timeout_s, MIN_TIMEOUT_S)
        if phase == "step" and longest_s is not None and self.is_signalled():  # srun -K1: a rank died, and this one must exit
            return min(max(SIGNALLED_TIMEOUT_S, 3 * longest_s), self.step_timeout_s or math.inf)
        if phase == "step" and self.step_timeout_s:
            return self.step_timeout_s
        return FIRST_TIMEOUT_S if longest_s is None else max(MIN_TIMEOUT_S, TIMEOUT_FACTOR * longest_s)

    def _watch(self) -> None:
        last_tick = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            if now - last_tick > TICK_S + SUSPENDED_S:
                self.recorder.since += now - last_tick
            last_tick = now
            if now - self.recorder.since > self.limit_s():
                try:
                    self._report_and_abort()
                finally:
                    os._exit(EXIT_CODE)  # even if the report failed

    def _report_and_abort(self) -> None:
        self.recorder.is_aborting = True
        limit_s = self.limit_s()
        snapshot = self._take_snapshot(limit_s)
        grace_s = GRACE_S + 0.05 * limit_s
        if self.folder is None:
            sys.stderr.write(format_report({self.world.rank: snapshot}, self.processes, {}))
            return time.sleep(grace_s)  # the other ranks report too
        snapshots = self._exchange_snapshots(self.folder, snapshot, grace_s)
        if min(snapshots) != self.world.rank:
            return time.sleep(2 * grace_s)  # the lowest of these ranks reports and ends the job
        states = {rank: self._inspect_process(rank) for rank in range(self.world.size) if rank not in snapshots}
        sys.stdout.flush()
        print(format_report(snapshots, self.processes, states) + f"  details in {self.folder}", file=sys.stderr, flush=True)
        _ignore_crashes()
        if self.world.size > 1:
            self.world.abort(EXIT_CODE)

    def _take_snapshot(self, limit_s: float) -> dict[str, Any]:
        """Return what this rank is doing."""
        recorder, now, frames = self.recorder, time.monotonic(), sys._current_frames()
        call, since = recorder.waiting or (None, now)
        return {
            "rank": self.world.rank,
            "step": recorder.step + 1,
            "phase": recorder.phase,
            "lasted_s": now - recorder.since,
            "limit_s": limit_s,
            "waiting": None if call is None else [*call[:3], list(call.peers), call.detail, now - since],
            "reached": {call.axis: call.number for call in list(recorder.calls) if call.op not in ("send", "receive")},
            "calls": [str(call) for call in list(recorder.calls)],
            "at": locate_caller(frames.get(self.main_thread or 0)),
            "stacks": {
                thread.name: traceback.format_stack(frames[thread.ident])
                for thread in threading.enumerate()
                if thread.ident in frames and thread.ident != threading.get_ident()
            },
        }

    def _exchange_snapshots(self, folder: Path, own: Snapshot, grace_s: float) -> dict[int, Snapshot]:
        """Write this rank's snapshot and return those that appear within `grace_s`, by rank."""
        paths = [folder / f"rank-{rank:04d}.json" for rank in range(self.world.size)]
        temporary = paths[self.world.rank].with_suffix(".tmp")
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(own, indent=1))
            temporary.rename(paths[self.world.rank])
        end, snapshots = time.monotonic() + grace_s, {self.world.rank: own}
        while len(snapshots) < self.world.size and time.monotonic() < end:
            time.sleep(0.1)
            new = [rank for rank, path in enumerate(paths) if rank not in snapshots and path.exists()]
            snapshots |= {rank: json.loads(paths[rank].read_text()) for rank in new}
        return snapshots

    def _inspect_process(self, rank: int) -> str:
        """Describe the process of a rank that has written no snapshot, if it runs on this host."""
        host, pid = self.processes[rank]
        if host != socket.gethostname():
            return ""
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "its process no longer exists"
        if state in "Tt":
            return "its process has been stopped (SIGSTOP, a debugger)"
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR2)  # it prints its stack
            time.sleep(0.5)
        return f"its process exists (state {state}) but does not respond: probably native code holds the interpreter lock"


def _ignore_crashes() -> None:
    """Let a thread that crashes from here on sleep instead: MPI_Abort unloads libraries that other threads may still use, and a
    crash would replace the exit code."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
            libc.signal(int(number), ctypes.cast(libc.pause, ctypes.c_void_p))


def format_report(snapshots: Mapping[int, Snapshot], processes: Sequence[Sequence[Any]], states: Mapping[int, str]) -> str:
    """Return the report: the verdict, then a line for each rank. `states`: of ranks without a snapshot."""
    first = snapshots[min(snapshots)]
    lasted = f"{_describe_phase(first)} has lasted {first['lasted_s']:.0f} s"
    limit = f"the limit is {first['limit_s']:.0f} s (--fault.step-timeout; 0 learns it from the run)"
    lines = [f"mpilm: watchdog: {lasted}; {limit}. {_diagnose(snapshots, states)}"]
    for rank, (host, pid) in enumerate(processes):
        name = f"  rank {rank} on {host} (process {pid})"
        if rank in states:
            lines.append(f"{name}: no response" + f"; {states[rank]}" * bool(states[rank]))
        elif rank in snapshots:
            lines.append(f"{name}: {_describe_rank(snapshots[rank], snapshots)}")
    return "\n".join(lines) + "\n"


def _diagnose(snapshots: Mapping[int, Snapshot], states: Mapping[int, str]) -> str:
    if states:
        return f"Missing: {name_ranks(states)}."
    if busy := [rank for rank, snapshot in snapshots.items() if snapshot["waiting"] is None]:
        return f"The others wait for {name_ranks(busy)}."
    return "All ranks wait for each other: a message was lost, or they do not make the same calls."


def _describe_phase(snapshot: Snapshot) -> str:
    return "the exit barrier" if snapshot["phase"] == EXITING else f"{snapshot['phase']} {snapshot['step']}"


def _describe_rank(snapshot: Snapshot, snapshots: Mapping[int, Snapshot]) -> str:
    place = f"{_describe_phase(snapshot)}, at {snapshot['at']}"
    if snapshot["waiting"] is None:
        return f"waits for no other rank; {place}"
    op, axis, number, peers, detail, since_s = snapshot["waiting"]
    others = [rank for rank in peers if rank != snapshot["rank"]]
    reached = {rank: other["reached"].get(axis, 0) for rank, other in snapshots.items()}
    behind = [rank for rank in others if reached.get(rank, 0) < number]  # of a single peer, the number does not matter
    call = f"{op} on {axis} (call {number}{', ' * bool(detail)}{detail})"
    return f"waits {since_s:.0f} s for {name_ranks(behind or others)} in {call}; {place}"
