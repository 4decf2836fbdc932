"""RUN/metrics.jsonl: one JSON object per row, written and followed; and as arrays, for files of up to millions of rows."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpilm.data.files import parse_json
from mpilm.errors import DataError, FileError

MetricsRow = dict[str, Any]
COLUMNS = ("step", "time", "tokens", "loss", "grad_norm", "lr", "step_s", "tokens_per_s", "mfu")
EVALUATION_COLUMNS = ("step", "time", "eval_loss")
PER_RANK = ("memory_bytes", "rank_s")  # lists with a value for each rank
FROM_PER_RANK = re.compile(rb', "(?:memory_bytes|rank_s)".*', re.DOTALL)  # within a string the quotes would be escaped
ROW_KINDS = frozenset({"loss", "eval_loss", "event"})  # every row has one of these keys
START_TYPES = {"ranks": int, "layout": dict, "versions": dict, "hosts": list, "command": str}  # other values are dropped
BLOCK_BYTES = 4 << 20
SAMPLES = 400  # rows whose per-rank values are read
SLOW = 1.2  # a straggler computes this many times as long as the median rank,
SPREADS = 4  # differs from it by so many medians of the differences of all ranks,
SLOW_STEPS = 10  # and does so in all rows between two that are so many steps apart


def parse_row(line: bytes) -> MetricsRow | None:
    """Return the row in a line; None if the line is cut off or is not a row."""
    try:
        row = parse_json(line, "")
    except DataError:
        return None
    return row if line.endswith(b"\n") and isinstance(row.get("step", 0), int) else None


def length_through_step(lines: Iterable[bytes], step: int) -> int:
    """Return the length of the rows of the first `step` steps; it includes lines among them that are not rows."""
    length = 0
    for line in lines:
        row = parse_row(line)
        if not line.endswith(b"\n") or (row and row.get("step", 0) > step):
            break
        length += len(line)
    return length


class MetricsWriter:
    """Appends rows and flushes each, so that followers see it at once. `step` is the checkpoint that the run resumes from: rows
    of later steps and a cut last line are removed, and all rows before them stay byte for byte."""

    def __init__(self, path: Path, step: int):
        self._path, self._file = path, open(path, "a+b")  # noqa: SIM115
        self._file.seek(0)
        self._file.truncate(length_through_step(self._file, step))

    def write(self, row: MetricsRow) -> None:
        if not self._path.exists():
            raise FileError(f"{self._path} has been removed while the run was writing it; later checkpoints would be lost")
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsFollower:
    """Reads the rows of a metrics file as another process writes them."""

    def __init__(self, path: Path):
        self.path, self._position, self._last_line = path, 0, b""

    def read(self) -> tuple[list[MetricsRow], bool]:
        """Return the new complete rows, and whether the run restarted: a resume removed rows, so these are all there are."""
        if not self.path.exists():
            return [], False
        with open(self.path, "rb") as file:
            file.seek(self._position - len(self._last_line))
            restarted = file.read(len(self._last_line)) != self._last_line
            if restarted:
                self._position, self._last_line = 0, b""
                file.seek(0)
            lines = [line for line in file if line.endswith(b"\n")]
        self._position += sum(map(len, lines))
        self._last_line = lines[-1] if lines else self._last_line
        return list(filter(None, map(parse_row, lines))), restarted


@dataclass(frozen=True)
class MetricsTable:
    """The rows of metrics.jsonl by kind."""

    columns: Mapping[str, np.ndarray] = field(default_factory=lambda: dict.fromkeys(COLUMNS, np.empty(0)))
    # float64, one value per logged step; NaN where the row lacks it
    evaluations: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))  # (N, 3): EVALUATION_COLUMNS
    events: tuple[MetricsRow, ...] = ()
    samples: tuple[MetricsRow, ...] = ()  # whole rows with per-rank values, evenly spread over the file
    unreadable: int = 0  # lines that are not rows
    truncated: bool = False  # the last line is incomplete


def read_metrics_table(path: Path) -> MetricsTable:
    """Read a metrics file of up to millions of rows. Raises OSError."""
    steps, events, evaluations = [_to_array([], COLUMNS)], list[MetricsRow](), list[MetricsRow]()
    unreadable, truncated = 0, False
    with open(path, "rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            if not lines[-1].endswith(b"\n"):
                truncated = bool(lines.pop())
            rows = parse_rows(lines)
            unreadable += len(lines) - len(rows)
            steps.append(_to_array([row for row in rows if "event" not in row and ("loss" in row or "step_s" in row)], COLUMNS))
            evaluations += [row for row in rows if "eval_loss" in row]
            found = (row.items() for row in rows if "event" in row)
            events += [{key: v for key, v in items if isinstance(v, START_TYPES.get(key, object))} for items in found]
        samples = _sample_rows(file)
    columns = dict(zip(COLUMNS, np.concatenate(steps).T))
    return MetricsTable(columns, _to_array(evaluations, EVALUATION_COLUMNS), tuple(events), samples, unreadable, truncated)


def parse_rows(lines: Sequence[bytes]) -> list[MetricsRow]:
    """Parse rows without their per-rank values, which come last and are most of the text; drop lines that are not rows."""
    heads = [FROM_PER_RANK.sub(b"}\n", line) for line in lines]
    try:
        rows = parse_json(b"[" + b",".join(heads) + b"]", "", list)  # a single call takes a third of the time
        if len(rows) != len(lines):
            raise DataError("a line held several values")
    except DataError:
        rows = [parse_row(head) or parse_row(line) for head, line in zip(heads, lines)]
    for i, row in enumerate(rows):
        if isinstance(row, dict) and not ROW_KINDS & row.keys():  # the per-rank values came first
            rows[i] = parse_row(lines[i])
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step", 0), int)]


def _sample_rows(file: BinaryIO) -> tuple[MetricsRow, ...]:
    """Return about SAMPLES rows that hold per-rank values, evenly spread over the file."""
    starts = {0: None}  # an ordered set
    for offset in np.linspace(0, file.seek(0, os.SEEK_END), SAMPLES, endpoint=False).astype(int).tolist():
        file.seek(offset)
        file.readline()
        starts[file.tell()] = None
    rows = [parse_row(file.readline()) for start in starts if file.seek(start) == start]
    return tuple(row for row in rows if row and "event" not in row and any(key in row for key in PER_RANK))


def _to_array(rows: Sequence[MetricsRow], keys: Sequence[str]) -> np.ndarray:
    """Return the numbers of rows as float64, (rows, keys); NaN for anything that is not a number."""
    # The first way is the fastest, and needs all keys in all rows; the last one takes rows of any kind.
    for pick in (itemgetter(*keys), lambda row: [row.get(key, np.nan) for key in keys]):
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            return np.array(list(map(pick, rows)), dtype=float).reshape(-1, len(keys))
    return np.array([[to_float(row.get(key)) for key in keys] for row in rows])


def to_float(value: Any) -> float:
    """Return `value` as a float; NaN if it is not a number."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        return float("nan")


