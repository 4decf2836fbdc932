"""A run folder as far as it is there: what is missing or broken is said, not raised."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config.parse import read_toml
from mpilm.errors import FileError, UserError
from mpilm.telemetry.report.rows import Row, Rows, nothing, number, read_rows

FILES = ("metrics.jsonl", "config.toml")  # each makes a folder a run


@dataclass(frozen=True)
class Run:
    """All that a report is made of."""

    folder: Path
    rows: Rows
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its resolved settings, "section.key" -> value."""
    config_text: str = ""
    trace: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()
    """Sentences on what is not there."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    @cached_property
    def starts(self) -> tuple[Row, ...]:
        """One for each start and resume."""
        return tuple(row for row in self.rows.events if row["event"] == "start")

    @property
    def start(self) -> Row:
        """The last one; empty where there is none."""
        return self.starts[-1] if self.starts else {}

    @property
    def layout(self) -> Mapping[str, Any]:
        layout = self.start.get("layout")
        return layout if isinstance(layout, dict) else {}

    @property
    def ranks(self) -> int:
        """Of the last start; 0 where nobody knows."""
        ranks = number(self.start.get("ranks"))
        return int(ranks) if ranks == ranks else 0

    @property
    def ended(self) -> bool:
        """Whether the last start came to the end of the training."""
        ends = [row["event"] for row in self.rows.events if row["event"] in ("start", "end", "stopped")]
        return ends[-1:] in (["end"], ["stopped"])

    def host(self, rank: int) -> str:
        """Where a rank ran, as far as that was written down."""
        hosts = self.start.get("hosts")
        return str(hosts[rank]) if isinstance(hosts, list) and rank < len(hosts) else ""


def read_run(folder: str | Path) -> Run:
    """The run in a folder; raises FileError for a folder that is none."""
    path = Path(folder)
    try:
        _refuse_other(path)
    except OSError as error:
        raise FileError(f"{folder} cannot be read: {error.strerror}") from None
    missing: list[str] = []
    rows = _rows(path / "metrics.jsonl", missing)
    text, config = _config(path / "config.toml", missing)
    run = Run(path, rows, config, text, _trace(path, missing))
    return replace(run, missing=(*missing, *_gaps(run)))


def _refuse_other(path: Path) -> None:
    if not path.exists():
        raise FileError(f"{path} does not exist; write the folder of a run, such as runs/NAME")
    if path.is_file():
        raise FileError(f"{path} is a file; write the folder of a run, such as {path.parent}")
    if not any((path / name).exists() for name in FILES):
        raise FileError(f"{path} is not the folder of a run: it has neither {' nor '.join(FILES)}")


def _rows(path: Path, missing: list[str]) -> Rows:
    try:
        rows = read_rows(path)
    except FileNotFoundError:
        missing.append("There is no metrics.jsonl: no curves, no times and no events.")
        return nothing()
    except OSError as error:
        missing.append(f"metrics.jsonl cannot be read: {error.strerror}.")
        return nothing()
    if rows.cut:
        missing.append("The last line of metrics.jsonl is cut: it is left out.")
    if rows.unreadable:
        missing.append(f"{rows.unreadable:,} line{'s' * (rows.unreadable > 1)} of metrics.jsonl cannot be read.")
    if not rows.count:
        missing.append("No step has been logged yet.")
    return rows


def _config(path: Path, missing: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        values = read_toml(path, path.name)
        return path.read_text(encoding="utf-8"), flat(values)
    except (UserError, OSError) as error:
        missing.append(f"{error}." if path.exists() else "There is no config.toml: its settings are not known.")
    return "", {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "section.key" -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


def _trace(folder: Path, missing: list[str]) -> Mapping[str, Any] | None:
    """The newest trace that there is."""
    path = max(folder.glob("trace-*.json"), key=os.path.getmtime, default=None)
    if path is None:
        return None
    try:
        trace = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or 'it is not whole'}.")
        return None
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        missing.append(f"{path.name} holds no trace.")
        return None
    return trace


def _gaps(run: Run) -> list[str]:
    """What an older version, or a run that goes on, has not written."""
    if not run.rows.count:
        return []
    said = _not_finite(run)
    if not run.starts:
        said.append("metrics.jsonl has no start row: ranks, layout and versions are not known.")
    elif not run.ended:
        said.append("There is no end row: the run goes on, or was killed before its last step.")
    samples = run.rows.samples
    if not any("rank_s" in row for row in samples):
        only = " but computing" if any("rank_busy_s" in row for row in samples) else ""
        said.append(f"Where the time of a rank goes was not written down{only}.")
    if run.starts and np.isnan(run.rows.columns["mfu"]).all():
        said.append("The peak speed of the machine was not known: there is no MFU.")
    return said


def _not_finite(run: Run) -> list[str]:
    steps = run.rows.columns["step"][~np.isfinite(run.rows.columns["loss"])]
    losses = "losses are no finite numbers" if len(steps) > 1 else "loss is no finite number"
    return [f"{len(steps):,} logged {losses}, first at step {steps[0]:,.0f}."] if len(steps) else []
