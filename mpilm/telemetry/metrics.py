"""RUN/metrics.jsonl: one JSON object a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Appends rows, each at once on disk for whoever is watching.

    `step` is the checkpoint that the run goes on from: rows of later steps, and a cut last line, are taken away; all
    before them stays byte for byte.
    """

    def __init__(self, path: Path, step: int):
        keep = kept_bytes(path.read_bytes(), step) if path.exists() else 0
        self._file = open(path, "ab")  # noqa: SIM115
        self._file.truncate(keep)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def kept_bytes(content: bytes, step: int) -> int:
    """The length of the part of a metrics file that belongs to the first `step` steps; a line that is no row stays."""
    at = 0
    for line in content.splitlines(keepends=True):
        row = parsed(line)
        if not line.endswith(b"\n") or (row and row.get("step", 0) > step):
            break
        at += len(line)
    return at


def parsed(line: bytes) -> dict[str, Any] | None:
    """A row; None where the line is none, or cut."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step", 0), int)
    return row if whole else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a cut last line, and what is no row, is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [row for row in map(parsed, lines) if row is not None]


class Tail:
    """The rows of a metrics file that somebody else is writing, as they come; what is no row is passed over."""

    def __init__(self, path: Path):
        self.path, self._at, self._last = path, 0, b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole rows since the last time; and whether they are all there are, since what was read before has gone."""
        if not self.path.exists():
            return [], False
        with open(self.path, "rb") as file:
            file.seek(self._at - len(self._last))
            anew = file.read(len(self._last)) != self._last
            if anew:
                self._at, self._last = 0, b""
                file.seek(0)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self._at += sum(map(len, lines))
        self._last = lines[-1] if lines else self._last
        return [row for row in map(parsed, lines) if row is not None], anew