def select_stragglers(steps: Sequence[float], compute_s: np.ndarray) -> list[tuple[int, float, int]]:
    """Return the ranks that compute SLOW times as long as the median, on average and in all rows of SLOW_STEPS, slowest first:
    in a single row, ranks that share cores are slow by chance. Each has its rank, its mean compute time over the median of all
    ranks, and the rows in which it was that slow. `steps`: of the rows, rising; `compute_s`: (rows, ranks)."""
    middle = (compute_s.shape[1] - 1) // 2
    median = np.sort(compute_s, axis=1)[:, middle, None]
    spread = np.sort(np.abs(compute_s - median), axis=1)[:, middle, None]
    slow = compute_s > median + np.maximum((SLOW - 1) * median, SPREADS * spread)
    firsts = np.searchsorted(steps, np.array(steps) - SLOW_STEPS, side="right") - 1
    windows = [slow[first : last + 1].all(axis=0) for last, first in enumerate(firsts) if first >= 0]
    is_slow, mean_s = np.any(windows, axis=0), compute_s.mean(axis=0)
    ratios = mean_s / np.sort(mean_s)[middle]
    ranks = [rank for rank in np.argsort(-mean_s).tolist() if windows and is_slow[rank] and ratios[rank] > SLOW]
    return [(rank, float(ratios[rank]), int(slow[:, rank].sum())) for rank in ranks]


def per_rank_values(value: Any) -> np.ndarray | None:
    """Return a list with a number for each rank as an array; None for anything else."""
    return np.array([to_float(each) for each in value]) if isinstance(value, list) and value else None
