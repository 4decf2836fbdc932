"""What rank 0 prints while training: a view on a terminal, lines elsewhere, and the same lines in RUN/log.txt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.live import Live

from mpilm.telemetry.live import Glance
from mpilm.telemetry.words import duration, slowest

QUIET_S = 3.0
REFRESH_S = 0.5


class Display:
    """Prints on rank 0 and keeps silent on the others. `log`: the file that has every line, with its time.

    `launched`: started by mpirun or srun, which carry the output away: Open MPI gives ranks a terminal of their own even
    where it then writes to a file, so there is no telling, and lines are right everywhere.
    """

    def __init__(self, speaks: bool, glance: Glance, log: Path, launched: bool):
        self.speaks, self.glance = speaks, glance
        self.first, self.started = 0, time.monotonic()
        self._log = open(log, "a", encoding="utf-8") if speaks else None  # noqa: SIM115
        self._terminal = speaks and sys.stdout.isatty() and not launched
        self._live: Live | None = None
        self._drawn = 0.0

    def begin(self, first: int) -> None:
        """All that comes before the first step has been said."""
        self.first, self.started = first, time.monotonic()
        if self._terminal and self.glance.steps > first:
            self._live = Live(self.glance, auto_refresh=False)
            self._live.start()

    def say(self, text: str = "") -> None:
        """A line, or several, as they are."""
        if self.speaks:
            self._write(text)
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def line(self, text: str) -> None:
        """Something that has happened, and when."""
        if self._live is None and not self._terminal and self.speaks:
            self._write(text)
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        else:
            self.say(text)

    def note(self, text: str) -> None:
        """For the log alone."""
        self._write(text)

    def step(self, done: int, row: dict[str, Any], logged: bool) -> None:
        """Show that `done` steps are done; `row` holds the numbers of the last one."""
        if not self.speaks:
            return
        if logged:
            self._step_line(done, row)
        elif self._live is not None:
            self.glance.see(row)
        if self._live is not None and time.monotonic() > self._drawn + REFRESH_S:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _step_line(self, done: int, row: dict[str, Any]) -> None:
        steps = self.glance.steps
        left = (time.monotonic() - self.started) / (done - self.first) * (steps - done)
        text = f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
        slow = slowest(row["rank_s"]["compute"])
        line = f"step {done:>{len(str(steps))}}/{steps}  {text}  {duration(left)} left{f'  ({slow})' if slow else ''}"
        if self._live is None:
            self.line(line)
        else:
            self._write(line)

    def _write(self, text: str) -> None:
        """Into the log, where it can be written: a full disk stops checkpoints, not lines."""
        if self._log is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            try:
                self._log.write("".join(f"{now}  {line}".rstrip() + "\n" for line in text.split("\n")))
                self._log.flush()
            except OSError:
                self._log = None

    def close(self) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None


class Counter:
    """Now and then a line on standard error that says how many of `total` are done; silent for the first seconds."""

    def __init__(self, what: str, total: int, speaks: bool):
        self.event, self.total, self.speaks = what, total, speaks
        self.done, self.shown = 0, time.monotonic()

    def __call__(self, _: Any = None) -> None:
        """One more is done."""
        self.done += 1
        now = time.monotonic()
        if self.speaks and now > self.shown + QUIET_S:
            self.shown = now
            print(f"{self.event}: {self.done:,} of {self.total:,} on rank 0", file=sys.stderr, flush=True)
