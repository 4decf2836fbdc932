"""RUN/metrics.jsonl, of a million rows too: numbers as arrays, and what each rank said of a few hundred rows.

What ranks say comes last in a row and is most of its text, so it is cut off before the row is parsed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
COLUMNS = ("step", "time", "tokens", "loss", "grad_norm", "lr", "step_s", "tokens_per_s", "mfu")
OF_RANKS = ("memory_bytes", "rank_s", "rank_busy_s")
WHAT = frozenset({"loss", "eval_loss", "event"})  # what a row is of
CUTS = tuple(f', "{key}"'.encode() for key in OF_RANKS)  # within a string the quotes would be escaped
BLOCK_BYTES = 4 << 20
SAMPLES = 400  # rows of which the ranks' part is read


@dataclass(frozen=True)
class Rows:
    """The rows of a run, by kind."""

    columns: Mapping[str, np.ndarray]
    """Of the logged steps, float64, one array for each of COLUMNS; NaN where a row has no such number."""
    evaluations: np.ndarray
    """(N, 3): step, time, loss."""
    events: tuple[Row, ...] = ()
    samples: tuple[Row, ...] = ()
    """Whole rows of logged steps, evenly spread, that hold something of OF_RANKS."""
    unreadable: int = 0
    """Lines that are no row."""
    cut: bool = False
    """The last line is not whole."""

    @property
    def count(self) -> int:
        return len(self.columns["step"])


def read_rows(path: Path) -> Rows:
    """The rows that are there now; raises OSError."""
    reader = _Reader(os.path.getsize(path))
    with open(path, "rb") as file:
        for lines in _blocks(file, reader.size):
            reader.take(lines)
    return reader.rows()


def nothing() -> Rows:
    """Of a run without the file."""
    return _Reader(0).rows()


def _blocks(file: Any, size: int) -> Iterator[list[bytes]]:
    """Lines of the first `size` bytes: what is written meanwhile is left for another report."""
    while file.tell() < size and (lines := file.readlines(BLOCK_BYTES)):
        yield lines


class _Reader:
    """Collects rows, block by block."""

    def __init__(self, size: int):
        self.size, self.done, self.sampled = size, 0, 0
        self.parts: list[np.ndarray] = [np.empty((0, len(COLUMNS)))]
        self.evaluations: list[tuple[float, float, float]] = []
        self.events: list[Row] = []
        self.samples: list[Row] = []
        self.unreadable, self.cut = 0, False

    def take(self, lines: list[bytes]) -> None:
        if not lines[-1].endswith(b"\n"):
            self.cut = True
            lines = lines[:-1]
        rows, unreadable = parse_heads(lines)
        self.unreadable += unreadable
        steps = [row for row in rows if "event" not in row and ("loss" in row or "step_s" in row)]
        self.parts.append(_numbers(steps))
        self.events += [row for row in rows if "event" in row]
        self.evaluations += [
            (number(row.get("step")), number(row.get("time")), number(row["eval_loss"])) for row in rows if "eval_loss" in row
        ]
        self._sample(lines)

    def _sample(self, lines: Sequence[bytes]) -> None:
        self.done += sum(map(len, lines))
        due = SAMPLES * self.done // max(1, self.size) - self.sampled
        self.sampled += due
        for at in dict.fromkeys(np.linspace(0, len(lines) - 1, min(due, len(lines))).astype(int).tolist()):
            row = _parse(lines[at])
            if row and "event" not in row and any(key in row for key in OF_RANKS):
                self.samples.append(row)

    def rows(self) -> Rows:
        table = np.concatenate(self.parts)
        return Rows(
            {key: table[:, i] for i, key in enumerate(COLUMNS)}, np.array(self.evaluations).reshape(-1, 3),
            tuple(self.events), tuple(self.samples), self.unreadable, self.cut,
        )  # fmt: skip


def parse_heads(lines: Sequence[bytes]) -> tuple[list[Row], int]:
    """The rows without what ranks say, and how many lines are no rows."""
    heads = [_head(line) for line in lines]
    try:
        rows = json.loads(b"[" + b",".join(heads) + b"]")  # all at once: a third of the time
    except (ValueError, RecursionError):
        rows = [_parse(head) or _parse(line) for head, line in zip(heads, lines)]
    for i, row in enumerate(rows):
        if isinstance(row, dict) and not WHAT & row.keys():  # ranks came first, for once
            rows[i] = _parse(lines[i])
    whole = [row for row in rows if isinstance(row, dict)]
    return whole, len(rows) - len(whole)


def _head(line: bytes) -> bytes:
    for cut in CUTS:
        at = line.find(cut)
        if at > 0:
            return line[:at] + b"}"
    return line


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _numbers(rows: Sequence[Row]) -> np.ndarray:
    """(rows, COLUMNS). The quick way where all rows have the same keys, as those of one version have."""
    table = np.full((len(rows), len(COLUMNS)), np.nan)
    there = [key for key in COLUMNS if rows and key in rows[0]]
    try:
        if len({len(row) for row in rows}) == 1 and len(there) > 1:
            table[:, [COLUMNS.index(key) for key in there]] = np.array([itemgetter(*there)(row) for row in rows], dtype=float)
            return table
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    for i, row in enumerate(rows):
        table[i] = [number(row.get(key)) for key in COLUMNS]
    return table


def number(value: Any) -> float:
    """`value` as a float; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("nan")


def of_ranks(value: Any) -> np.ndarray | None:
    """A list of a number for each rank; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    return np.array([number(each) for each in value])
