"""The sections of a page that are of one run, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mpilm.parallel.pipeline.draw import draw_svg
from mpilm.telemetry.report import words
from mpilm.telemetry.report.charts import Bars
from mpilm.telemetry.report.ranks import FEW, SHOWN, mean_parts, peak_bytes, predicted_bytes, shown_ranks, stragglers
from mpilm.telemetry.report.read import Run
from mpilm.telemetry.report.rows import number
from mpilm.telemetry.report.svg import bars
from mpilm.telemetry.report.timeline import Traced, traced, waits

MOST_WAITS = 12


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways by itself; the last column holds text that may be long."""
    long = ' class="long"'
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [
        "<tr>" + "".join(f"<td{long * (i == len(row) - 1)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def paragraph(text: str, kind: str = "said") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def rank_bars(run: Run, suffix: str = "") -> list[Bars]:
    """Where the time of each rank goes, and its memory; those that are known."""
    return [each for each in (_time_bars(run, suffix), _memory_bars(run, suffix)) if each is not None]


def _time_bars(run: Run, suffix: str) -> Bars | None:
    parts = mean_parts(run)
    if not parts:
        return None
    shown = shown_ranks(parts["compute"])
    values = {part: _with_mean(seconds * 1000, shown) for part, seconds in parts.items() if seconds.any()}
    return Bars(
        f"time{suffix}", "A step of each rank", "ms, mean over the run", _names(run, shown, len(parts["compute"])), values
    )


def _memory_bars(run: Run, suffix: str) -> Bars | None:
    peak, how = peak_bytes(run)
    if peak is None:
        return None
    shown = shown_ranks(peak)
    predicted = predicted_bytes(run)
    marks = None
    if predicted is not None and len(predicted) == len(peak):
        marks = _with_mean(predicted / 2**20, shown)
    names = _names(run, shown, len(peak))
    return Bars(f"memory{suffix}", "Memory of each rank", f"MiB, {how}", names, {"memory": _with_mean(peak / 2**20, shown)},
                marks, "predicted")  # fmt: skip


def _with_mean(values: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """The values of the ranks that are shown, below the mean of all where these are too many."""
    return values[list(shown)] if len(values) <= FEW else np.array([values.mean(), *values[list(shown)]])


def _names(run: Run, shown: Sequence[int], ranks: int) -> tuple[str, ...]:
    names = [f"rank {rank} {run.host(rank)}".strip() for rank in shown]
    return tuple(names if ranks <= FEW else [f"mean of {ranks:,}", *names])


def time_section(run: Run, suffix: str) -> str:
    chart = _time_bars(run, suffix)
    if chart is None:
        return paragraph("Nothing was written down about where the time of a rank goes.", "soft")
    measured = any("rank_s" in row for row in run.rows.samples)
    said = (
        "Communication is what nothing else hides: waiting for other ranks. The bubble is waiting for other stages of the "
        "pipeline. Saving counts with what training waited for it; other is what is left of the step."
        if measured
        else "This run wrote down computing alone; other is what is left of a step: waiting, reading, the optimizer."
    )
    many = f"The mean of all ranks, and the {SHOWN} that compute longest." if run.ranks > FEW else ""
    return "\n".join([paragraph(said), paragraph(many), bars(chart), _stragglers(run)])


def _stragglers(run: Run) -> str:
    slow, rows = stragglers(run)
    if not slow:
        return paragraph("No straggler: no rank computes 1.2 times as long as most." if run.ranks > 1 and rows else "")
    lines = [
        (str(each.rank), each.host or "unknown", f"{each.times:.2f}", f"in {each.rows:,} of {rows:,} rows that were looked at")
        for each in slow[:SHOWN]
    ]
    more = f" (the slowest {SHOWN} are shown)" if len(slow) > SHOWN else ""
    head = f"{len(slow):,} rank{'s compute' if len(slow) > 1 else ' computes'} clearly longer than most{more}."
    why = " Stages of a pipeline may differ because of how the layers are cut." if run.layout.get("pipeline", 1) != 1 else ""
    return f"<h3>Stragglers</h3>{paragraph(head + why)}{table(('rank', 'host', 'times the median', 'how often'), lines)}"


def memory_section(run: Run, suffix: str) -> str:
    chart, (peak, _) = _memory_bars(run, suffix), peak_bytes(run)
    predicted = number(run.start.get("predicted_memory_bytes"))
    again = "Of the last start. " if len(run.starts) > 1 else ""
    said = f"{again}Predicted for the rank that needs most: {predicted / 2**20:,.0f} MiB" if predicted > 0 else ""
    if chart is None or peak is None:
        return paragraph(f"The memory that was used was not written down. {said}", "soft")
    most = float(np.nanmax(peak))
    error = f"; it was {most / 2**20:,.0f} MiB, {100 * (most / predicted - 1):+.1f}%." if predicted > 0 else ""
    return paragraph(said + error) + bars(chart)


def pipeline_section(run: Run) -> str:
    """One step as it was, above the simulated one at the same scale; empty where nothing was traced."""
    step = traced(run.trace) if run.trace is not None else None
    if run.trace is None:
        return ""
    if step is None:
        return paragraph("The newest trace holds no step that all ranks of the first replica have traced.", "soft")
    return "\n".join([_in_words(step), _drawings(step), _waits(run)])


def _in_words(step: Traced) -> str:
    ranks = ", ".join(map(str, step.ranks[:FEW])) + (" and more" if len(step.ranks) > FEW else "")
    measured, simulated = step.measured, step.simulated
    said = f"Step {step.step:,} on rank{'s' * (len(step.ranks) > 1)} {ranks}, the first replica"
    said += "; the rows are the places in its pipeline. " if step.ranks != tuple(range(len(step.ranks))) else ". "
    said += f"Measured: {measured.step_s:,.4g} ms, of which {100 * measured.bubble:.1f}% bubble. "
    if simulated is not None:
        said += (
            f"Simulated: {simulated.step_s:,.4g} ms, of which {100 * simulated.bubble:.1f}% bubble; the same order of work, "
            "each action as long as the median of its kind and stage, and messages that take no time. What the measured step "
            "has beyond that is communication and unevenness."
        )
    return paragraph(said + step.why)


def _drawings(step: Traced) -> str:
    if not step.drawable:
        return paragraph(f"Its {len(step.measured.events):,} actions are too many to draw: open the trace at ui.perfetto.dev.")
    both = [("measured", step.measured), *([("simulated", step.simulated)] if step.simulated is not None else [])]
    scale = min(scale, *(4000 / max(each.step_s, 1e-9) for _, each in both)) if len(both) > 1 else scale
    drawn = [f'<p class="note">{name}</p>{draw_svg(each, "ms")}' for name, each in both]
    return f'<div class="scroll timeline">{"".join(drawn)}</div>'


def _waits(run: Run) -> str:
    found = waits(run.trace) if run.trace is not None else []
    if not found:
        return ""
    lines = [
        (each.axis, each.operation, f"{each.mean_ms:.3g}", f"{each.most_ms:.3g} on rank {each.rank}", f"{each.calls:.3g}",
         f"{each.sent_bytes / 2**20:.3g}")
        for each in found[:MOST_WAITS]
    ]  # fmt: skip
    head = ("axis", "operation", "ms a step, mean of ranks", "most", "calls", "MiB")
    return f"<h3>What ranks waited for in the traced steps</h3>{table(head, lines)}"


def events_section(run: Run) -> str:
    lines = words.events(run)
    if not lines:
        return paragraph("None was written down.", "soft")
    return paragraph(words.saves(run)) + table(("when", "step", "what"), lines)


def settings_section(run: Run) -> str:
    parts = [f"<h3>To repeat it</h3><pre>{escape(words.command(run))}</pre>"]
    changed = words.not_default(run)
    if changed:
        parts += ["<h3>Settings that are not the defaults</h3>", table(("setting", "value", "default"), changed)]
    if run.config_text:
        parts.append(f"<details><summary>All settings (config.toml)</summary><pre>{escape(run.config_text)}</pre></details>")
    versions = words.versions(run)
    if versions:
        parts += ["<h3>It ran with</h3>", table(("what", "which"), versions)]
    return "\n".join(parts)
