"""Console output of a training run: a live view on a terminal, lines elsewhere, and the same lines in RUN/log.txt."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.live import Live

from mpilm.formatting import format_duration
from mpilm.telemetry.live import LiveView

REFRESH_S = 0.5


class Display:
    """Prints on rank 0 (`enabled`), stays silent on the others, and writes every line with its time into the file `log`.
    `launched` by mpirun or srun, it prints lines even on a terminal: Open MPI gives ranks a terminal of their own also where it
    then writes to a file, so a rank cannot tell, and lines are right everywhere."""

    def __init__(self, enabled: bool, view: LiveView, log: Path, launched: bool):
        self.enabled, self.view = enabled, view
        self._first_step, self._started = 0, time.monotonic()
        self._log = open(log, "a", encoding="utf-8") if enabled else None  # noqa: SIM115
        self._terminal = enabled and sys.stdout.isatty() and not launched
        self._live: Live | None = None
        self._refreshed = 0.0

    def start(self, first_step: int) -> None:
        """Start the live view: the header has been printed, and training goes on from `first_step`."""
        self._first_step, self._started = first_step, time.monotonic()
        if self._terminal and self.view.steps > first_step:
            self._live = Live(self.view, auto_refresh=False)
            self._live.start()

    def print(self, text: str = "") -> None:
        """Print text as it is, and log it."""
        self.log_only(text)
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, flush=True)

    def log_line(self, text: str) -> None:
        """Print an event with the time of day, and log it; a terminal shows it without the time."""
        if self.enabled and not self._terminal:
            self.log_only(text)
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        else:
            self.print(text)

    def log_only(self, text: str) -> None:
        """Write text into the log file. Errors of the file never stop the run: a full disk stops checkpoints, not lines."""
        if self._log is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            try:
                self._log.write("".join(f"{now}  {line}".rstrip() + "\n" for line in text.split("\n")))
                self._log.flush()
            except OSError:
                self._log = None

    def show_step(self, done: int, row: dict[str, Any], logged: bool) -> None:
        """Show that `done` steps are done. `row`: metrics of the last one, which gets a line if it is `logged`."""
        if self.enabled and logged:
            log = self.log_line if self._live is None else self.log_only
            log(self._format_step(done, row))
        elif self._live is not None:
            self.view.update(row)
        if self._live is not None and time.monotonic() > self._refreshed + REFRESH_S:
            self._live.refresh()
            self._refreshed = time.monotonic()

    def _format_step(self, done: int, row: dict[str, Any]) -> str:
        steps, elapsed_s = self.view.steps, time.monotonic() - self._started
        left = format_duration(elapsed_s / (done - self._first_step) * (steps - done))
        text = f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"
        straggler = self.view.describe_straggler()
        return f"step {done:>{len(str(steps))}}/{steps}  {text}  {left} left{f'  ({straggler})' if straggler else ''}"

    def close(self) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None
