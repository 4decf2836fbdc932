"""Which plots a report has, as descriptions that svg.py and png.py draw alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpilm.telemetry.report.ranks import parts_over_time
from mpilm.telemetry.report.read import Run
from mpilm.telemetry.report.thin import m4, means

BUCKETS = 800  # columns of a picture; shared by the runs that are compared
NOISY = 400  # points from which on their mean is drawn too
TREND = 160  # points of it
MOST_TICKS = 7
PART_COLORS = {
    "compute": 0, "communication": 1, "bubble": 6, "data": 2, "optimizer": 3, "checkpoint": 4, "other": 5, "memory": 0,
}  # fmt: skip
WIDE = 50  # times the smallest value: a logarithmic axis shows more


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    x: np.ndarray
    y: np.ndarray
    """Finite, as x."""
    color: int
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Chart:
    """Curves over steps."""

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[tuple[float, str], ...] = ()
    """Steps at which something happened, and what."""
    from_zero: bool = False

    @property
    def log(self) -> bool:
        """Whether the values are spread too wide for a linear axis."""
        low = min(float(each.y.min()) for each in self.series)
        high = max(float(each.y.max()) for each in self.series)
        return not self.from_zero and 0 < WIDE * low < high


@dataclass(frozen=True)
class Bars:
    """A bar for each row, made of parts laid end to end."""

    key: str
    title: str
    unit: str
    names: tuple[str, ...]
    parts: Mapping[str, np.ndarray]
    """Values of each part, (rows,)."""
    marks: np.ndarray | None = None
    """A value of each row to compare the bar with; NaN: none."""
    mark_name: str = ""

    @property
    def largest(self) -> float:
        """The end of the axis."""
        ends = [np.sum(list(self.parts.values()), axis=0), *([self.marks] if self.marks is not None else [])]
        return max(float(np.nanmax(end)) if np.isfinite(end).any() else 0.0 for end in ends) or 1.0


def curves(runs: Sequence[Run]) -> list[Chart]:
    """The plots over steps, of one run or several laid over each other; those with nothing to show are left out."""
    marks = _marks(runs[0]) if len(runs) == 1 else ()
    charts = [
        _of_column(runs, "loss", "Loss", "nats a token", marks),
        _of_column(runs, "grad_norm", "Gradient norm", "before clipping"),
        _of_column(runs, "lr", "Learning rate", ""),
        _of_column(runs, "tokens_per_s", "Throughput", "tokens a second"),
        _of_column(runs, "mfu", "MFU", "% of the peak of all ranks", scale=100.0),
        *([_of_time(runs[0])] if len(runs) == 1 else []),
    ]
    return [chart for chart in charts if chart.series]


def _of_column(
    runs: Sequence[Run], key: str, title: str, unit: str, marks: tuple[tuple[float, str], ...] = (), scale: float = 1.0
) -> Chart:
    series: list[Series] = []
    for color, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        x, y = run.rows.columns["step"], run.rows.columns[key] * scale
        series += _curve(prefix + title.lower(), x, y, color, len(runs))
        if key == "loss":
            series += _evaluations(run, prefix, color if prefix else 1)
    return Chart(key, title, unit, tuple(series), marks)


def _curve(name: str, x: np.ndarray, y: np.ndarray, color: int, runs: int) -> list[Series]:
    """The curve with its extremes and, where it is long, the mean on top."""
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if not len(y):
        return []
    kept = m4(y, max(100, BUCKETS // runs))
    if len(y) <= NOISY:
        return [Series(name, x[kept], y[kept], color)]
    return [Series(name, x[kept], y[kept], color, "faint"), Series(f"{name} (mean)", *means(x, y, TREND), color)]


def _evaluations(run: Run, prefix: str, color: int) -> list[Series]:
    steps, losses = run.rows.evaluations[:, 0], run.rows.evaluations[:, 2]
    there = np.isfinite(steps) & np.isfinite(losses)
    if not there.any():
        return []
    kept = m4(losses[there], BUCKETS // 4)
    return [Series(f"{prefix}evaluation", steps[there][kept], losses[there][kept], color, "dots")]


def _marks(run: Run) -> tuple[tuple[float, str], ...]:
    """Where the run was taken up again or left steps out; of many, the first ones."""
    found = [
        (float(row["step"]), "resumed" if row["event"] == "start" else "skipped")
        for row in run.rows.events
        if row["event"] in ("start", "skipped") and isinstance(row.get("step"), int) and row["step"] > 0
    ]
    return tuple(found[:40])


def _of_time(run: Run) -> Chart:
    """Where the seconds of a step go, mean over ranks, as the run goes on."""
    steps, parts = parts_over_time(run)
    series = [Series(part, steps, seconds, PART_COLORS[part]) for part, seconds in parts.items() if seconds.any()]
    found = tuple(series) if len(steps) > 1 else ()
    return Chart("step_time", "Where a step's time goes", "seconds a step, mean over ranks", found, from_zero=True)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * 0.999)
    first = int(np.ceil(low / step - 1e-9))
    return [i * step for i in range(first, int(np.floor(high / step + 1e-9)) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and some between them where they are few."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    every = max(1, len(decades) // 6)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**e for e in decades[::every] for d in digits if low <= d * 10.0**e <= high]
        if len(found) <= MOST_TICKS:
            break
    return found


def short(value: float) -> str:
    """A number for an axis or a tile: 0, 3e-4, 0.25, 1,250, 12.5k, 3.2M."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"
