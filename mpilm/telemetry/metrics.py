"""RUN/metrics.jsonl: one JSON object a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Appends rows, each at once on disk for whoever is watching.

    `step` is the checkpoint that the run goes on from: rows of later steps, and a cut last line, are taken away; all
    earlier rows stay byte for byte.
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
    """The length of the part of a metrics file that belongs to the first `step` steps."""
    at = 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or row.get("step", 0) > step:
            break
        at += len(line)
    return at


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a cut last line is left out."""
    content = path.read_bytes()
    return [json.loads(line) for line in content[: kept_bytes(content, 2**63)].splitlines()]


class Tail:
    """The rows of a metrics file that somebody else is writing, as they come."""

    def __init__(self, path: Path):
        self.path, self._at = path, 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole rows since the last time; and whether they are all there are, since the file has become shorter."""
        if not self.path.exists():
            return [], False
        anew = self.path.stat().st_size < self._at
        self._at = 0 if anew else self._at
        with open(self.path, "rb") as file:
            file.seek(self._at)
            lines = file.read().splitlines(keepends=True)
        rows = []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._at += len(line)
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows, anew
