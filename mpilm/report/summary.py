"""A run in numbers and words: key figures, events, settings, differences between runs, statistics over ranks."""

import json
import statistics
import time
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from mpilm.config.schema import Config, resolve_config
from mpilm.config.settings import flatten
from mpilm.formatting import count_noun, format_duration, format_number
from mpilm.report.read import RecordedRun
from mpilm.telemetry.metrics import MetricsRow, per_rank_values, select_stragglers, to_float

LOGGED_PARTS = ("compute", "communication", "bubble", "data", "optimizer")
MAX_EVENTS = 60  # of more, the first and the last half are listed
MAX_SAVES = 6  # of more checkpoints, the first and the last are listed


def format_time(seconds: Any) -> str:
    """Return seconds since 1970 as 2026-11-26 14:03 UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return "at an unknown time"


def collect_facts(run: RecordedRun) -> dict[str, tuple[str, str]]:
    """Return the key figures that are known, as label -> (value, hint)."""
    facts, columns, evaluations = dict[str, tuple[str, str]](), run.metrics.columns, run.metrics.evaluations
    steps, losses, tokens = columns["step"], columns["loss"], columns["tokens"]
    if len(losses):
        facts["Loss"] = f"{losses[-1]:.4f}", f"at step {steps[-1]:,.0f}"
    if len(evaluations):
        last, best = evaluations[-1], evaluations[np.argmin(np.nan_to_num(evaluations[:, 2], nan=np.inf))]
        hint = "the lowest so far" if best[2] == last[2] else f"lowest {best[2]:.4f} at step {best[0]:,.0f}"
        facts["Evaluation loss"] = f"{last[2]:.4f}", hint
    peak_source = str(run.start.get("peak_source", "")) or "of the peak of all ranks"
    for key, label, scale, unit, hint in (
        ("tokens_per_s", "Tokens per second", 1.0, "", "median"),
        ("mfu", "MFU", 100.0, "%", peak_source),
        ("step_s", "Step time", 1000.0, " ms", "median, without saving and evaluation"),
    ):
        values = columns[key][np.isfinite(columns[key])]
        if len(values):
            median = scale * float(np.median(values))
            facts[label] = (f"{median:,.0f}" if median >= 100 else f"{median:.3g}") + unit, hint
    planned = to_float(run.config.get("train.steps"))
    if np.isfinite(steps).any():
        facts["Steps"] = f"{np.nanmax(steps):,.0f}", f"of {planned:,.0f} steps" if planned == planned else ""
    if np.isfinite(tokens).any():
        facts["Tokens"] = format_number(float(np.nanmax(tokens))), ""
    seconds = measure_training_time(run)
    if len(steps) and seconds > 0:
        starts = f"in {count_noun(len(run.starts), 'start')}" if len(run.starts) > 1 else ""
        facts["Training time"] = format_duration(seconds), starts
    return facts


def measure_training_time(run: RecordedRun) -> float:
    """Return the seconds from each start to the last row before the next one; work lost in a crash has no row."""
    begins = [to_float(row.get("time")) for row in run.starts]
    event_times = [to_float(row.get("time")) for row in run.metrics.events]
    times = np.concatenate([run.metrics.columns["time"], run.metrics.evaluations[:, 1], event_times])
    last_times = [times[(times >= begin) & (times < end)] for begin, end in zip(begins, [*begins[1:], float("inf")])]
    return sum(float(within.max() - begin) for begin, within in zip(begins, last_times) if len(within))


def list_events(run: RecordedRun) -> tuple[list[MetricsRow], str]:
    """Return the events to list and, if the checkpoints are too many for that, a sentence on them. Of many events, the first
    and the last are listed, with a row for the others between them."""
    rows, saves, sentence = list(run.metrics.events), run.find_events("saved"), ""
    if len(saves) > MAX_SAVES:
        rows = [row for row in rows if row["event"] != "saved" or row is saves[0] or row is saves[-1]]
        took, waited = ([s for row in saves if (s := to_float(row.get(key))) == s] for key in ("took_s", "waited_s"))
        sentence = f"{len(saves):,} checkpoints were saved"
        sentence += f"; writing one took {statistics.median(took):.3g} s (median), {max(took):.3g} s at most" if took else ""
        sentence += f"; training waited {sum(waited):.3g} s in total." if waited else "."
    if len(rows) > MAX_EVENTS:
        rows = [*rows[: MAX_EVENTS // 2], {"event": f"{len(rows) - MAX_EVENTS:,} more events"}, *rows[-MAX_EVENTS // 2 :]]
    return rows, sentence


def list_changed_settings(run: RecordedRun) -> list[tuple[str, str, str]]:
    """Return name, value and default of the settings that differ from their defaults."""
    defaults = {key: format_setting(value) for key, value in flatten(resolve_config(Config())).items()}
    settings = {key: format_setting(value) for key, value in run.config.items()}
    return [(key, value, defaults.get(key, "unknown")) for key, value in settings.items() if value != defaults.get(key)]


def compare_runs(runs: Sequence[RecordedRun]) -> list[tuple[str, ...]]:
    """Return the settings, layouts and versions that differ between runs: name, and the value in each run."""
    tables = []
    for run in runs:
        layout = {f"layout.{key}": value for key, value in run.start.get("layout", {}).items()}
        settings = run.config | {"ranks": run.ranks} | layout | dict(list_environment(run))
        tables.append({key: format_setting(value) for key, value in settings.items() if key != "run.dir"})
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, *(table.get(key, "-") for table in tables)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def format_setting(value: Any) -> str:
    """Return a setting much as TOML writes it."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def list_environment(run: RecordedRun) -> list[tuple[str, str]]:
    """Return versions, device, threads, peak speed and hosts of the last start."""
    start = run.start
    labels = {"device": "device", "threads": "threads per rank", "microbatches": "microbatches per step"}
    rows = [*start.get("versions", {}).items(), *((label, start[key]) for key, label in labels.items() if key in start)]
    peak_flops, hosts = to_float(start.get("peak_flops")), list(dict.fromkeys(map(str, start.get("hosts", []))))
    if peak_flops > 0:
        rows.append(("peak of all ranks", f"{peak_flops / 1e9:,.0f} GFLOP/s; {start.get('peak_source', '')}"))
    if hosts:
        rows.append(("hosts", shorten(", ".join(hosts), 120, placeholder=f" ... ({len(hosts):,} hosts)")))
    return [(str(key), str(value)) for key, value in rows]


