"""Drawings of a timeline, one lane per rank and time to the right: text for a terminal, or SVG."""

import math
from html import escape

from mpilm.formatting import round_up_to_tick
from mpilm.parallel.pipeline.actions import Action
from mpilm.planner.simulate import Timeline, TimelineEvent

KIND_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "REDUCE": "gradient reduction"}
FILL = {"F": "-", "B": "=", "I": "~", "W": "+", "REDUCE": "#"}
# RGB, distinct with any colour vision (Okabe and Ito, 2008), and dark text is legible on all of them
ACTION_COLORS = {"F": (86, 180, 233), "B": (230, 159, 0), "I": (204, 121, 167), "W": (0, 158, 115), "REDUCE": (153, 153, 153)}
MAX_PANELS = 4  # stretches of time in a terminal; a longer step shows its beginning and its end
LANE_PX, BAR_PX, LEFT_PX, DIGIT_PX, MAX_WIDTH_PX = 30, 26, 64, 9, 4000
STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #222 }
.page { fill: #fff } .idle { fill: #ececec } .tick { fill: #bbb }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .page { fill: #15171c } .idle { fill: #2a2d35 } .tick { fill: #555 }
}
.cell { font-size: 11px; fill: #111; text-anchor: middle; pointer-events: none }
"""


def draw_text(timeline: Timeline, width: int = 120) -> str:
    """Return a drawing for a terminal of `width` columns, in several panels where the step needs them, with its legend."""
    digits, cell_s = _fit_label(timeline)
    cell = max(3, digits)
    scale = cell / cell_s  # columns per second
    heads = [f"rank {rank} ".rjust(len(f"rank {timeline.ranks - 1} ")) for rank in range(timeline.ranks)]
    columns = max(1, round(timeline.step_s * scale))
    panels = math.ceil(columns / max(cell, width - len(heads[0]) - cell + 1))
    panel = math.ceil(columns / panels / cell) * cell  # panels of equal width, as many columns as there are at most
    lanes = [_draw_lane(timeline, rank, scale, panel) for rank in range(timeline.ranks)]
    starts = list(range(0, columns, panel))
    if len(starts) > MAX_PANELS:
        starts = starts[: MAX_PANELS // 2] + starts[-MAX_PANELS // 2 :]
    lines: list[str] = []
    for previous, start in zip([0, *starts], starts):
        if start > previous + panel:
            lines += [f"... {(previous + panel) / scale:.4g} to {start / scale:.4g} omitted ...", ""]
        lines.append(" " * len(heads[0]) + _draw_ruler(start, min(panel, columns - start), scale))
        lines += [(head + lane[start : start + panel]).rstrip() for head, lane in zip(heads, lanes)] + [""]
    legend = "; ".join([f"{kind[0]} {KIND_NAMES[kind]}" for kind in _drawn_kinds(timeline)] + [". waiting"])
    return "\n".join([*lines, legend, _summarize(timeline)])


def draw_svg(timeline: Timeline) -> str:
    """Return a self-contained SVG image, for light and dark pages; each cell has a tooltip."""
    digits, cell_s = _fit_label(timeline)
    scale = min((digits * DIGIT_PX + 4) / cell_s, MAX_WIDTH_PX / max(timeline.step_s, 1e-12))  # pixels per second
    kinds, summary = _drawn_kinds(timeline), _summarize(timeline)
    length, bottom = timeline.step_s * scale, timeline.ranks * LANE_PX + 4
    width, height = max(640, LEFT_PX + round(length) + 24), bottom + 20 * (3 + len(kinds)) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Pipeline schedule of {timeline.ranks} ranks: {escape(summary)}</title><style>{STYLE}</style>",
        _svg_rect(0, 0, width, height, 'class="page"'),
    ]
    for rank in range(timeline.ranks):
        parts.append(_svg_text(8, LANE_PX * rank + 21, f"rank {rank}"))
        parts.append(_svg_rect(LEFT_PX, LANE_PX * rank + 4, length, BAR_PX, 'class="idle"'))
    tick_s = round_up_to_tick(max(80 / scale, 1e-12))
    for i in range(math.floor(timeline.step_s / tick_s + 1e-9) + 1):
        x = LEFT_PX + i * tick_s * scale
        parts.append(_svg_rect(x - 0.5, 0, 1, bottom + 6, 'class="tick"'))
        parts.append(_svg_text(x, bottom + 18, f"{i * tick_s:.4g}", 'text-anchor="middle"'))
    for event in filter(_is_drawn, timeline.events):
        action, label, top = event.action, action_label(event.action, timeline), LANE_PX * event.rank + 4
        x, length = LEFT_PX + event.start_s * scale, (event.end_s - event.start_s) * scale
        tooltip = f"{action}: {KIND_NAMES[action.kind]}, {event.start_s:.4g} to {event.end_s:.4g}"
        fill = _fill(action.kind, action.stage // timeline.ranks, timeline)
        cell = f"<title>{escape(tooltip)}</title>" + _svg_rect(x, top, max(length - 1, 0.5), BAR_PX, fill)
        if length >= len(label) * DIGIT_PX:
            cell += _svg_text(x + length / 2, top + 17, label, 'class="cell"')
        parts.append(f"<g>{cell}</g>")
    for i, kind in enumerate(kinds):
        for chunk in range(timeline.chunks):
            parts.append(_svg_rect(LEFT_PX + 18 * chunk, bottom + 36 + 20 * i, 16, 14, _fill(kind, chunk, timeline)))
        parts.append(_svg_text(LEFT_PX + 18 * timeline.chunks + 6, bottom + 48 + 20 * i, f"{kind[0]} {KIND_NAMES[kind]}"))
    parts.append(_svg_text(LEFT_PX, bottom + 50 + 20 * len(kinds), summary))
    return "\n".join([*parts, "</svg>", ""])


def _draw_lane(timeline: Timeline, rank: int, scale: float, panel: int) -> str:
    """Return the whole lane of a rank, `scale` columns per second. A cell begins with its label, if that fits."""
    lane = ""
    for event in timeline.by_rank[rank]:
        room = max(0, round(event.end_s * scale) - len(lane))
        label, fill = ("", ".") if event.waiting else (action_label(event.action, timeline), FILL[event.action.kind])
        left = -len(lane) % panel  # columns left in this panel
        lead = fill * left if left < len(label) else ""
        if len(lead + label) > room:
            lead, label = "", label[:1]  # half a number would read as another number
        lane += (lead + label)[:room].ljust(room, fill)
    return lane


def _draw_ruler(start: int, columns: int, scale: float) -> str:
    tick_s = round_up_to_tick(12 / scale)
    ruler = ""
    for i in range(math.ceil(start / scale / tick_s), math.ceil((start + columns) / scale / tick_s)):
        mark = f"|{i * tick_s:.4g}"
        column = round(i * tick_s * scale) - start
        if column + len(mark) <= columns:
            ruler = ruler.ljust(column) + mark
    return ruler


def _summarize(timeline: Timeline) -> str:
    peaks = " ".join(str(timeline.peak_in_flight(rank)) for rank in range(timeline.ranks))
    chunks = f", over chunks a to {chunk_letter(timeline.chunks - 1)}" if timeline.chunks > 1 else ""
    step = f"step {timeline.step_s:.4g}; bubble {100 * timeline.bubble:.1f}%"
    return f"{step}; most microbatches in flight{chunks}, rank by rank: {peaks}"


def _svg_rect(x: float, y: int, width: float, height: int, attributes: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" {attributes}/>'


def _svg_text(x: float, y: int, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" {attributes}>{escape(text)}</text>'


def _fill(kind: str, chunk: int, timeline: Timeline) -> str:
    """Return the colour of a kind as an SVG attribute, lighter for later chunks."""
    light = 0.6 * chunk / max(1, timeline.chunks - 1)
    return 'fill="#' + "".join(f"{round(part + (255 - part) * light):02x}" for part in ACTION_COLORS[kind]) + '"'


def action_label(action: Action, timeline: Timeline) -> str:
    """Return kind, microbatch and, where a rank has several stages, the letter of the chunk: F3b."""
    letter = chunk_letter(action.stage // timeline.ranks) if timeline.chunks > 1 else ""
    return f"{action.kind[0]}{'' if action.microbatch is None else action.microbatch}{letter}"


def chunk_letter(chunk: int) -> str:
    return chr(ord("a") + chunk) if chunk < 26 else f"({chunk})"


def _is_drawn(event: TimelineEvent) -> bool:
    return event.end_s > event.start_s and not event.waiting


def _drawn_kinds(timeline: Timeline) -> list[str]:
    kinds = {event.action.kind for event in timeline.events if _is_drawn(event)}
    return [kind for kind in KIND_NAMES if kind in kinds]


def _fit_label(timeline: Timeline) -> tuple[int, float]:
    """Return the length of the longest label and the shortest cell to fit it: those below a quarter of the longest do not."""
    cells = [event for event in timeline.events if not event.waiting]
    lengths_s = [event.end_s - event.start_s for event in cells]
    least_s = max(lengths_s) / 4
    return max(len(action_label(cell.action, timeline)) for cell in cells), min(s for s in lengths_s if s >= least_s) or 1.0
