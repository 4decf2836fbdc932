"""A watchdog that ends a job in which a rank stands still, in any phase, and reports which rank waits for which.

A thread on every rank proves each second that its process lives, and notes when its rank last moved: finished a call or,
outside of known steps, computed, read or wrote. A rank that waits for others does not stand still. Each rank watches itself and
the ranks of its node, each node its neighbours (heartbeat.py). The first to find one past its limit reports and ends the job.
"""

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mpilm.comm.base import Comm
from mpilm.comm.flight_recorder import FlightRecorder, locate_caller
from mpilm.comm.processes import kill_later, process_fields, waits_for_disk_or_core, work_of_other_threads
from mpilm.formatting import name_ranks
from mpilm.launch.hang_report import Snapshot, describe_call, describe_phase, describe_process, format_report
from mpilm.launch.heartbeat import MOVED, REPORTED, TICK, WAITING, HeartbeatTable, NodeLinks, shared_path

EXIT_CODE = 86
TICK_S = 1.0
SUSPENDED_S = 2.0  # a tick later than this: the machine slept, or the job was suspended and resumed
LIMIT_FACTOR = 20  # times the longest phase of its kind so far
MIN_LIMIT_S = 55.0  # least limit that is not stated: a hang is named within a minute
FIRST_LIMIT_S = 600.0  # limit of a rank that does nothing in a phase that has not run before: a file system may be slow
SIGNALLED_LIMIT_S = 5.0  # limit of a step after a signal has asked the run to stop
GRACE_S = 3.0  # for the other ranks to write down what they do
FIRST_NODE_S = 3.0  # that other nodes leave the first one to report: what they print may not reach the launcher any more
NOTICE_S = 30.0  # between lines that say what rank 0 waits for
IDLE_CPU = 0.001  # cores that the other threads of a process that does nothing may use


