"""Names, digests and the layout of files on disk; nothing here knows of ranks.

A checkpoint is a folder step-NNNNNNNN whose manifest.json, written last, holds the size and the digest of every other
file. It is written under a temporary name and renamed when complete: a folder with the final name and a manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpilm.errors import DataError, FileError

BLOCK_BYTES = 16 << 20  # files are written and hashed in fixed blocks, so that several ranks can share one file
MANIFEST = "manifest.json"
TEMPORARY = ".writing-"
NAME = re.compile(r"step-(\d{8,})")


Point = Callable[[str], None]


def nowhere(point: str) -> None:
    """A point on the way of a checkpoint to the disk, at which nothing is to be done."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other folder."""
    match = NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def incomplete(parent: Path) -> list[Path]:
    """Folders in `parent` that are called like a checkpoint and have no manifest."""
    return sorted(f for f in parent.iterdir() if step_of(f) is not None and not (f / MANIFEST).is_file())


def checkpoints(parent: Path) -> list[Path]:
    """The complete checkpoints in `parent`, oldest first, found by looking and not by a file that says so."""
    if not parent.is_dir():
        return []
    found = [(step, f) for f in parent.iterdir() if (step := step_of(f)) is not None and (f / MANIFEST).is_file()]
    return [folder for _, folder in sorted(found)]


class Digest:
    """sha256 over the sha256 of each block of BLOCK_BYTES."""

    def __init__(self) -> None:
        self.bytes = 0
        self._blocks = b""
        self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def update(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        self.bytes += len(view)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks += self._block.digest()
        self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        if self._room < BLOCK_BYTES:
            self._close_block()
        return manifest_entry(self.bytes, self._blocks)


def manifest_entry(nbytes: int, block_digests: bytes) -> dict[str, Any]:
    """What the manifest says of a file, from the sha256 of each of its blocks, one after the other."""
    return {"bytes": nbytes, "sha256_of_blocks": hashlib.sha256(block_digests).hexdigest()}


class Writer:
    """Writes small files of one folder, hashing on the way, each synced to disk when it is closed; `entries` is what the
    manifest will say, and takes files that others have written too."""

    def __init__(self, folder: Path, at: Point = nowhere):
        self.folder, self.at = folder, at
        self.entries: dict[str, dict[str, Any]] = {}

    def json(self, name: str, value: Any) -> None:
        self.text(name, written(value))

    def text(self, name: str, text: str) -> None:
        self.data(name, text.encode())

    def data(self, name: str, data: bytes) -> None:
        with open(self.folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        digest = Digest()
        digest.update(data)
        self.entries[name] = digest.entry()

    def all_gather_parameters(self, final: Path) -> None:
        """Write the manifest, after which the folder is complete, and give the folder its name, durably."""
        self.at("checkpoint.manifest")
        self.json(MANIFEST, {"format": 1, "files": self.entries})
        sync_folder(self.folder)
        self.at("checkpoint.rename")
        os.rename(self.folder, final)
        sync_folder(final.parent)


def written(value: Any) -> str:
    """The one way in which JSON is written here."""
    return json.dumps(value, indent=2) + "\n"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The entries of a checkpoint's manifest by file name; raises FileError or DataError."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, dict) or not all(map(_is_entry, files, files.values())):
        raise DataError(f"{folder / MANIFEST} is not a manifest, of format 1, of files in its own folder")
    if (folder / MANIFEST).read_bytes() != written(manifest).encode():  # it has no digest of its own
        raise DataError(f"{folder / MANIFEST} has been altered: it is not as it was written")
    return files


def in_folder(name: Any) -> bool:
    """Whether a name found in a file is that of a file beside it, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _is_entry(name: str, entry: Any) -> bool:
    return in_folder(name) and isinstance(entry, dict) and set(entry) == {"bytes", "sha256_of_blocks"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises FileError or DataError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value
