"""Console output of a run: a live view on a terminal, while it trains or from its folder (mpilm.watch), and lines elsewhere."""

import contextlib
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from mpilm.config.parse import merge_settings, read_toml
from mpilm.config.schema import Config
from mpilm.data.files import file_errors
from mpilm.errors import ConfigError, FileError
from mpilm.formatting import count_noun, format_duration, format_mebibytes
from mpilm.telemetry.metrics import SLOW_STEPS, MetricsFollower, MetricsRow, select_stragglers

REFRESH_S = 0.5  # of a run that trains
MAX_POINTS = 4000  # losses that the curve is drawn from
MAX_EVENTS = 3  # the latest ones are shown
SILENT_S = 60.0
STEP_KEYS = frozenset({"step", "time", "loss", "grad_norm", "lr"})
EVALUATION_KEYS = frozenset({"step", "time", "eval_loss"})
EVENT_TEXTS = {
    "start": "started on {ranks} at step {step}",
    "saved": "saved step {step}",
    "skipped": "skipped: {why}",
    "not saved": "step {step} not saved: {why}",
    "stopped": "{why}",
    "balanced": "{why}",
    "overlap": "{why}",
}
FINAL_STATES = {"end": "done", "stopped": "stopped"}
BRAILLE_DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # bits by column, from the bottom row up (from U+2800)


