"""The plots of a report as PNG files, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.errors import ConfigError, FileError
from mpilm.parallel.pipeline.draw import ACTION_COLORS
from mpilm.telemetry.report.charts import PART_COLORS, Bars, Chart, curves
from mpilm.telemetry.report.page import OURS, refuse_other, replace
from mpilm.telemetry.report.read import Run
from mpilm.telemetry.report.sections import rank_bars
from mpilm.telemetry.report.timeline import Traced, traced

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a4a9b3")  # Okabe and Ito, 2008


def save(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Draw every plot of the runs into `folder`; returns the files.

    Raises ConfigError without matplotlib, FileError where a file cannot be written or is no plot of a report.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'mpilm[report]'") from None
    into = Path(folder)
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--png {folder}: cannot be made: {error.strerror}") from None
    drawings: dict[str, Any] = {}
    for chart in curves(runs):
        drawings[chart.key] = _curves(Figure(figsize=(7, 4), layout="constrained"), chart)
    for i, run in enumerate(runs):
        suffix = f"-{i}" if len(runs) > 1 else ""
        for bars in rank_bars(run, suffix):
            drawings[bars.key] = _bars(Figure(figsize=(7, 1.4 + 0.3 * len(bars.names)), layout="constrained"), bars)
        step = traced(run.trace) if run.trace is not None else None
        if step is not None and step.drawable:
            height = 1.2 + 0.35 * len(step.ranks) * (1 + (step.simulated is not None))
            drawings[f"timeline{suffix}"] = _timeline(Figure(figsize=(10, height), layout="constrained"), step)
    return [_write(figure, into / f"{key}.png") for key, figure in drawings.items()]


def _write(figure: Any, path: Path) -> Path:
    refuse_other(path)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, metadata={"Software": OURS.decode()})
    replace(path, image.getvalue())
    return path


def _curves(figure: Any, chart: Chart) -> Any:
    axes = figure.subplots()
    for each in chart.series:
        color = COLORS[each.color % len(COLORS)]
        faint = each.style == "faint"
        marker, label = ("o" if each.style == "dots" or len(each.x) == 1 else None), None if faint else each.name
        axes.plot(each.x, each.y, color=color, alpha=0.4 if faint else 1.0, linewidth=0.8 if faint else 1.4, marker=marker,
                  markersize=4, label=label)  # fmt: skip
    for step, _ in chart.marks:
        axes.axvline(step, color="0.6", linestyle=":", linewidth=1)
    if chart.log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(chart.unit)
    axes.set_title(chart.title, fontsize=11)
    axes.grid(alpha=0.3)
    if sum(each.style != "faint" for each in chart.series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _bars(figure: Any, chart: Bars) -> Any:
    axes = figure.subplots()
    left = np.zeros(len(chart.names))
    for part, values in chart.parts.items():
        axes.barh(chart.names, np.nan_to_num(values), left=left, color=COLORS[PART_COLORS[part]], label=part)
        left = left + np.nan_to_num(values)
    if chart.marks is not None:
        axes.plot(chart.marks, chart.names, "|", color="black", markersize=14, label=chart.mark_name)
    axes.invert_yaxis()
    axes.set_xlabel(chart.unit)
    axes.set_title(chart.title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(chart.parts) + 1, frameon=False, fontsize=8)
    return figure


def _timeline(figure: Any, step: Traced) -> Any:
    both = [("measured", step.measured), *([("simulated", step.simulated)] if step.simulated is not None else [])]
    for axes, (name, timeline) in zip(np.atleast_1d(figure.subplots(len(both), sharex=True)), both):
        for event in timeline.events:
            if not event.waiting:
                color = tuple(part / 255 for part in ACTION_COLORS[event.action.kind])
                width = event.end_s - event.start_s
                axes.broken_barh([(event.start_s, width)], (event.rank - 0.4, 0.8), facecolor=color, edgecolor="white",
                                 linewidth=0.4)  # fmt: skip
        axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in step.ranks])
        axes.invert_yaxis()
        axes.set_title(f"step {step.step}, {name}: bubble {100 * timeline.bubble:.1f}%", fontsize=10)
    axes.set_xlabel("ms")
    return figure
