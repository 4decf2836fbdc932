"""A run at a glance, for a terminal: made of the rows of its metrics, while it trains or from its folder."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpilm.telemetry.words import duration, mebibytes, slowest

CURVE = 48, 4  # columns and rows of the loss curve
KEPT = 4000  # losses that the curve is drawn of
EVENTS = 3  # the last ones shown
SILENT_S = 60.0
NEEDED = {
    "start": ("step", "ranks"),
    "saved": ("step",),
    "skipped": ("why",),
    "not saved": ("step", "why"),
    "stopped": ("why",),
}
ENDS = {"end": "done", "stopped": "stopped"}
DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # of a braille character: columns, from below (Unicode 2800)


class Glance:
    """What the rows so far say. `steps`: of the whole run; `save_every`: steps between checkpoints, 0 for none."""

    def __init__(self, name: str, steps: int, save_every: int):
        self.name, self.steps, self.save_every = name, steps, save_every
        self.start: dict[str, Any] = {}
        self.row: dict[str, Any] = {}
        self.ranks: dict[str, Any] = {}  # the last row that tells of every rank
        self.evaluation: dict[str, Any] = {}
        self.best = math.inf
        self.ended = ""  # or how
        self.peaks: list[int] = []  # of memory, by rank
        self.step_s = 0.0
        self.losses: deque[float] = deque(maxlen=KEPT)
        self.events: deque[str] = deque(maxlen=EVENTS)

    def see(self, row: dict[str, Any]) -> None:
        """One more row of metrics.jsonl, or of a step that is not written down; one that lacks what is shown is passed over."""
        if not _needed(row) <= row.keys():
            return
        event = row.get("event", "")
        if event == "start":
            self.start, self.ended = row, ""
        if event in ENDS:
            self.ended = ENDS[event]
            self.peaks = row.get("peak_memory_on_rank_bytes", [])
        if event and event != "end":
            self.events.append(f"{time.strftime('%H:%M:%S', time.localtime(row['time']))}  {_told(row)}")
        if "eval_loss" in row:
            self.evaluation, self.best = row, min(self.best, row["eval_loss"])
        if isinstance(row.get("loss"), float):
            self.row = row
            self.losses.append(row["loss"])
            self.step_s = row.get("step_s", self.step_s)
        if "rank_s" in row:
            self.ranks, self.peaks = row, row["memory_bytes"]

    def __rich__(self) -> RenderableType:
        return self.view(time.time())

    def view(self, now: float) -> RenderableType:
        """`now`: seconds of time.time."""
        done = self.row.get("step", self.start.get("step", 0))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        for name, text in self._lines(done, now):
            table.add_row(name, text)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {done:,}/{self.steps:,}", style="bold"),
            ProgressBar(max(1, self.steps), done, width=30),
            self._left(done, now),
        )
        lines = curve(self.losses)
        drawn: list[RenderableType] = [Text("\n".join(lines), style="cyan"), ""] if any(lines) else []
        return Group(self._title(), bar, "", *drawn, table, *self._events())

    def _title(self) -> Text:
        ranks, layout = self.start.get("ranks"), self.start.get("layout", {})
        sizes = [f"{axis} {layout[axis]}" for axis in ("data", "pipeline", "tensor", "context") if layout.get(axis, 1) > 1]
        zero = [f"ZeRO-{layout['zero']}"] if layout.get("zero") else []
        said = ", ".join([f"{ranks} rank{'s' * (ranks > 1)}", *sizes, *zero]) if ranks else "no rows yet"
        return Text.assemble((self.name, "bold"), "  ", (said, "dim"))

    def _left(self, done: int, now: float) -> str:
        if self.ended:
            return self.ended
        silent_s = now - self.row.get("time", now)
        if silent_s > max(SILENT_S, 20 * self.step_s):
            return f"no word for {duration(silent_s)}"
        return f"{duration(self.step_s * (self.steps - done))} left" if self.step_s else ""

    def _lines(self, done: int, now: float) -> Iterable[tuple[str, str]]:
        row = self.row
        if row:
            loss = f"{row['loss']:.4f}   gradient norm {row['grad_norm']:.2f}   learning rate {row['lr']:.2e}"
            yield "loss", loss
        if self.evaluation:
            best = "" if self.evaluation["eval_loss"] <= self.best else f", best {self.best:.4f}"
            yield "evaluation", f"{self.evaluation['eval_loss']:.4f} at step {self.evaluation['step']:,}{best}"
        if "tokens_per_s" in row:
            used = f"   MFU {row['mfu']:.1%}" if "mfu" in row else ""
            yield "speed", f"{row['tokens_per_s']:,.0f} tokens/s   {row['step_s']:.3g} s a step{used}"
        yield from self._of_ranks()
        if self.save_every and row and done < self.steps:
            steps = min(self.save_every - done % self.save_every, self.steps - done)
            yield "checkpoint", f"in {steps:,} step{'s' * (steps != 1)}, {duration(steps * self.step_s)}"

    def _of_ranks(self) -> Iterable[tuple[str, str]]:
        if not self.ranks:
            return
        parts = {part: sum(seconds) / len(seconds) for part, seconds in self.ranks["rank_s"].items()}
        whole = self.ranks.get("step_s") or sum(parts.values())
        yield "time", "   ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items() if seconds > 0.005 * whole)
        yield "slowest", slowest(self.ranks["rank_s"]["compute"]).strip(" ()") or "no rank is clearly slower than most"
        predicted = self.start.get("predicted_memory_bytes")
        yield (
            "memory",
            mebibytes(max(self.peaks)) + " a rank at most" + (f", {mebibytes(predicted)} predicted" if predicted else ""),
        )

    def _events(self) -> list[RenderableType]:
        return ["", *(Text(event, style="dim") for event in self.events)] if self.events else []


def _needed(row: dict[str, Any]) -> set[str]:
    """What a row of its kind must have to be shown."""
    needed = {"time", *NEEDED.get(str(row.get("event")), ())}
    return needed | ({"step", "grad_norm", "lr"} if "loss" in row else set()) | ({"step"} if "eval_loss" in row else set())


def _told(row: dict[str, Any]) -> str:
    """An event in a few words."""
    match row["event"]:
        case "start":
            since = f", from step {row['step']}" if row["step"] else ""
            return f"started on {row['ranks']} rank{'s' * (row['ranks'] > 1)}{since}"
        case "saved":
            return f"saved step {row['step']}"
        case "skipped":
            return f"left out: {row['why']}"
        case "not saved":
            return f"step {row['step']} not saved: {row['why']}"
        case "stopped":
            return str(row["why"])
    return f"{row['event']} at step {row.get('step', '?')}"


def curve(values: Iterable[float], columns: int = CURVE[0], rows: int = CURVE[1]) -> list[str]:
    """The values as lines of braille characters, with the highest and the lowest beside them; those that are not finite are
    left out."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return [""] * rows
    points = _means(finite, 2 * columns)
    low, high = min(points), max(points)
    scale = (4 * rows - 1) / (high - low) if high > low else 0.0
    cells = [[0x2800] * columns for _ in range(rows)]
    heights = [round((point - low) * scale) for point in points]
    for x, height in enumerate(heights):
        before = heights[max(0, x - 1)]
        for y in range(min(before, height), max(before, height) + 1) if before != height else [height]:
            cells[rows - 1 - y // 4][x // 2] |= DOTS[x % 2][y % 4]
    labels = {0: f" {high:.3f}", rows - 1: f" {low:.3f}"}
    return ["".join(map(chr, line)) + labels.get(number, "") for number, line in enumerate(cells)]


def _means(values: Sequence[float], most: int) -> list[float]:
    """At most so many values: means of neighbours."""
    count = min(most, len(values))
    ends = [len(values) * i // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