class LiveView:
    """The state of a run after the rows so far, as a renderable of rich. Rows that lack keys that it shows are ignored."""

    def __init__(self, name: str, steps: int, save_every: int):
        self.name = name
        self.steps = steps  # of the whole run
        self.save_every = save_every  # steps between checkpoints; 0: none
        self.final_state = ""  # "done" or "stopped", once the run has ended
        self._start: MetricsRow = {}
        self._step: MetricsRow = {}  # the last row of a step
        self._done = 0  # steps
        self._ranks: MetricsRow = {}  # the last row with numbers of every rank
        self._evaluation: MetricsRow = {}
        self._best_loss = math.inf  # of the evaluations
        self._peak_bytes: list[int] = []  # by rank
        self._step_s = 0.0
        self._compute_s: deque[tuple[int, Sequence[float]]] = deque()  # of every rank, in the last SLOW_STEPS
        self._losses: deque[float] = deque(maxlen=MAX_POINTS)
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)

    def update(self, row: MetricsRow) -> None:
        """Add a row of metrics.jsonl, or of a step that is not logged."""
        row = {key: value for key, value in row.items() if key not in IS_SHOWABLE or IS_SHOWABLE[key](value)}
        event, text = row.get("event"), _describe_event(row)
        if text and event == "start":
            self._start, self._ranks, self.final_state = row, {}, ""
            self._compute_s.clear()
        if text and event in FINAL_STATES:
            self.final_state = FINAL_STATES[event]
            self._peak_bytes = row.get("peak_memory_on_rank_bytes", self._peak_bytes)
        if text and event != "end":
            self._events.append(text)
        if (text and event in ("start", "saved")) or row.keys() >= STEP_KEYS:
            self._done = row["step"]
        if row.keys() >= EVALUATION_KEYS:
            self._evaluation, self._best_loss = row, min(self._best_loss, row["eval_loss"])
        if row.keys() >= STEP_KEYS and isinstance(row["loss"], float):
            self._step = row
            self._losses.append(row["loss"])
            self._step_s = row.get("step_s", self._step_s)
            if row.keys() >= {"rank_s", "memory_bytes"}:
                self._ranks, self._peak_bytes = row, row["memory_bytes"]
                self._compute_s.append((row["step"], row["rank_s"]["compute"]))
                while len(self._compute_s) > 2 and self._compute_s[1][0] <= row["step"] - SLOW_STEPS:
                    self._compute_s.popleft()

    def __rich__(self) -> RenderableType:
        """Render the view as it is now."""
        table = Table.grid(Column(style="dim"), Column(), padding=(0, 2))
        for name, text in self._rows():
            table.add_row(name, text)
        bar = Table.grid(padding=(0, 1))
        step = Text(f"step {self._done}/{self.steps}", style="bold")
        bar.add_row(step, ProgressBar(max(1, self.steps), self._done, width=30), self._remaining())
        curve = "\n".join(draw_curve(self._losses))
        curves: list[RenderableType] = [Text(curve, style="cyan"), ""] if curve.strip() else []
        events: list[RenderableType] = ["", *(Text(event, style="dim") for event in self._events)] if self._events else []
        return Group(self._title(), bar, "", *curves, table, *events)

    def describe_straggler(self) -> str:
        """Name the rank that computes longest; empty if it is not clearly slower than most in all of the last rows."""
        if not self._compute_s:
            return ""
        steps, rows = zip(*self._compute_s)
        others = "the other rank" if len(rows[0]) == 2 else "most"
        slowest = select_stragglers(steps, np.array(rows))[:1]
        return "".join(f"rank {rank} computes {ratio:.1f} times as long as {others}" for rank, ratio, _ in slowest)

    def _title(self) -> Text:
        ranks, layout = self._start.get("ranks"), self._start.get("layout", {})
        sizes = [f"{axis} {size}" for axis, size in layout.items() if isinstance(size, int) and size > 1 and axis != "zero"]
        zero = [f"ZeRO-{layout['zero']}"] if layout.get("zero") else []
        subtitle = ", ".join([count_noun(ranks, "rank"), *sizes, *zero]) if ranks else "no rows yet"
        return Text.assemble((self.name, "bold"), "  ", (subtitle, "dim"))

    def _remaining(self) -> str:
        silent_s = time.time() - self._step["time"] if self._step else 0.0
        if self.final_state:
            return self.final_state
        if silent_s > max(SILENT_S, 20 * self._step_s):
            return f"no update for {format_duration(silent_s)}"
        return f"{format_duration(self._step_s * (self.steps - self._done))} left" if self._step_s else ""

    def _rows(self) -> Iterable[tuple[str, str]]:
        row = self._step
        if row:
            yield "loss", f"{row['loss']:.4f}   gradient norm {row['grad_norm']:.2f}   learning rate {row['lr']:.2e}"
        if self._evaluation:
            best = "" if self._evaluation["eval_loss"] <= self._best_loss else f", best {self._best_loss:.4f}"
            yield "evaluation", f"{self._evaluation['eval_loss']:.4f} at step {self._evaluation['step']}{best}"
        if row.keys() >= {"tokens_per_s", "step_s"}:
            mfu = f"   MFU {row['mfu']:.1%}" if "mfu" in row else ""
            yield "speed", f"{row['tokens_per_s']:,.0f} tokens/s   {row['step_s']:.3g} s per step{mfu}"
        if self._ranks:
            mean_s = {category: statistics.fmean(seconds) for category, seconds in self._ranks["rank_s"].items()}
            step_s = self._ranks.get("step_s") or sum(mean_s.values())
            yield "time", "   ".join(f"{category} {s / step_s:.0%}" for category, s in mean_s.items() if s > 0.005 * step_s)
            yield "slowest", self.describe_straggler() or "no rank is clearly slower than most"
            predicted = self._start.get("predicted_memory_bytes")
            suffix = f", {format_mebibytes(predicted)} predicted" if predicted else ""
            yield "memory", f"at most {format_mebibytes(max(self._peak_bytes))} per rank{suffix}"
        if self.save_every and row and self._done < self.steps:
            steps = min(self.save_every - self._done % self.save_every, self.steps - self._done)
            yield "checkpoint", f"in {count_noun(steps, 'step')}, {format_duration(steps * self._step_s)}"


