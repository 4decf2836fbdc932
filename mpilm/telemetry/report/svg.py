"""Charts as HTML: curves in an SVG image that stretches with the page, and its words as text of the page, which does not."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from mpilm.telemetry.report.charts import PART_COLORS, Bars, Chart, Series, log_ticks, short, ticks

SIZE = 1000  # the image is SIZE x SIZE, whatever it is stretched to
COLORS = 7
WIDEST_NAME = 24  # characters; longer ones are broken


@dataclass(frozen=True)
class Axis:
    """From values to places in the image."""

    low: float
    high: float
    log: bool = False

    def part(self, values: np.ndarray | float) -> np.ndarray:
        """0 at the low end, 1 at the high one."""
        low, high = (np.log10([self.low, self.high])) if self.log else (self.low, self.high)
        return ((np.log10(values) if self.log else np.asarray(values)) - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, 6)


def axes(chart: Chart) -> tuple[Axis, Axis]:
    """Of steps and of values, with some air above and below."""
    left, right = _span([each.x for each in chart.series])
    low, high = _span([each.y for each in chart.series])
    if chart.log:
        return Axis(left, right), Axis(low / 1.15, high * 1.15, log=True)
    air = 0.06 * (high - low)
    bottom = 0.0 if chart.from_zero or 0 <= low < 0.4 * high else low - air
    return Axis(left, right), Axis(bottom, high + air)


def _span(values: list[np.ndarray]) -> tuple[float, float]:
    low, high = min(float(each.min()) for each in values), max(float(each.max()) for each in values)
    return (low, high) if high > low else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))


def curves(chart: Chart, wide: bool = False) -> str:
    """A figure with a caption, the plot, and a legend where there are several curves."""
    x, y = axes(chart)
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    lines = [f'<path class="grid" d="M0,{SIZE * (1 - y.part(at)):.1f}h{SIZE}"/>' for at in y.ticks]
    lines += [f'<path class="mark" d="M{SIZE * x.part(at):.1f},0v{SIZE}"/>' for at, _ in chart.marks]
    lines += [_path(each, x, y) for each in chart.series]
    words = [f'<span class="y" style="top:{100 * (1 - y.part(at)):.2f}%">{short(at)}</span>' for at in y.ticks]
    words += [f'<span class="x" style="left:{100 * x.part(at):.2f}%">{short(at)}</span>' for at in ticks(x.low, x.high, 5)]
    scale = f'data-x="{x.low!r} {x.high!r}" data-y="{y.low!r} {y.high!r}"' + ' data-log="1"' * y.log
    label = escape(f"{chart.title} over steps; " + "; ".join(_in_words(each) for each in chart.series), quote=True)
    image = f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return "\n".join([
        f'<figure class="chart{" wide" * wide}" id="plot-{chart.key}">',
        f"<figcaption><b>{escape(chart.title)}</b>{unit}</figcaption>",
        f'<div class="plot" {scale}>{image}', *lines, "</svg>", *words, "</div>", _legend(chart), "<output></output></figure>",
    ])  # fmt: skip


def _path(series: Series, x: Axis, y: Axis) -> str:
    """A line, or a dot for each point: a stroke of no length with round ends, which does not stretch."""
    across, down = SIZE * x.part(series.x), SIZE * (1 - y.part(series.y))
    digits = int(np.clip(np.ceil(np.log10(max(1.0, (x.high - x.low) / SIZE))) + 1, 1, 6))  # a step can be told
    points = [f"{a:.{digits}f},{b:.2f}" for a, b in zip(across.tolist(), down.tolist())]
    place = "M" + "h0M".join(points) + "h0" if series.style == "dots" or len(points) == 1 else "M" + "L".join(points)
    kind = "dots" if len(points) == 1 else series.style
    line = f'<path class="{kind} c{series.color % COLORS}" data-name="{escape(series.name, quote=True)}" d="{place}"/>'
    if series.style != "dots" or len(points) == 1:
        return line
    return f'<path class="thin c{series.color % COLORS}" d="M{"L".join(points)}"/>{line}'


def _in_words(series: Series) -> str:
    y = series.y
    return f"{series.name} from {short(y[0])} to {short(y[-1])}, lowest {short(y.min())}, highest {short(y.max())}"


def _legend(chart: Chart) -> str:
    entries = [
        f'<li><i class="{"dots" if each.style == "dots" else "line"} c{each.color % COLORS}"></i>{escape(each.name)}</li>'
        for each in chart.series
        if each.style != "faint"
    ]
    told = sorted({what for _, what in chart.marks})
    entries += [f'<li><i class="marked"></i>{escape(" or ".join(told))}</li>'] if told else []
    entries = entries if len(entries) > 1 else []
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""


def bars(chart: Bars) -> str:
    """A figure with a row of HTML boxes for each name."""
    rows = [_bar(chart, i) for i in range(len(chart.names))]
    entries = [f'<li><i class="box c{PART_COLORS[part]}"></i>{escape(part)}</li>' for part in chart.parts]
    entries += [f'<li><i class="target"></i>{escape(chart.mark_name)}</li>'] if chart.marks is not None else []
    caption = f"<figcaption><b>{escape(chart.title)}</b> <small>{escape(chart.unit)}</small></figcaption>"
    longest = min(WIDEST_NAME, max(map(len, chart.names)))
    return "\n".join([
        f'<figure class="bars" id="plot-{chart.key}" style="--names:{longest}ch">{caption}',
        *rows, f'<ul class="legend">{"".join(entries)}</ul></figure>',
    ])  # fmt: skip


def _bar(chart: Bars, row: int) -> str:
    cells, total = [], 0.0
    for part, values in chart.parts.items():
        value = float(np.nan_to_num(values[row]))
        total += value
        if value > 0:
            what = escape(f"{part} {short(value)}", quote=True)
            cells.append(
                f'<i class="c{PART_COLORS[part]}" style="width:{100 * value / chart.largest:.3f}%" title="{what}"></i>'
            )
    if chart.marks is not None and np.isfinite(chart.marks[row]):
        cells.append(f'<em style="left:{100 * chart.marks[row] / chart.largest:.3f}%"></em>')
    return (
        f'<div class="bar"><span>{escape(chart.names[row])}</span><div>{"".join(cells)}</div><span>{short(total)}</span></div>'
    )
