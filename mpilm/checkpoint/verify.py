"""Verification: the ranks share the reading of every byte of a checkpoint, and rank 0 compares it with the manifest."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from mpilm.checkpoint.format import list_checkpoints, manifest_entry, read_manifest
from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.data.files import file_errors
from mpilm.data.gather import digest_blocks
from mpilm.errors import DataError

R = TypeVar("R")
Verifier = Callable[[Path], None]


def verify_checkpoint(folder: Path, comm: Comm | None = None) -> None:
    """Read every byte of a checkpoint. Raises DataError naming a file that is missing, cut or damaged, and FileError if a file
    cannot be read, which may pass. If `comm` is given, its other ranks must be in `run_on_root_with_verify`."""
    files = read_manifest(folder)
    sizes = {name: entry["bytes"] for name, entry in files.items()}
    for name, expected in sizes.items():
        path = folder / name
        with file_errors(path):
            if not path.exists():
                raise DataError(f"checkpoint file {path} is missing")
            size = path.stat().st_size if path.is_file() else expected
        if size != expected:
            raise DataError(f"checkpoint file {path} has {size} bytes, but the manifest lists {expected}")
    if comm is not None:
        comm.broadcast_json([str(folder), sizes])
    try:
        digests = _digest_files(folder, sizes, comm or SelfComm())
    except CollectiveError as error:
        raise error.error from None
    for (name, entry), joined in zip(files.items(), digests):
        if manifest_entry(entry["bytes"], joined) != entry:
            raise DataError(f"checkpoint file {folder / name} is damaged: its digest differs from the one in the manifest")


def _digest_files(folder: Path, sizes: Mapping[str, int], comm: Comm) -> list[bytes]:
    return digest_blocks([folder / name for name in sizes], list(sizes.values()), comm, hashlib.sha256)


def run_on_root_with_verify(comm: Comm, action: Callable[[Verifier], R]) -> R | None:
    """Run `action` on rank 0 with a `verify` in which all ranks share the hashing; otherwise like `run_on_root`. Collective."""

    def run() -> R:
        try:
            return action(lambda folder: verify_checkpoint(folder, comm))
        finally:
            comm.broadcast_json(None)

    if comm.rank != 0:
        while request := comm.broadcast_json(None):
            with contextlib.suppress(CollectiveError):  # which rank 0 handles
                _digest_files(Path(request[0]), request[1], comm)
    return run_on_root(comm, run)


def find_newest_valid(parent: Path, verify: Verifier = verify_checkpoint) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint whose every byte is right, or None, and the errors of the newer ones. Raises FileError."""
    errors: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(parent)):
        try:
            verify(folder)
            return folder, errors
        except DataError as error:
            errors[folder] = str(error)
    return None, errors
