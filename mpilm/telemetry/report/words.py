"""What a run is and how it went, in words and numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

import numpy as np

from mpilm.config import Config, flatten, resolve
from mpilm.formatting import format_duration
from mpilm.mesh.shape import AXES
from mpilm.telemetry.report.charts import short
from mpilm.telemetry.report.read import Run
from mpilm.telemetry.report.rows import Row, number

MANY = 60  # events, of which the first and the last half are shown
FEW_SAVES = 6


@dataclass(frozen=True)
class Fact:
    """A large number at the top."""

    label: str
    value: str
    hint: str = ""


def about(run: Run) -> str:
    """One line: what was trained, on what."""
    model = [f"{run.config['model.arch']}"] if "model.arch" in run.config else []
    if "model.n_layers" in run.config and "model.d_model" in run.config:
        model.append(f"{run.config['model.n_layers']} blocks of width {run.config['model.d_model']}")
    if number(run.start.get("parameters")) > 0:
        model.append(f"{run.start['parameters']:,} parameters")
    parts = [", ".join(model), on_ranks(run.start), _where(run)]
    if run.starts:
        parts.append(f"begun {moment(run.starts[0].get('time'))}")
    return "; ".join(part for part in parts if part)


def on_ranks(start: Row) -> str:
    """2 ranks: data 2, ZeRO-1."""
    ranks, layout = number(start.get("ranks")), start.get("layout")
    if not ranks >= 1:
        return ""
    words = f"{ranks:.0f} rank{'s' * (ranks > 1)}"
    if not isinstance(layout, dict):
        return words
    sizes = [f"{axis} {layout[axis]}" for axis in AXES if layout.get(axis, 1) != 1]
    zero = [f"ZeRO-{layout['zero']}"] if layout.get("zero") else []
    schedule = [f"schedule {layout['schedule']}"] if layout.get("pipeline", 1) != 1 and layout.get("schedule") else []
    laid = ", ".join([" x ".join(sizes), *zero, *schedule] if sizes else [*zero, *schedule])
    return f"{words} ({laid})" if laid else words


def _where(run: Run) -> str:
    dtype, device = run.config.get("train.dtype", ""), run.start.get("device", "")
    return f"{dtype} on {device}" if dtype and device else str(dtype or device)


def moment(seconds: Any) -> str:
    """2026-11-26 14:03 UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return "at a time unknown"


def facts(run: Run) -> list[Fact]:
    """Loss, evaluation, speed, MFU, tokens, time; those that are known."""
    return [*_losses(run), *_speed(run), *_work(run)]


def _losses(run: Run) -> list[Fact]:
    found = []
    steps, losses = run.rows.columns["step"], run.rows.columns["loss"]
    if len(losses):
        found.append(Fact("Loss", f"{losses[-1]:.4f}", f"at step {steps[-1]:,.0f}"))
    evaluations = run.rows.evaluations
    if len(evaluations):
        last, best = evaluations[-1], evaluations[np.argmin(np.nan_to_num(evaluations[:, 2], nan=np.inf))]
        hint = "the lowest so far" if best[2] == last[2] else f"lowest {best[2]:.4f} at step {best[0]:,.0f}"
        found.append(Fact("Evaluation loss", f"{last[2]:.4f}", hint))
    return found


