"""The charts of a report, each described once: the page draws them with plotly, `draw_chart` with matplotlib."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpilm.errors import ConfigError
from mpilm.formatting import format_number
from mpilm.planner.draw import ACTION_COLORS, KIND_NAMES, action_label, chunk_letter
from mpilm.planner.simulate import TimelineEvent
from mpilm.report.read import RecordedRun
from mpilm.report.summary import average_parts, average_values, measure_peak_memory, split_step
from mpilm.report.trace import TracedStep, find_traced_step
from mpilm.telemetry.metrics import per_rank_values, to_float

BUCKETS = 1200  # stretches of a long curve, shared by the runs that are compared
NOISY = 400  # a curve with more points than this is smoothed at first
TREND_POINTS = 160  # in an image
LOG_RATIO = 50  # a wider range of values gets a logarithmic axis
MAX_MARKS = 40
MAX_ROWS = 32  # more ranks than this are shown as their mean and the LARGEST
LARGEST = 8
MAX_ACTIONS = 6000  # a step with more is not drawn
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a4a9b3")  # Okabe and Ito, 2008
PART_COLORS = {"compute": 0, "communication": 1, "bubble": 6, "data": 2, "optimizer": 3, "checkpoint": 4, "other": 5}


EXPERT_SHARES = (
    ("expert_share", "Load of each expert", "expert"),
    ("expert_rank_share", "Load of each rank of the expert axis, while it had as many", "its rank"),
)


@dataclass(frozen=True)
class Series:
    """A curve, or all bars of one colour."""

    name: str
    x: np.ndarray  # steps of a curve, lengths of bars
    y: np.ndarray  # finite values of a curve, row numbers of bars
    color: int | str  # index into COLORS, or a colour
    kind: Literal["line", "dots", "bar", "tick", "text"] = "line"  # text has no entry in the legend
    start: np.ndarray | None = None  # where each bar begins
    labels: tuple[str, ...] = ()  # printed in bars
    opacity: float = 1.0
    mean: tuple[np.ndarray, np.ndarray] | None = None  # x and y of each stretch of a downsampled curve


@dataclass(frozen=True)
class Chart:
    """Curves over steps, or horizontal bars in labelled rows."""

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]
    rows: tuple[str, ...] = ()  # labels, from the top
    marks: tuple[tuple[int, str], ...] = ()  # steps at which something happened, and what
    log: bool = False
    from_zero: bool = False


def downsample_m4(y: np.ndarray, buckets: int) -> np.ndarray:
    """Return the indices of the first, smallest, largest and last value of each of `buckets` stretches of y, in order. With one
    stretch per pixel column they draw the same pixels as all values, each spike included (Jugel et al., "M4", VLDB 2014)."""
    if len(y) <= 4 * buckets:
        return np.arange(len(y))
    width = -(-len(y) // buckets)
    indices = np.minimum(np.arange(buckets * width), len(y) - 1).reshape(buckets, width)  # the end repeats the last index
    values = y[indices]
    extremes = np.take_along_axis(indices, np.stack([values.argmin(1), values.argmax(1)], axis=1), axis=1)
    return np.unique(np.concatenate([indices[:, 0], indices[:, -1], extremes.ravel()]))


def average_buckets(x: np.ndarray, y: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of x and y over each of at most `buckets` stretches."""
    starts = np.arange(0, len(y), -(-len(y) // buckets))
    sizes = np.diff(starts, append=len(y))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def make_charts(runs: Sequence[RecordedRun]) -> list[Chart]:
    """Return the charts that have data: curves over steps, of several runs overlaid, and the charts of each run."""
    curves = [
        _make_curve(runs, "loss", "Loss", "nats per token"),
        _make_curve(runs, "grad_norm", "Gradient norm", "before clipping"),
        _make_curve(runs, "lr", "Learning rate", ""),
        _make_curve(runs, "tokens_per_s", "Throughput", "tokens/s"),
        _make_curve(runs, "mfu", "MFU", "% of the peak of all ranks", scale=100.0),
        *([_make_time_curve(runs[0])] if len(runs) == 1 else []),
    ]
    suffixes = [f"-{i}" for i in range(len(runs))] if len(runs) > 1 else [""]
    run_charts = [chart for run, suffix in zip(runs, suffixes) for chart in _make_run_charts(run, suffix)]
    return [chart for chart in curves + run_charts if chart.series]


def _make_curve(runs: Sequence[RecordedRun], key: str, title: str, unit: str, scale: float = 1.0) -> Chart:
    series, marks, several = list[Series](), list[tuple[int, str]](), len(runs) > 1
    for color, run in enumerate(runs):
        name, steps, values = run.name if several else title, run.metrics.columns["step"], run.metrics.columns[key]
        series += _make_lines(name, steps, scale * values, color, max(100, BUCKETS // len(runs)))
        if key == "loss":
            steps, _, losses = run.metrics.evaluations.T
            name, index = (f"{name}: evaluation", color) if several else ("Evaluation", 1)
            series += _make_lines(name, steps, losses, index, 200, "dots")
        if key == "loss" and not several:
            resumed = [(row["step"], "resumed") for row in run.starts if row.get("step", 0) > 0]
            marks = resumed + [(row["step"], "skipped") for row in run.find_events("skipped") if "step" in row]
    low, high = (extreme((extreme(each.y) for each in series), default=0.0) for extreme in (min, max))
    log, from_zero = 0 < LOG_RATIO * low < high, 0 <= low < 0.4 * high
    return Chart(key, title, unit, tuple(series), (), tuple(marks[:MAX_MARKS]), log, from_zero)


def _make_lines(
    name: str, x: np.ndarray, y: np.ndarray, color: int, buckets: int, kind: Literal["line", "dots"] = "line"
) -> list[Series]:
    """Return the curve, downsampled if it is long; none if it has no finite value."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    kept = downsample_m4(y, buckets)
    mean = average_buckets(x, y, buckets) if len(kept) < len(y) else None
    return [Series(name, x[kept], y[kept], color, kind, mean=mean)] if len(y) else []


def _make_time_curve(run: RecordedRun) -> Chart:
    splits = [(to_float(row.get("step")), parts) for row in run.metrics.samples if (parts := split_step(row)) is not None]
    steps = np.array([step for step, _ in splits])
    means = {part: np.array([parts[part].mean() if part in parts else 0.0 for _, parts in splits]) for part in PART_COLORS}
    series = [Series(part, steps, mean, PART_COLORS[part]) for part, mean in means.items() if mean.any() and len(steps) > 1]
    return Chart("step_time", "Step time by part", "seconds, mean over ranks", tuple(series), from_zero=True)


def _make_run_charts(run: RecordedRun, suffix: str) -> list[Chart]:
    """Return step time and memory of each rank and the timeline of a traced step, as far as they are known."""
    charts, parts, (peak, source) = list[Chart](), average_parts(run), measure_peak_memory(run)
    if parts:
        ms = {part: 1000 * seconds for part, seconds in parts.items()}
        names = run.name_ranks(next(iter(ms.values())))
        charts.append(_make_bars(names, f"time{suffix}", "Step time of each rank", "ms, mean over the run", ms))
    if peak is not None:
        predicted = per_rank_values(run.start.get("predicted_memory_on_rank_bytes"))
        predicted = predicted / 2**20 if predicted is not None and len(predicted) == len(peak) else None
        memory, unit = {"memory": peak / 2**20}, f"MiB, {source}"
        charts.append(_make_bars(run.name_ranks(peak), f"memory{suffix}", "Memory of each rank", unit, memory, predicted))
    for key, title, label in EXPERT_SHARES:
        if (shares := average_values(run, key)) is not None:
            names, unit = [f"{label} {i}" for i in range(len(shares))], "times an even share, mean over steps"
            charts.append(_make_bars(names, f"{key}{suffix}", title, unit, {"tokens": len(shares) * shares}))
    traced = find_traced_step(run.trace) if run.trace else None
    if traced and len(traced.measured.events) <= MAX_ACTIONS:
        charts.append(_make_timeline(traced, f"timeline{suffix}"))
    return charts


def _make_bars(
    names: Sequence[str], key: str, title: str, unit: str, parts: dict[str, np.ndarray], predicted: np.ndarray | None = None
) -> Chart:
    """Return a bar for each rank or expert; of many, for their mean and for those whose first part is largest."""
    first = next(iter(parts.values()))
    is_long = len(first) > MAX_ROWS
    ranks = np.argsort(-first)[:LARGEST].tolist() if is_long else list(range(len(first)))
    names = [f"mean of {len(first):,}"] * is_long + [names[rank] for rank in ranks]

    def choose(values: np.ndarray) -> np.ndarray:
        return np.nan_to_num(np.concatenate([[values.mean()], values[ranks]]) if is_long else values)

    ends, y, series = np.zeros(len(names)), np.arange(len(names)), []
    for part, values in parts.items():
        if values.any():
            series.append(Series(part, choose(values), y, PART_COLORS.get(part, 0), "bar", start=ends))
            ends = ends + choose(values)
    labels = tuple(map(format_number, ends))
    if predicted is not None:
        series.append(Series("predicted", choose(predicted), y, "black", "tick"))
        ends = np.maximum(ends, choose(predicted))
    series.append(Series("total", ends, y, "black", "text", labels=labels))
    return Chart(key, title, unit, tuple(series), rows=tuple(names))


def _make_timeline(traced: TracedStep, key: str) -> Chart:
    """Return the actions of a traced step, with those of the simulated step below them."""
    bars: dict[tuple[str, int], list[tuple[int, TimelineEvent]]] = defaultdict(list)  # kind and chunk -> row and event
    rows = list[str]()
    for label, timeline in (("rank", traced.measured), ("simulated", traced.simulated)):
        rows += [""] if rows and timeline else []
        for rank, events in zip(traced.ranks, timeline.by_rank if timeline else ()):
            for event in (event for event in events if not event.waiting):
                bars[event.action.kind, event.action.stage // len(traced.ranks)].append((len(rows), event))
            rows.append(f"{label} {rank}")
    series, chunks = [], traced.measured.chunks
    for kind, chunk in sorted(bars, key=lambda key: (list(KIND_NAMES).index(key[0]), key[1])):
        y, actions = zip(*bars[kind, chunk])
        start, end = np.array([(event.start_s, event.end_s) for event in actions]).T
        labels = tuple(action_label(event.action, traced.measured) for event in actions)
        name = KIND_NAMES[kind] + f", chunk {chunk_letter(chunk)}" * (chunks > 1)
        color, opacity = "#{:02x}{:02x}{:02x}".format(*ACTION_COLORS[kind]), 1 - 0.45 * chunk / max(1, chunks - 1)
        series.append(Series(name, end - start, np.array(y), color, "bar", start, labels, opacity))
    return Chart(key, f"Step {traced.step:,}", "ms", tuple(series), rows=tuple(rows))


def draw_chart(chart: Chart) -> Any:
    """Return the chart as a matplotlib figure. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'mpilm[report]'") from None
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(chart.rows) if chart.rows else 4.5), layout="constrained")
    axes = figure.subplots()
    for each in chart.series:
        color = each.color if isinstance(each.color, str) else COLORS[each.color % len(COLORS)]
        label = None if each.kind == "text" else each.name
        style: dict[str, Any] = {"color": color, "alpha": each.opacity, "label": label}
        if each.kind == "bar":
            axes.barh(each.y, each.x, left=each.start, edgecolor="white", linewidth=0.4, **style)
        elif each.kind == "text":
            axes.bar_label(axes.barh(each.y, each.x, alpha=0), each.labels, padding=4, fontsize=8)
        elif each.kind == "tick":
            axes.plot(each.x, each.y, "|", markersize=14, **style)
        else:
            x, y, marker = each.x, each.y, "o" if each.kind == "dots" or len(each.x) == 1 else None
            if each.kind == "line" and (each.mean or len(x) > NOISY):
                axes.plot(x, y, linewidth=0.8, color=color, alpha=0.4, zorder=1)
                x, y = average_buckets(*(each.mean or (x, y)), TREND_POINTS)
            style["linestyle"] = ("-", "--", ":")[int(each.color) // len(COLORS) % 3]
            axes.plot(x, y, linewidth=1.4, marker=marker, markersize=4, **style)
    for step, _ in chart.marks:
        axes.axvline(step, color="0.6", linestyle=":", linewidth=1)
    if chart.rows:
        axes.set(yticks=range(len(chart.rows)), yticklabels=chart.rows, xlabel=chart.unit, xmargin=0.08)
        axes.invert_yaxis()
    else:
        axes.set(xlabel="step", ylabel=chart.unit, yscale="log" if chart.log else "linear")
        axes.set_ylim(bottom=0 if chart.from_zero and not chart.log else None)
        axes.grid(alpha=0.3)
    axes.set_title(chart.title, fontsize=11)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