def _describe_event(row: MetricsRow) -> str:
    """Return an event's line; empty if the row is not an event or lacks something."""
    ranks = {"ranks": count_noun(row["ranks"], "rank")} if "ranks" in row else {}
    try:
        text = EVENT_TEXTS.get(row["event"], "{event} at step {step}").format_map(row | ranks)
        line = f"{time.strftime('%H:%M:%S', time.localtime(row['time']))}  {text}"
        return line.encode(errors="replace").decode()  # half a surrogate pair has no UTF-8
    except (KeyError, ValueError, OverflowError, OSError):  # the last three: no such time
        return ""


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def _are_finite(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) > 0 and all(map(_is_finite, values))


IS_SHOWABLE: Mapping[str, Callable[[Any], bool]] = {  # values by key: anything may have written the file
    **dict.fromkeys(("step", "time", "lr", "step_s", "tokens_per_s", "mfu", "ranks", "predicted_memory_bytes"), _is_finite),
    **dict.fromkeys(("loss", "grad_norm", "eval_loss"), lambda value: type(value) is float or _is_finite(value)),
    **dict.fromkeys(("memory_bytes", "peak_memory_on_rank_bytes"), _are_finite),
    "rank_s": lambda value: isinstance(value, dict) and "compute" in value and all(map(_are_finite, value.values())),
    "event": lambda value: isinstance(value, str),
    "layout": lambda value: isinstance(value, dict),
}


def draw_curve(values: Iterable[float], columns: int = 48, rows: int = 4) -> list[str]:
    """Return the finite values as lines of braille characters, labelled with the highest and the lowest."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return [""] * rows
    points = [float(part.mean()) for part in np.array_split(finite, min(2 * columns, len(finite)))]
    low, high = min(points), max(points)
    scale = (4 * rows - 1) / (high - low) if high > low else 0.0
    heights = [round((point - low) * scale) for point in points]
    cells = [[0x2800] * columns for _ in range(rows)]
    for x, (previous, height) in enumerate(zip([heights[0], *heights], heights)):
        for y in range(min(previous, height), max(previous, height) + 1):
            cells[rows - 1 - y // 4][x // 2] |= BRAILLE_DOTS[x % 2][y % 4]
    labels = {0: f" {high:.3f}", rows - 1: f" {low:.3f}"}
    return ["".join(map(chr, line)) + labels.get(number, "") for number, line in enumerate(cells)]


class Display:
    """Prints on rank 0 alone (`enabled`) and writes every line with its time into the file `log`. `launched` by mpirun or srun,
    it prints lines even on a terminal: Open MPI gives ranks one also where it then writes to a file, so a rank cannot tell."""

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


def watch_run(folder: str, interval_s: float, once: bool) -> None:
    """Show a run until it ends or Ctrl-C; only once with `once`, or where the output is not a terminal."""
    if folder and not Path(folder).exists():
        raise FileError(f"{folder}: folder not found")
    if not (Path(folder) / "config.toml").is_file():
        raise ConfigError(f"{folder or 'no folder given'}: write the folder of a run: python -m mpilm.watch runs/NAME")
    follower, console = MetricsFollower(Path(folder) / "metrics.jsonl"), Console()
    view = _follow(_open_view(Path(folder)), follower)
    if once or not console.is_terminal:
        console.print(view)
        return
    with contextlib.suppress(KeyboardInterrupt), Live(view, console=console, auto_refresh=False) as live:
        while not view.final_state:
            time.sleep(interval_s)
            view = _follow(view, follower)
            live.update(view, refresh=True)


def _open_view(folder: Path) -> LiveView:
    config = merge_settings(Config(), read_toml(folder / "config.toml"), str(folder / "config.toml"))
    return LiveView(str(folder), config.train.steps, config.checkpoint.every)


def _follow(view: LiveView, follower: MetricsFollower) -> LiveView:
    """Return the view updated with new rows; a fresh view if a resume has removed rows."""
    with file_errors(follower.path):
        rows, restarted = follower.read()
    view = _open_view(follower.path.parent) if restarted else view
    for row in rows:
        if row.get("event") == "start":
            view.steps = _open_view(follower.path.parent).steps  # a resume may have changed it
        view.update(row)
    return view
