"""What ranks say of themselves: where their time goes, memory, who is slow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpilm.telemetry.report.read import Run
from mpilm.telemetry.report.rows import Row, number, of_ranks

PARTS = ("compute", "communication", "bubble", "data", "optimizer", "checkpoint", "other")
MEASURED = ("compute", "communication", "bubble", "data", "optimizer")
SLOW = 1.2  # times the median
FEW = 32  # ranks that are shown one by one
SHOWN = 8  # of more


def parts_of(row: Row) -> dict[str, np.ndarray] | None:
    """Seconds of a step by part, (ranks,) each, of one row; `other` is what is left of the step."""
    given = row.get("rank_s")
    if not isinstance(given, dict):
        given = {"compute": row.get("rank_busy_s")}
    parts = {part: seconds for part in MEASURED if (seconds := of_ranks(given.get(part))) is not None}
    if "compute" not in parts or len({len(seconds) for seconds in parts.values()}) > 1:
        return None
    other = number(row.get("step_s")) - np.sum(list(parts.values()), axis=0)
    return parts | {"other": np.maximum(0.0, np.nan_to_num(other))}


def mean_parts(run: Run) -> dict[str, np.ndarray]:
    """The same as a mean over the rows since the number of ranks is what it is, with the time that training waited for
    checkpoints spread over all steps; empty where nothing was written down."""
    found = [parts for row in run.rows.samples if (parts := parts_of(row)) is not None]
    if not found:
        return {}
    alike = [parts for parts in found if _shape(parts) == _shape(found[-1])]
    mean = {part: np.mean([parts[part] for parts in alike], axis=0) for part in found[-1]}
    waited = [number(row["waited_s"]) for row in run.rows.events if row["event"] == "saved" and "waited_s" in row]
    if waited:
        steps = run.rows.columns["step"]
        mean["checkpoint"] = np.full_like(mean["compute"], np.nansum(waited) / max(1.0, float(np.nanmax(steps))))
    return {part: mean[part] for part in PARTS if part in mean}


def _shape(parts: Mapping[str, np.ndarray]) -> tuple[int, tuple[str, ...]]:
    return len(parts["compute"]), tuple(parts)


def parts_over_time(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and the mean over ranks of each part at them."""
    rows = [(number(row.get("step")), parts) for row in run.rows.samples if (parts := parts_of(row)) is not None]
    rows = [(step, parts) for step, parts in rows if step == step]
    steps = np.array([step for step, _ in rows])
    return steps, {part: np.array([float(parts[part].mean()) if part in parts else 0.0 for _, parts in rows]) for part in PARTS}


@dataclass(frozen=True)
class Straggler:
    """A rank that computes clearly longer than most."""

    rank: int
    host: str
    times: float
    """The median of all ranks."""
    rows: int
    """Rows in which it did, of those that were looked at."""


def stragglers(run: Run) -> tuple[list[Straggler], int]:
    """Ranks whose mean compute is more than SLOW times the median, slowest first; and the rows looked at."""
    found = [parts["compute"] for row in run.rows.samples if (parts := parts_of(row)) is not None]
    alike = [compute for compute in found if len(compute) == len(found[-1])]
    if not alike or len(alike[-1]) < 2:
        return [], len(alike)
    mean = np.mean(alike, axis=0)
    middle = statistics.median_low(mean.tolist())
    slow = [rank for rank in np.argsort(-mean).tolist() if mean[rank] > SLOW * middle]
    often = np.sum([compute > SLOW * statistics.median_low(compute.tolist()) for compute in alike], axis=0)
    return [Straggler(rank, run.host(rank), float(mean[rank] / middle), int(often[rank])) for rank in slow], len(alike)


def peak_bytes(run: Run) -> tuple[np.ndarray | None, str]:
    """The most memory of each rank, and how that is known: told at the end, or seen in the rows."""
    ends = [row for row in run.rows.events if row["event"] == "end"]
    told = of_ranks(ends[-1].get("peak_memory_on_rank_bytes")) if ends and run.ended else None
    if told is not None:
        return told, "the highest use"
    seen = [now for row in run.rows.samples if (now := of_ranks(row.get("memory_bytes"))) is not None]
    alike = [now for now in seen if len(now) == len(seen[-1])]
    return (np.max(alike, axis=0), "the highest use that was logged") if alike else (None, "")


def predicted_bytes(run: Run) -> np.ndarray | None:
    """What was predicted for each rank; None where it is known for the fullest at most."""
    return of_ranks(run.start.get("predicted_memory_on_rank_bytes"))


def shown_ranks(size: np.ndarray) -> list[int]:
    """All ranks where they are few, else those with the largest values, largest first."""
    return list(range(len(size))) if len(size) <= FEW else np.argsort(-size)[:SHOWN].tolist()