class Watchdog:
    """Watches `recorder` and the ranks of its node from construction to `close`. The constructor is collective."""

    def __init__(self, recorder: FlightRecorder, world: Comm):
        self.recorder, self.world, self.rank = recorder, world, world.rank
        host = socket.gethostname()
        self.hosts, keys = zip(*world.all_gather_json([host, f"{os.getpid()}-{time.monotonic_ns()}"]))
        path = shared_path(keys[self.hosts.index(host)]) if world.size > 1 else None
        self.table = HeartbeatTable(self.rank, world.size, path)
        places = world.all_gather_json([host, os.getpid(), 0 if self.table.path else self.rank])
        self.pids = [pid for _, pid, _ in places]
        nodes: dict[str, list[int]] = {}
        for rank, (name, _, private) in enumerate(places):
            nodes.setdefault(f"{name} {private}", []).append(rank)
        self.local = next(ranks for ranks in nodes.values() if self.rank in ranks)
        self.links = NodeLinks(world, list(nodes.values())) if len(nodes) > 1 else None
        self.stamp = world.broadcast_json(time.strftime("%Y%m%d-%H%M%S"))
        self.table.unlink()  # all have opened it
        self.resumed_s = self._moved_s = time.monotonic()  # what is older than resumed_s is not counted: nothing could run
        self._evidence: tuple[Any, ...] = ()
        self._work = (0.0, 0)
        self._notices = 0
        self._unreachable: set[int] = set()  # ranks of nodes that send no heartbeats: no report waits for them
        self.main_thread = threading.current_thread().ident
        self._closed = threading.Event()
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # signals are not available everywhere
            faulthandler.register(signal.SIGUSR2, all_threads=True)  # works even if the interpreter lock is held
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching and join the thread: it refers to the run, whose tensors must not be freed while Python exits."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        last_tick = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            if now - last_tick > TICK_S + SUSPENDED_S:
                self.resumed_s = now
            last_tick = now
            self._note_movement(now)
            is_asked = self.table.header[REPORTED] or (self.links and self.links.is_report_requested)
            problem = "" if is_asked else self._find_problem(now)
            if is_asked or problem:
                try:
                    self._report_and_abort(problem)
                finally:
                    os._exit(EXIT_CODE)  # even if the report failed
            self._maybe_notice(now)

    def _note_movement(self, now: float) -> None:
        """Write down that this process lives, and when its rank last moved."""
        recorder = self.recorder
        evidence: tuple[Any, ...] = (recorder.progress,)
        if recorder.waiting is None and not (recorder.phase == "step" and "step" in recorder.longest_s):
            with contextlib.suppress(AttributeError, OSError):  # a sleeping thread uses nothing
                evidence += (time.clock_gettime(time.pthread_getcpuclockid(self.main_thread or 0)),)
            cpu_s, nbytes = work_of_other_threads()
            if nbytes > self._work[1] or cpu_s - self._work[0] > 0.005 + IDLE_CPU * (now - self._moved_s):
                evidence += (cpu_s, nbytes)
        if evidence != self._evidence:
            self._moved_s, self._evidence, self._work = now, evidence[:2], work_of_other_threads()
        row = self.table.own
        row[TICK], row[MOVED], row[WAITING] = now, self._moved_s, recorder.waiting is not None

    def _still_s(self, rank: int, column: int, now: float) -> float:
        """Return how long a rank of this node has not written a time to its row."""
        return now - max(self.table.rows[rank, column], self.resumed_s)

    def limit_s(self) -> float:
        """Return how long a rank that waits for no other may do nothing in the current phase."""
        longest_s = self.recorder.longest_s.get(self.recorder.phase)
        learned_s = FIRST_LIMIT_S if longest_s is None else max(MIN_LIMIT_S, LIMIT_FACTOR * longest_s)
        return self.recorder.step_timeout_s or learned_s

    def _find_problem(self, now: float) -> str:
        """Return what is past its limit; empty if nothing is."""
        recorder, missing_limit_s = self.recorder, self.recorder.step_timeout_s or MIN_LIMIT_S
        if problem := self._find_slow_step(now):
            return problem
        still_s, limit_s = self._still_s(self.rank, MOVED, now), self.limit_s()
        if recorder.waiting is None and still_s > limit_s and waits_for_disk_or_core():
            limit_s = max(limit_s, MIN_LIMIT_S)  # others may keep it busy
        if recorder.waiting is None and still_s > limit_s:
            return self._describe_still(f"rank {self.rank} has done nothing", still_s, limit_s)
        if missing := self._find_missing(now, missing_limit_s):
            return self._describe_still(f"no response from {name_ranks(missing)}", missing_limit_s, missing_limit_s)
        return self._find_problem_of_nodes(now, missing_limit_s) if self._represents_node(now) else ""

    def _find_problem_of_nodes(self, now: float, limit_s: float) -> str:
        """Exchange heartbeats with the neighbouring nodes; return what they, or all nodes together, do not do."""
        waiting = [bool(self.table.rows[rank, WAITING]) for rank in self.local]
        still_s = min(self._still_s(rank, MOVED, now) for rank in self.local) if all(waiting) else 0.0
        job_still_s, deadlock_s = self.links.exchange(still_s) if self.links else still_s, max(MIN_LIMIT_S, self.limit_s())
        if (self.links is None or self.links.node == 0) and job_still_s > deadlock_s:
            return f"no rank has finished a call for {job_still_s:.0f} s; the limit is {deadlock_s:.0f} s"
        may_be_lost = self.world.is_fault_tolerant and still_s <= limit_s  # the others go on without a lost node
        if self.links and not may_be_lost and (silent := self.links.silent_nodes(limit_s, self.resumed_s)):
            hosts = ", ".join(self.hosts[self.links.nodes[node][0]] for node in silent)
            self._unreachable.update(rank for node in silent for rank in self.links.nodes[node])
            return f"no heartbeat from {hosts} for {limit_s:.0f} s: the host, or the network to it, is down"
        return ""

    def _find_slow_step(self, now: float) -> str:
        """Return the problem of a step that has lasted longer than its stated limit, or that follows a signal to stop."""
        recorder, limit_s = self.recorder, self.recorder.step_timeout_s
        if recorder.phase != "step":
            return ""
        longest_s = recorder.longest_s.get("step")
        source = "--fault.step-timeout"
        if longest_s is not None and recorder.is_signalled():  # srun -K1: a rank died, and this one must exit
            limit_s, source = min(max(SIGNALLED_LIMIT_S, 3 * longest_s), limit_s or math.inf), "after a signal to stop"
        lasted_s = now - max(recorder.since, self.resumed_s)
        if not limit_s or lasted_s <= limit_s:
            return ""
        return f"step {recorder.step + 1} has lasted {lasted_s:.0f} s; the limit is {limit_s:.0f} s ({source})"

    def _describe_still(self, who: str, still_s: float, limit_s: float) -> str:
        limit = f"the limit is {limit_s:.0f} s (--fault.step-timeout; 0 learns it from the run)"
        return f"{who} for {still_s:.0f} s in {self._phase()}; {limit}"

    def _phase(self) -> str:
        return describe_phase(self.recorder.phase, self.recorder.step + 1)

    def _find_missing(self, now: float, limit_s: float) -> list[int]:
        """Return the other ranks of this node whose processes have not proved for so long that they live."""
        late = [rank for rank in self.local if rank != self.rank and self._still_s(rank, TICK, now) > limit_s]
        if not self.world.is_fault_tolerant:
            return late
        return [rank for rank in late if process_fields(self.pids[rank])]  # the others continue without a dead one

    def _represents_node(self, now: float) -> bool:
        """Return whether this is the lowest rank of its node that lives."""
        return all(rank >= self.rank or self._still_s(rank, TICK, now) > 5 * TICK_S for rank in self.local)

    def _maybe_notice(self, now: float) -> None:
        """Print what rank 0 waits for, each 30 s in which it finishes no call."""
        quiet_s = max(0.0, now - max(self.recorder.progressed_s, self.resumed_s))
        notices, self._notices = self._notices, int(quiet_s // NOTICE_S)
        if self.rank or self._notices <= notices:
            return
        if self.recorder.waiting is None:
            frame = sys._current_frames().get(self.main_thread or 0)
            text = f"{self._phase()} goes on for {quiet_s:.0f} s at {locate_caller(frame)}"
        else:
            call, peers = self.recorder.waiting[0], [rank for rank in self.recorder.waiting[0].peers if rank != self.rank]
            busy = [rank for rank in peers if rank in self.local and not self.table.rows[rank, WAITING]]
            text = f"rank 0 has waited {quiet_s:.0f} s for {describe_call(call, busy or peers)}, in {self._phase()}"
        print(f"mpilm: {text}", file=sys.stderr, flush=True)

    def _report_and_abort(self, problem: str) -> None:
        """Report and end the job, if this rank is the first with a problem; otherwise write down what it does and wait."""
        self.recorder.is_aborting = True
        sys.stdout.flush()
        node_folder = self.table.path.with_suffix(".report") if self.table.path else None
        run_folder = self.recorder.report_folder and self.recorder.report_folder / self.stamp
        folders = [folder for folder in (node_folder, run_folder) if folder]  # ranks learn the run's at different times
        if problem and self.links is not None and self.links.node > 0:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.mkdir(parents=True, exist_ok=True)
            self._take_snapshot(folders)  # for the report of the first node
            time.sleep(FIRST_NODE_S)
        if not problem or not all(_claim(folder) for folder in folders):
            self._take_snapshot(folders)
            return time.sleep(4 * GRACE_S)
        self.table.header[REPORTED] = 1
        if self.links is not None:
            self.links.request_reports()
        snapshots = self._collect_snapshots(folders)
        local = self.local if run_folder is None else range(self.world.size)
        missing = [rank for rank in local if rank not in snapshots]
        states = {rank: describe_process(self.pids[rank]) * (self.hosts[rank] == self.hosts[self.rank]) for rank in missing}
        report = format_report(problem, snapshots, dict(enumerate(zip(self.hosts, self.pids))), states)
        print(report + f"  details in {run_folder}" * (run_folder is not None), file=sys.stderr, flush=True)
        if node_folder is not None:
            shutil.rmtree(node_folder, ignore_errors=True)
        _ignore_crashes()
        for rank in (rank for rank in missing if self.hosts[rank] == self.hosts[self.rank]):
            kill_later(self.pids[rank], int(GRACE_S))  # MPI_Abort may leave a stopped one, and this process ends in it
        if self.world.size > 1:
            self.world.abort(EXIT_CODE)

    def _take_snapshot(self, folders: Sequence[Path]) -> Snapshot:
        """Return what this rank is doing, and write it into the folders."""
        recorder, now, frames = self.recorder, time.monotonic(), sys._current_frames()
        call, since = recorder.waiting or (None, now)
        snapshot = {
            "rank": self.rank,
            "step": recorder.step + 1,
            "phase": recorder.phase,
            "still_s": now - self._moved_s,
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
        for folder in folders:
            path = folder / f"rank-{self.rank:04d}.json"
            with contextlib.suppress(OSError):
                path.with_suffix(".tmp").write_text(json.dumps(snapshot, indent=1))
                path.with_suffix(".tmp").rename(path)
        return snapshot

    def _collect_snapshots(self, folders: Sequence[Path]) -> dict[int, Snapshot]:
        """Return the snapshots, by rank, of this rank and of those that write theirs in time."""
        snapshots, end = {self.rank: self._take_snapshot(folders)}, time.monotonic() + GRACE_S
        expected = set(range(len(self.pids))) - self._unreachable
        while folders and expected > set(snapshots) and time.monotonic() < end:
            time.sleep(0.1)
            for rank, folder in product(expected - set(snapshots), folders):
                with contextlib.suppress(OSError):
                    snapshots[rank] = json.loads((folder / f"rank-{rank:04d}.json").read_text())
        return snapshots


def _claim(folder: Path) -> bool:
    """Create the folder of a report; return False if another rank has claimed it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "reporter", os.O_CREAT | os.O_EXCL))
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _ignore_crashes() -> None:
    """Let a thread that crashes from here on sleep instead: MPI_Abort unloads libraries that other threads may still use, and a
    crash would replace the exit code."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
            libc.signal(int(number), ctypes.cast(libc.pause, ctypes.c_void_p))
