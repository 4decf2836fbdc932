"""What rank 0 prints while training: a header, progress, notes. A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as 1h02m, 2m31s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


QUIET_S = 3.0
SLOW = 1.2  # times the median


def slowest(rank_busy_s: Sequence[float]) -> str:
    """The rank that computes longest, where it is clearly slower than most."""
    middle, most = statistics.median_low(rank_busy_s), max(rank_busy_s)
    if len(rank_busy_s) < 2 or most <= SLOW * middle:
        return ""
    return f"  (rank {rank_busy_s.index(most)} computes {most / middle:.1f} times as long as most)"


class Display:
    """Prints on rank 0 and keeps silent on the others.

    `launched`: started by mpirun or srun, which carry the output away: Open MPI gives ranks a terminal of their own even
    where it then writes to a file, so there is no telling, and lines are right everywhere.
    """

    def __init__(self, speaks: bool, first: int, steps: int, launched: bool):
        self.speaks, self.steps, self.first = speaks, steps, first
        self.started = time.monotonic()
        self.bar = _bar(first, steps) if speaks and steps > first and sys.stdout.isatty() and not launched else None

    def line(self, text: str = "") -> None:
        if not self.speaks:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def step(self, done: int, row: dict[str, Any], logged: bool) -> None:
        """Show that `done` steps are done; `row` holds the numbers of the last one."""
        if not self.speaks:
            return
        left = (time.monotonic() - self.started) / (done - self.first) * (self.steps - done)
        text = f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, text=text)
        elif logged:
            slow = slowest(row["rank_busy_s"])
            self.line(f"step {done:>{len(str(self.steps))}}/{self.steps}  {text}  {duration(left)} left{slow}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Counter:
    """Now and then a line on standard error that says how many of `total` are done; silent for the first seconds."""

    def __init__(self, what: str, total: int, speaks: bool):
        self.what, self.total, self.speaks = what, total, speaks
        self.done, self.shown = 0, time.monotonic()

    def __call__(self, _: Any = None) -> None:
        """One more is done."""
        self.done += 1
        now = time.monotonic()
        if self.speaks and now > self.shown + QUIET_S:
            self.shown = now
            print(f"{self.what}: {self.done:,} of {self.total:,} on rank 0", file=sys.stderr, flush=True)


def _bar(first: int, steps: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Progress(*columns)
    bar.add_task("train", total=steps, completed=first, text="")
    bar.start()
    return bar