def split_step(row: MetricsRow) -> dict[str, np.ndarray] | None:
    """Return the seconds of each part of a step, (ranks,) each; `other` is the rest. None if the row does not hold them."""
    logged = row.get("rank_s")
    parts = {part: per_rank_values(logged.get(part)) for part in LOGGED_PARTS} if isinstance(logged, dict) else {}
    known = {part: seconds for part, seconds in parts.items() if seconds is not None}
    if "compute" not in known or len(set(map(len, known.values()))) > 1:
        return None
    other = to_float(row.get("step_s")) - np.sum(list(known.values()), axis=0)
    return known | {"other": np.maximum(0.0, np.nan_to_num(other))}


def _split_latest(run: RecordedRun) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """Return the parts of those sampled rows that have the ranks and parts of the last one, and the steps of these rows."""
    splits = [(parts, to_float(row.get("step"))) for row in run.metrics.samples if (parts := split_step(row)) is not None]
    latest = [s for s in splits if s[0].keys() == splits[-1][0].keys() and len(s[0]["other"]) == len(splits[-1][0]["other"])]
    return [parts for parts, _ in latest], [step for _, step in latest]


def average_parts(run: RecordedRun) -> dict[str, np.ndarray]:
    """Return the mean seconds of each part, (ranks,) each, since the number of ranks last changed; empty if none were logged.
    The time that training waited for checkpoints is spread over all steps."""
    splits, _ = _split_latest(run)
    means = {part: np.mean([parts[part] for parts in splits], axis=0) for part in (splits[-1] if splits else ())}
    waits = [to_float(row["waited_s"]) for row in run.find_events("saved") if "waited_s" in row]
    if means and waits:
        steps = max(1.0, float(np.nanmax(run.metrics.columns["step"])))
        means["checkpoint"] = np.full_like(means["compute"], np.nansum(waits) / steps)
    return {part: means[part] for part in (*LOGGED_PARTS, "checkpoint", "other") if part in means}


def average_values(run: RecordedRun, key: str) -> np.ndarray | None:
    """Return the mean of a list of numbers over the steps of the sampled rows that have as many as the last row; None if no row
    has any."""
    steps = np.array([to_float(row.get("step")) for row in run.metrics.samples])
    weights = np.maximum(
        np.nan_to_num(np.diff(steps, prepend=0.0), nan=1.0), 1.0
    )  # a row counts all steps since the one before
    found = [(per_rank_values(row.get(key)), weight) for row, weight in zip(run.metrics.samples, weights)]
    known = [(values, weight) for values, weight in found if values is not None and np.isfinite(values).all()]
    same = [(values, weight) for values, weight in known if len(values) == len(known[-1][0])]
    return np.average([values for values, _ in same], axis=0, weights=[weight for _, weight in same]) if same else None


def find_stragglers(run: RecordedRun) -> tuple[list[tuple[int, float, int]], int]:
    """Return the stragglers in the rows sampled, as `select_stragglers` describes them, and the number of these rows."""
    splits, steps = _split_latest(run)
    return select_stragglers(steps, np.array([parts["compute"] for parts in splits])) if splits else [], len(splits)


def measure_peak_memory(run: RecordedRun) -> tuple[np.ndarray | None, str]:
    """Return the peak bytes of each rank, and whether the end row or the logged rows gave them; None if unknown."""
    ends = run.find_events("end") if run.has_ended else []
    final = per_rank_values(ends[-1].get("peak_memory_on_rank_bytes")) if ends else None
    if final is not None:
        return np.nan_to_num(final), "peak"
    logged = [values for row in run.metrics.samples if (values := per_rank_values(row.get("memory_bytes"))) is not None]
    logged = [values for values in logged if len(values) == len(logged[-1])]
    return (np.nan_to_num(np.max(logged, axis=0)), "highest logged value") if logged else (None, "")
