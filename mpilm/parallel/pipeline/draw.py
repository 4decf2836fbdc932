"""A timeline as a picture: a row for each rank, time to the right; in a terminal, or as SVG."""

from __future__ import annotations

import math
from html import escape

from mpilm.parallel.pipeline.simulate import Event, Timeline

NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, gradient of the input",
    "W": "backward, gradient of the weights",
    "REDUCE": "sum over the data axis",
}
FILL = {"F": "-", "B": "=", "I": "~", "W": "+", "REDUCE": "#"}
COLORS = {  # told apart with any colour vision (Okabe and Ito, 2008), and dark text is legible on all of them
    "F": (86, 180, 233), "B": (230, 159, 0), "I": (204, 121, 167), "W": (0, 158, 115), "REDUCE": (153, 153, 153),
}  # fmt: skip
PANELS = 4  # a terminal shows that many stretches of time; of a longer step the beginning and the end
ROW_PX, GAP_PX, LEFT_PX, DIGIT_PX, WIDEST_PX = 26, 4, 64, 9, 4000
STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #222 }
.cell { font-size: 11px; fill: #111; text-anchor: middle; pointer-events: none }
.page { fill: #fff }
.idle { fill: #ececec }
.tick { stroke: #bbb }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd }
  .cell { fill: #111 }
  .page { fill: #15171c }
  .idle { fill: #2a2d35 }
  .tick { stroke: #555 }
}
"""


def text(timeline: Timeline, width: int = 120, unit: str = "s") -> str:
    """A drawing for a terminal of `width` columns, several panels long where the step needs it, and its legend.

    `unit` is what the times of the timeline count; it may be empty.
    """
    cell = max(3, _widest_label(timeline))
    scale = cell / _cell_s(timeline)  # columns a second
    heads = [f"rank {rank} ".rjust(len(f"rank {timeline.ranks - 1} ")) for rank in range(timeline.ranks)]
    columns = max(1, round(timeline.step_s * scale))
    panels = math.ceil(columns / max(cell, width - len(heads[0]) - cell + 1))
    panel = math.ceil(columns / panels / cell) * cell  # panels of equal width, at most what there is
    rows = [_row(timeline, rank, scale, panel) for rank in range(timeline.ranks)]
    starts = list(range(0, columns, panel))
    shown = starts if len(starts) <= PANELS else starts[: PANELS // 2] + starts[-PANELS // 2 :]
    lines: list[str] = []
    for before, start in zip([0, *shown], shown):
        if start > before + panel:
            lines += [f"... {_time((before + panel) / scale, '')} to {_time(start / scale, unit)} left out ...", ""]
        ruler = _ruler(start, min(panel, columns - start), scale, unit)
        lines.append(" " * len(heads[0]) + ruler)
        lines += [(head + row[start : start + panel]).rstrip() for head, row in zip(heads, rows)] + [""]
    return "\n".join([*lines, *legend(timeline, unit)])


def legend(timeline: Timeline, unit: str = "s") -> list[str]:
    """What the letters mean, and the figures of the step."""
    chunks = timeline.chunks
    kinds = [f"{kind[0]} {NAMES[kind]}" for kind in _kinds(timeline)]
    letters = [f"{_letter(0)} to {_letter(chunks - 1)} the chunks of a rank"] if chunks > 1 else []
    peaks = " ".join(str(timeline.peak_live(rank)) for rank in range(timeline.ranks))
    counted = f" (each in one of {chunks} chunks)" if chunks > 1 else ""
    return [
        "; ".join([*kinds, *letters, ". waiting"]),
        f"step {_time(timeline.step_s, unit)}; bubble {100 * timeline.bubble:.1f}%; "
        f"most microbatches alive{counted}, rank by rank: {peaks}",
    ]


def _row(timeline: Timeline, rank: int, scale: float, panel: int) -> str:
    """All of a rank's time, `scale` columns a second. A cell begins with its label, as far as it fits."""
    row = ""
    for event in timeline.by_rank[rank]:
        room = max(0, round(event.end_s * scale) - len(row))
        label, fill = ("", ".") if event.waiting else (_label(event, timeline), FILL[event.action.kind])
        ahead = -len(row) % panel  # columns left of this panel
        lead = fill * ahead if ahead < len(label) else ""
        if len(lead + label) > room:
            lead, label = "", label[:1]  # a part of a number would be read as another one
        row += (lead + label)[:room].ljust(room, fill)
    return row


def _ruler(start: int, columns: int, scale: float, unit: str) -> str:
    tick_s = _nice(12 / scale)
    ruler = ""
    for i in range(math.ceil(start / scale / tick_s), math.ceil((start + columns) / scale / tick_s)):
        mark = f"|{_time(i * tick_s, unit)}"
        column = round(i * tick_s * scale) - start
        if column + len(mark) <= columns:
            ruler = ruler.ljust(column) + mark
    return ruler


def _time(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip()


def _nice(at_least: float) -> float:
    """1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= at_least)


def _label(event: Event, timeline: Timeline) -> str:
    """The kind, the microbatch and, where a rank has several stages, the letter of the chunk: F3b."""
    action = event.action
    letter = _letter(action.stage // timeline.ranks) if timeline.chunks > 1 else ""
    return f"{action.kind[0]}{'' if action.microbatch is None else action.microbatch}{letter}"


def _letter(chunk: int) -> str:
    return chr(ord("a") + chunk) if chunk < 26 else f"({chunk})"


def _kinds(timeline: Timeline) -> list[str]:
    there = {event.action.kind for event in timeline.events if event.end_s > event.start_s and not event.waiting}
    return [kind for kind in NAMES if kind in there]


def _widest_label(timeline: Timeline) -> int:
    return max(len(_label(event, timeline)) for event in timeline.events if not event.waiting)


def _cell_s(timeline: Timeline) -> float:
    """The shortest cell that has to hold its label: those below a quarter of the longest are not worth the room."""
    lengths_s = [event.end_s - event.start_s for event in timeline.events if not event.waiting]
    longest_s = max(lengths_s)
    return min((s for s in lengths_s if s >= longest_s / 4), default=longest_s) or 1.0


def pixels_a_second(timeline: Timeline) -> float:
    """The scale at which labels fit into their cells, unless the image became too wide."""
    scale = (_widest_label(timeline) * DIGIT_PX + 4) / _cell_s(timeline)
    return min(scale, WIDEST_PX / max(timeline.step_s, 1e-12))


def svg(timeline: Timeline, unit: str = "s", scale: float = 0.0) -> str:
    """A self-contained SVG image, for light and dark pages; each cell says what it is when pointed at.

    `scale`: pixels a second, for timelines that are to be compared; 0: what suits this one.
    """
    scale = scale or pixels_a_second(timeline)
    bottom = timeline.ranks * (ROW_PX + GAP_PX) + GAP_PX
    notes = legend(timeline, unit)
    width, height = max(640, LEFT_PX + round(timeline.step_s * scale) + 24), bottom + 20 * (3 + len(_kinds(timeline))) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Pipeline schedule of {timeline.ranks} ranks: {escape(notes[-1])}</title>",
        f'<style>{STYLE}</style><rect class="page" width="{width}" height="{height}"/>',
    ]
    parts += _svg_lanes(timeline, scale)
    parts += _svg_axis(timeline, scale, bottom, unit)
    for rank in range(timeline.ranks):  # above the lines of the axis
        parts += _svg_cells(timeline, rank, scale, unit)
    parts += _svg_legend(timeline, bottom + 36, notes[-1])
    return "\n".join([*parts, "</svg>", ""])


def _svg_lanes(timeline: Timeline, scale: float) -> list[str]:
    width = f"{timeline.step_s * scale:.1f}"
    return [
        f'<text x="8" y="{top + 17}">rank {rank}</text>'
        f'<rect class="idle" x="{LEFT_PX}" y="{top}" width="{width}" height="{ROW_PX}"/>'
        for rank, top in enumerate(_tops(timeline))
    ]


def _tops(timeline: Timeline) -> list[int]:
    return [GAP_PX + rank * (ROW_PX + GAP_PX) for rank in range(timeline.ranks)]


def _svg_cells(timeline: Timeline, rank: int, scale: float, unit: str) -> list[str]:
    top = _tops(timeline)[rank]
    parts = []
    for event in timeline.by_rank[rank]:
        x, width = LEFT_PX + event.start_s * scale, (event.end_s - event.start_s) * scale
        if event.waiting or width <= 0:
            continue
        action, label = event.action, _label(event, timeline)
        fill = _shade(action.kind, action.stage // timeline.ranks, timeline.chunks)
        when = f"{_time(event.start_s, '')} to {_time(event.end_s, unit)}"
        cell = f"<title>{action}: {NAMES[action.kind]}, {when}</title>"
        cell += f'<rect x="{x:.1f}" y="{top}" width="{max(width - 1, 0.5):.1f}" height="{ROW_PX}" fill="{fill}"/>'
        if width >= len(label) * DIGIT_PX:
            cell += f'<text class="cell" x="{x + width / 2:.1f}" y="{top + 17}">{label}</text>'
        parts.append(f"<g>{cell}</g>")
    return parts


def _svg_axis(timeline: Timeline, scale: float, top: int, unit: str) -> list[str]:
    tick_s = _nice(max(80 / scale, 1e-12))
    parts = []
    for i in range(math.floor(timeline.step_s / tick_s + 1e-9) + 1):
        x = LEFT_PX + i * tick_s * scale
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{top + 6}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 18}" text-anchor="middle">{_time(i * tick_s, unit)}</text>')
    return parts


def _svg_legend(timeline: Timeline, top: int, note: str) -> list[str]:
    parts = []
    chunks = timeline.chunks
    for i, kind in enumerate(_kinds(timeline)):
        for chunk in range(chunks):
            x, fill = LEFT_PX + 18 * chunk, _shade(kind, chunk, chunks)
            parts.append(f'<rect x="{x}" y="{top + 20 * i}" width="16" height="14" fill="{fill}"/>')
        shades = f", chunks {_letter(0)} to {_letter(chunks - 1)}" if chunks > 1 else ""
        parts.append(f'<text x="{LEFT_PX + 18 * chunks + 6}" y="{top + 20 * i + 12}">{kind[0]} {NAMES[kind]}{shades}</text>')
    parts.append(f'<text x="{LEFT_PX}" y="{top + 20 * len(_kinds(timeline)) + 14}">{escape(note)}</text>')
    return parts


def _shade(kind: str, chunk: int, chunks: int) -> str:
    """The colour of a kind, lighter for later chunks."""
    light = 0.6 * chunk / max(1, chunks - 1)
    return "#" + "".join(f"{round(part + (255 - part) * light):02x}" for part in COLORS[kind])