def _speed(run: Run) -> list[Fact]:
    found = []
    columns = run.rows.columns
    for key, label, scale, suffix, hint in (
        ("tokens_per_s", "Tokens a second", 1.0, "", "median of the rows"),
        ("mfu", "MFU", 100.0, "%", str(run.start.get("peak_source", "")) or "of the peak of all ranks"),
        ("step_s", "Time of a step", 1000.0, " ms", "median, without saving and evaluation"),
    ):
        there = columns[key][np.isfinite(columns[key])]
        if len(there):
            middle = scale * float(np.median(there))
            found.append(Fact(label, (f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}") + suffix, hint))
    return found


def _work(run: Run) -> list[Fact]:
    columns = run.rows.columns
    if not run.rows.count:
        return []
    found = []
    steps, tokens = columns["step"], columns["tokens"]
    planned = number(run.config.get("train.steps"))
    of = f"of {planned:,.0f} steps" if planned == planned else ""
    found.append(Fact("Steps", f"{np.nanmax(steps):,.0f}", of))
    if np.isfinite(tokens).any():
        found.append(Fact("Tokens", short(float(np.nanmax(tokens))), ""))
    took_s = wall_s(run)
    if took_s > 0:
        times = len(run.starts)
        found.append(Fact("Training time", format_duration(took_s), f"in {times} starts" if times > 1 else ""))
    return found


def wall_s(run: Run) -> float:
    """From each start to the last row before the next; what was lost with a stop is in no row, and not counted."""
    begins = [number(row.get("time")) for row in run.starts]
    seen = np.concatenate([run.rows.columns["time"], run.rows.evaluations[:, 1],
                           [number(row.get("time")) for row in run.rows.events]])  # fmt: skip
    seen = seen[np.isfinite(seen)]
    total = 0.0
    for begin, end in zip(begins, [*begins[1:], float("inf")]):
        inside = seen[(seen >= begin) & (seen < end)]
        total += float(inside.max() - begin) if len(inside) else 0.0
    return total


def saves(run: Run) -> str:
    """Of many checkpoints one sentence."""
    rows = [row for row in run.rows.events if row["event"] == "saved"]
    if len(rows) <= FEW_SAVES:
        return ""
    took = [seconds for row in rows if (seconds := number(row.get("took_s"))) == seconds]
    waited = [seconds for row in rows if (seconds := number(row.get("waited_s"))) == seconds]
    words = f"{len(rows):,} checkpoints were saved"
    words += f"; writing one took {statistics.median(took):.3g} s (median), {max(took):.3g} s at most" if took else ""
    return words + (f", and training waited {sum(waited):.3g} s for all of them" if waited else "") + "."


def events(run: Run) -> list[tuple[str, str, str]]:
    """When, at which step, what; of many the first and the last ones."""
    rows = list(run.rows.events)
    if saves(run):
        saved = [row for row in rows if row["event"] == "saved"]
        rows = [row for row in rows if row["event"] != "saved" or row is saved[0] or row is saved[-1]]
    lines = [(moment(row.get("time")), _count(row.get("step")), _told(row, i > 0)) for i, row in enumerate(rows)]
    if len(lines) <= MANY:
        return lines
    return [*lines[: MANY // 2], ("", "", f"{len(lines) - MANY:,} more"), *lines[-MANY // 2 :]]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _told(row: Row, later: bool) -> str:
    why, since = row.get("why", ""), row.get("since")
    match row["event"]:
        case "start":
            return f"{'resumed' if row.get('step') else 'started again' if later else 'started'} on {on_ranks(row)}"
        case "saved":
            times = [("took", row.get("took_s")), ("training waited", row.get("waited_s"))]
            told = ", ".join(f"{what} {number(s):.3g} s" for what, s in times if number(s) == number(s))
            return "checkpoint saved" + (f"; {told}" if told else "")
        case "not saved":
            return f"checkpoint not saved: {why}"
        case "skipped":
            return f"left out{f', from step {since:,}' if isinstance(since, int) and since != row.get('step') else ''}: {why}"
        case "stopped":
            return str(why)
        case "end":
            return "the end of the training"
    return ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("time", "step"))


def not_default(run: Run) -> list[tuple[str, str, str]]:
    """Settings of the run that are not what they are by default: name, value, default."""
    defaults = flatten(resolve(Config()))
    return [
        (key, shown(value), shown(defaults[key]) if key in defaults else "unknown here")
        for key, value in run.config.items()
        if key not in defaults or shown(value) != shown(defaults[key])
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Settings, layout and versions that are not the same in all runs: name, and the value in each."""
    tables = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = [(key, *(table.get(key, "-") for table in tables)) for key in keys if key != "run.dir"]
    return [row for row in rows if len(set(row[1:])) > 1]


def _settings(run: Run) -> dict[str, str]:
    found = {key: shown(value) for key, value in run.config.items()}
    if run.starts:
        found |= {"ranks": on_ranks(run.start)} | dict(versions(run))
    return found


def shown(value: Any) -> str:
    """A setting as TOML has it, near enough."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def versions(run: Run) -> list[tuple[str, str]]:
    """What the last start ran with: versions, device, threads, hosts."""
    given = run.start.get("versions")
    found = [(str(key), str(value)) for key, value in given.items()] if isinstance(given, Mapping) else []
    for key, label in (("device", "device"), ("threads", "threads a rank"), ("microbatches", "microbatches a step")):
        if key in run.start:
            found.append((label, str(run.start[key])))
    if number(run.start.get("peak_flops")) > 0:
        found.append(
            ("peak of all ranks", f"{number(run.start['peak_flops']) / 1e9:,.0f} GFLOP/s; {run.start.get('peak_source', '')}")
        )
    return [*found, *_hosts(run)]


def _hosts(run: Run) -> list[tuple[str, str]]:
    hosts = run.start.get("hosts")
    if not isinstance(hosts, list):
        return []
    names = list(dict.fromkeys(map(str, hosts)))
    more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
    return [("hosts", ", ".join(names[:8]) + more)]


def command(run: Run) -> str:
    """What was typed; where nobody wrote it down, what does the same."""
    typed = run.start.get("command")
    if isinstance(typed, str) and typed:
        return typed
    config = quote(str(run.folder / "config.toml"))
    return f"mpirun -n {run.ranks or 'RANKS'} python -m mpilm.train --config {config} --run.dir NEW"
