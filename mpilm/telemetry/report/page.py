"""The page: one file with everything in it, complete without its script, for one run or for several that are compared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mpilm import __version__
from mpilm.errors import FileError
from mpilm.telemetry.report import words
from mpilm.telemetry.report.charts import curves
from mpilm.telemetry.report.read import Run, read_run
from mpilm.telemetry.report.sections import (
    events_section,
    memory_section,
    paragraph,
    pipeline_section,
    settings_section,
    table,
    time_section,
)
from mpilm.telemetry.report.style import CSS, SCRIPT
from mpilm.telemetry.report.svg import COLORS
from mpilm.telemetry.report.svg import curves as drawn

NAME = "report.html"
COMPARED = "comparison.html"  # of several runs
OURS = b"mpilm.report"  # at the beginning of what a report may write over
BEGINNING = 1024  # bytes


def write(folders: Sequence[str | Path], output: str | Path = "") -> Path:
    """Write the report of the runs in `folders`, by default as report.html into the first; returns where it lies.

    Raises FileError where a folder is no run, and where the file cannot be written or is something else than a report.
    """
    runs = [read_run(folder) for folder in folders]
    return save(runs, output)


def save(runs: Sequence[Run], output: str | Path = "") -> Path:
    """The same of runs that have been read."""
    path = Path(output) if output else runs[0].folder / (NAME if len(runs) == 1 else COMPARED)
    refuse_other(path)
    replace(path, page(runs).encode("utf-8", errors="backslashreplace"))  # a lone surrogate, which JSON may hold
    return path


def refuse_other(path: Path) -> None:
    """Raises FileError where a file is there that no report was."""
    try:
        if path.is_dir():
            raise FileError(f"{path} is a folder; write the name of a file")
        if not path.exists() or path.name == NAME:
            return
        with open(path, "rb") as file:
            if OURS in file.read(BEGINNING):
                return
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from None
    raise FileError(f"{path} is there and is no report of mpilm: it is not written over; choose another name")


def replace(path: Path, content: bytes) -> None:
    """Write a file at once: whoever reads it meanwhile sees the old one or the new one. Raises FileError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise FileError(f"{path} cannot be written: {error.strerror}") from None


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = escape(" and ".join(run.name for run in runs) if len(runs) < 4 else f"{runs[0].name} and {len(runs) - 1} more")
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="generator" content="mpilm.report {__version__}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title}</title><link rel="icon" href="data:,">
<style>{CSS}</style></head><body><main>
<h1>{title}</h1>
{body}
<footer>made by mpilm {__version__}</footer>
</main><script>{SCRIPT}</script></body></html>
"""


def _one(run: Run) -> str:
    sections = [("Curves", "curves", _curves([run])), *_of_run(run, "")]
    parts = [paragraph(words.about(run), "lead"), _tiles(run), _missing([run]), _contents([(s[0], s[1]) for s in sections])]
    return "\n".join([*parts, *(f'<section id="{key}"><h2>{name}</h2>{body}</section>' for name, key, body in sections)])


def _of_run(run: Run, suffix: str) -> list[tuple[str, str, str]]:
    """Title, id and body of each section; one without a body is left out."""
    name = "Pipeline of one step" if run.layout.get("pipeline", 1) != 1 else "Timeline of one step"
    sections = [
        ("Where the time goes", "time", time_section(run, suffix)),
        (name, "pipeline", pipeline_section(run)),
        ("Memory", "memory", memory_section(run, suffix)),
        ("Events", "events", events_section(run)),
        ("Settings", "settings", settings_section(run)),
    ]
    return [(title, key + suffix, body) for title, key, body in sections if body]


def _several(runs: Sequence[Run]) -> str:
    parts = ['<p class="lead">Several runs, laid over each other.</p>', _overview(runs), _missing(runs)]
    parts += ['<section id="differences"><h2>What differs</h2>', _differences(runs), "</section>"]
    parts += ['<section id="curves"><h2>Curves</h2>', _curves(runs), "</section>"]
    for i, run in enumerate(runs):
        parts += [f'<section id="run-{i}"><h2>{escape(run.name)}</h2>', paragraph(words.about(run), "lead"), _tiles(run)]
        for title, key, body in _of_run(run, f"-{i}"):
            parts.append(f'<details id="{key}"><summary>{title}</summary>{body}</details>')
        parts.append("</section>")
    return "\n".join(parts)


def _curves(runs: Sequence[Run]) -> str:
    charts = curves(runs)
    if not charts:
        return paragraph("No step has been logged.", "soft")
    return f'<div class="grids">{"".join(drawn(chart, wide=i == 0) for i, chart in enumerate(charts))}</div>'


def _tiles(run: Run) -> str:
    tiles = [
        f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}<small class='soft'>{escape(fact.hint)}</small></dd></div>"
        for fact in words.facts(run)
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _missing(runs: Sequence[Run]) -> str:
    said = [f"{run.name}: {text}" if len(runs) > 1 else text for run in runs for text in run.missing]
    entries = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f'<div class="missing"><b>What is not in this report</b><ul>{entries}</ul></div>' if said else ""


def _contents(sections: Sequence[tuple[str, str]]) -> str:
    return "<nav>" + "".join(f'<a href="#{key}">{name}</a>' for name, key in sections) + "</nav>"


def _overview(runs: Sequence[Run]) -> str:
    """A row of numbers for each run, with the colour of its curves."""
    labels = list(dict.fromkeys(fact.label for run in runs for fact in words.facts(run)))
    rows = []
    for i, run in enumerate(runs):
        values = {fact.label: fact.value for fact in words.facts(run)}
        cells = "".join(f"<td>{escape(values.get(label, '-'))}</td>" for label in labels)
        link = f'<i class="box c{i % COLORS}"></i><a href="#run-{i}">{escape(run.name)}</a>'
        rows.append(f'<tr><td><ul class="legend"><li>{link}</li></ul></td>{cells}</tr>')
    head = "".join(f"<th>{escape(label)}</th>" for label in ("run", *labels))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _differences(runs: Sequence[Run]) -> str:
    rows = words.differences(runs)
    if not rows:
        return paragraph("Nothing that is known: settings, layout and versions are the same.")
    return table(("setting", *(run.name for run in runs)), rows)
