"""The report of a job that hangs: a verdict, then a line for each rank, from snapshots of what the ranks do."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mpilm.comm.processes import process_fields
from mpilm.formatting import name_ranks

EXITING = "exit"  # phase in which only the last barrier is left
STOPPED = "its process has been stopped (SIGSTOP, a debugger)"
MAX_RANKS = 64  # that a report lists; all that are missing, and the first others

Snapshot = Mapping[str, Any]  # state of a rank, as written to its file


def format_report(
    problem: str, snapshots: Mapping[int, Snapshot], processes: Mapping[int, Sequence[Any]], states: Mapping[int, str]
) -> str:
    """Return the report. `processes`: host and process id of every rank; `states`: of ranks without a snapshot."""
    lines = [f"mpilm: watchdog: {problem}. {_diagnose(snapshots, states)}"]
    listed = [*states, *snapshots][:MAX_RANKS]
    for rank, (host, pid) in ((rank, processes[rank]) for rank in sorted(listed)):
        name = f"  rank {rank} on {host} (process {int(pid)})"
        if rank in states:
            lines.append(f"{name}: no response" + f"; {states[rank]}" * bool(states[rank]))
        else:
            lines.append(f"{name}: {_describe_rank(snapshots[rank], snapshots)}")
    if len(processes) > len(listed):
        lines.append(f"  {len(processes) - len(listed)} more ranks")
    return "\n".join(lines) + "\n"


def describe_process(pid: int) -> str:
    """Describe the process of a rank of this host that does not respond; it prints its stack if it can."""
    if not (fields := process_fields(pid)):
        return "its process no longer exists"
    if fields[1] in "Tt":
        return STOPPED
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5)
    return f"its process exists (state {fields[1]}) but does not respond: probably native code holds the interpreter lock"


def _diagnose(snapshots: Mapping[int, Snapshot], states: Mapping[int, str]) -> str:
    if states:
        return f"Missing: {name_ranks(states)}."
    if busy := [rank for rank, snapshot in snapshots.items() if snapshot["waiting"] is None]:
        return f"The others wait for {name_ranks(busy)}."
    return "All ranks wait for each other: a message was lost, or they do not make the same calls."


def describe_phase(phase: str, step: int) -> str:
    """Return the name of a phase: with its number for steps, and phases between them."""
    return "the exit barrier" if phase == EXITING else f"{phase} {step}" if step else phase


def describe_call(call: Sequence[Any], behind: Sequence[int]) -> str:
    """Return the ranks and the call that a rank waits for. `call`: op, axis, number, peers, detail."""
    op, axis, number, _, detail = call[:5]
    return f"{name_ranks(behind)} in {op} on {axis} (call {number}{', ' * bool(detail)}{detail})"


def _describe_rank(snapshot: Snapshot, snapshots: Mapping[int, Snapshot]) -> str:
    place = f"{describe_phase(snapshot['phase'], snapshot['step'])}, at {snapshot['at']}"
    if snapshot["waiting"] is None:
        return f"waits for no other rank; {place}"
    *call, since_s = snapshot["waiting"]
    _, axis, number, peers, _ = call
    others = [rank for rank in peers if rank != snapshot["rank"]]
    reached = {rank: other["reached"].get(axis, 0) for rank, other in snapshots.items()}
    behind = [rank for rank in others if reached.get(rank, 0) < number]  # of a single peer, the number does not matter
    return f"waits {since_s:.0f} s for {describe_call(call, behind or others)}; {place}"
