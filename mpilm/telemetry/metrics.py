"""RUN/metrics.jsonl: one JSON object a row, and the same numbers for TensorBoard."""

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


class TensorBoard:
    """The numbers of each row as scalars, where the tensorboard package is installed; otherwise nothing."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            self._writer = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "time"):
                self._writer.add_scalar(key, value, row["step"], walltime=row.get("time"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
