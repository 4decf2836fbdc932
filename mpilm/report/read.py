"""Reading a run folder as far as it is complete: absent and broken parts are listed, not raised."""

import os
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config.parse import read_toml
from mpilm.config.settings import flatten
from mpilm.data.files import file_errors, parse_json
from mpilm.errors import DataError, FileError, UserError
from mpilm.formatting import count_noun
from mpilm.telemetry.metrics import MetricsRow, MetricsTable, read_metrics_table


@dataclass(frozen=True)
class RecordedRun:
    """The contents of a run folder."""

    folder: Path
    metrics: MetricsTable
    config: dict[str, Any]  # resolved settings, "section.key" -> value
    config_text: str
    trace: Mapping[str, Any] | None
    missing: list[str]  # a sentence for each part that is absent or broken

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    def find_events(self, *kinds: str) -> list[MetricsRow]:
        return [row for row in self.metrics.events if row["event"] in kinds]

    @property
    def starts(self) -> list[MetricsRow]:
        return self.find_events("start")

    @property
    def start(self) -> MetricsRow:
        """The row of the last start; empty if none was logged."""
        return self.starts[-1] if self.starts else {}

    @property
    def ranks(self) -> int:
        """Ranks of the last start; 0 if unknown."""
        return self.start.get("ranks", 0)

    @property
    def has_ended(self) -> bool:
        """True if the last start ran to its end or was stopped."""
        return [row["event"] for row in self.find_events("start", "end", "stopped")][-1:] in (["end"], ["stopped"])

    def name_rank(self, rank: int) -> str:
        """Return the rank with its host, if that is known."""
        hosts = self.start.get("hosts", [])
        return f"rank {rank} {hosts[rank]}" if rank < len(hosts) else f"rank {rank}"

    def name_ranks(self, values: Sized) -> list[str]:
        """Return the names of as many ranks as there are values."""
        return [self.name_rank(rank) for rank in range(len(values))]


def read_run(folder: str | Path) -> RecordedRun:
    """Read a run folder. Raises FileError if it is not one."""
    path, missing = Path(folder), list[str]()
    with file_errors(path):
        if not path.exists():
            raise FileError(f"{path} does not exist; pass a run folder, such as runs/NAME")
        if path.is_file():
            raise FileError(f"{path} is a file; pass the run folder, such as {path.parent}")
        if not (path / "metrics.jsonl").exists() and not (path / "config.toml").exists():
            raise FileError(f"{path} is not a run folder: it has neither metrics.jsonl nor config.toml")
    metrics, config, text = MetricsTable(), dict[str, Any](), ""
    try:
        metrics = read_metrics_table(path / "metrics.jsonl")
    except OSError as error:
        missing.append(f"metrics.jsonl cannot be read: {error.strerror}.")
    try:
        config = flatten(read_toml(path / "config.toml", "config.toml"))
        text = (path / "config.toml").read_text(encoding="utf-8")
    except (UserError, OSError) as error:
        missing.append(f"{error}.")
    run = RecordedRun(path, metrics, config, text, _load_trace(path, missing), missing)
    missing += _find_gaps(run)
    return run


def _load_trace(folder: Path, missing: list[str]) -> Mapping[str, Any] | None:
    """Return the newest trace of the run; None if it has none that can be read."""
    path = max(folder.glob("trace-*.json"), key=os.path.getmtime, default=None)
    if path is None:
        return None
    try:
        trace = parse_json(path.read_bytes(), path.name)
        if isinstance(trace.get("traceEvents"), list):
            return trace
        missing.append(f"{path.name} is not a trace.")
    except (OSError, DataError) as error:
        missing.append(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or 'it is not complete JSON'}.")
    return None


def _find_gaps(run: RecordedRun) -> list[str]:
    """Return a sentence for everything that is broken, or that an older version or a run still going on did not log."""
    metrics, logged = run.metrics, len(run.metrics.columns["step"])
    bad_steps = metrics.columns["step"][~np.isfinite(metrics.columns["loss"])]
    bad_losses = f"{len(bad_steps):,} logged {'loss is' if len(bad_steps) == 1 else 'losses are'} not finite"
    has_no_mfu = logged and run.starts and np.isnan(metrics.columns["mfu"]).all()
    gaps = (
        (metrics.truncated, "The last line of metrics.jsonl is incomplete; it was ignored."),
        (metrics.unreadable, f"{count_noun(metrics.unreadable, 'line')} of metrics.jsonl cannot be read."),
        (not logged, "No step has been logged yet."),
        (len(bad_steps), f"{bad_losses}, first at step {next(iter(bad_steps), 0):,.0f}."),
        (logged and not run.starts, "metrics.jsonl has no start row: ranks, layout and versions are unknown."),
        (run.starts and not run.has_ended, "metrics.jsonl has no end row: the run is still going on, or was killed."),
        (logged and not any("rank_s" in row for row in metrics.samples), "The run logged no times of its ranks."),
        (has_no_mfu, "The run logged no MFU, because the peak speed of the machine was unknown."),
    )
    return [sentence for applies, sentence in gaps if applies]
