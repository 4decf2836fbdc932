"""Verification: the ranks share the reading of every byte of a checkpoint, and rank 0 compares it with the manifest."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpilm.checkpoint.format import BLOCK_BYTES, count_blocks, list_checkpoints, manifest_entry, read_manifest, reading
from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import run_on_root
from mpilm.errors import DataError, FileError

R = TypeVar("R")
Verifier = Callable[[Path], None]


def verify_checkpoint(folder: Path, comm: Comm | None = None) -> None:
    """Read every byte of a checkpoint. Raises DataError naming a file that is missing, cut or altered, and FileError if a file
    cannot be read, which may pass. If `comm` is given, its other ranks must be in `run_on_root_with_verify`."""
    files = read_manifest(folder)
    for name, entry in files.items():
        path = folder / name
        with reading(path):
            if not path.exists():
                raise DataError(f"checkpoint file {path} is missing")
            size = path.stat().st_size if path.is_file() else entry["bytes"]
            if size != entry["bytes"]:
                raise DataError(f"checkpoint file {path} has {size} bytes, but the manifest lists {entry['bytes']}")
    if comm is not None:
        comm.broadcast_json([str(folder), files])
    digests = _hash_files(folder, files, comm or SelfComm())
    for (name, entry), rows in zip(files.items(), digests.split([count_blocks(entry["bytes"]) for entry in files.values()])):
        if manifest_entry(entry["bytes"], rows.numpy().tobytes()) != entry:
            raise DataError(f"checkpoint file {folder / name} has been altered: its digest is not the manifest's")


def run_on_root_with_verify(comm: Comm, action: Callable[[Verifier], R]) -> R | None:
    """Run `action` on rank 0, passing it a `verify` in which all ranks share the hashing. Errors and results are as in
    `on_root`. Collective."""

    def run() -> R:
        try:
            return action(lambda folder: verify_checkpoint(folder, comm))
        finally:
            comm.broadcast_json(None)

    if comm.rank != 0:
        while request := comm.broadcast_json(None):
            _hash_files(Path(request[0]), request[1], comm, raise_errors=False)
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


def _hash_files(folder: Path, files: Mapping[str, Mapping[str, Any]], comm: Comm, raise_errors: bool = True) -> Tensor:
    """Return the sha256 of every block of every file, one per row; each rank reads a share of the blocks. Collective. Raises
    FileError if any rank could not read."""
    blocks = [(folder / name, number) for name, entry in files.items() for number in range(count_blocks(entry["bytes"]))]
    rows, failure = torch.zeros(len(blocks), 32, dtype=torch.uint8), ""
    for i in range(comm.rank, len(blocks), comm.size):
        path, number = blocks[i]
        try:
            with reading(path):
                rows[i] = torch.frombuffer(bytearray(_hash_block(path, number)), dtype=torch.uint8)
        except FileError as error:
            failure = failure or str(error)
    failures = [message for message in comm.all_gather_json(failure) if message]
    comm.all_reduce(rows.view(torch.int64))  # the rows of other ranks are zero
    if failures and raise_errors:
        raise FileError(failures[0])
    return rows


def _hash_block(path: Path, number: int) -> bytes:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with open(path, "rb") as file:
        file.seek(number * BLOCK_BYTES)
        while left and (chunk := file.read(min(1 << 20, left))):  # stays in the cache until it is hashed
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()
