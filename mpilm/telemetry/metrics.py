"""RUN/metrics.jsonl: one JSON object per row."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpilm.data.files import parse_json
from mpilm.errors import DataError, FileError

MetricsRow = dict[str, Any]


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
