"""Every byte of a checkpoint read and compared with its manifest; the ranks share the reading."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpilm.checkpoint.format import BLOCK_BYTES, checkpoints, manifest_entry, read_manifest
from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import run_on_root
from mpilm.errors import DataError, FileError, UserError

R = TypeVar("R")
Verify = Callable[[Path], None]
Files = Mapping[str, Mapping[str, Any]]
CHUNK = 1 << 20


def verify(folder: Path, comm: Comm | None = None) -> None:
    """Read every byte of a checkpoint. Raises DataError naming the file that is missing, cut or altered, and FileError where it
    cannot be read, which may pass. On one rank; those of `comm`, if given, have to be in `with_help`."""
    files = read_manifest(folder)
    for name, entry in files.items():
        _compare_size(folder / name, entry)
    if comm is not None:
        comm.broadcast_json([str(folder), files])
    digests = _digests(folder, files, comm or SelfComm())
    counts = [_blocks(entry) for entry in files.values()]
    for (name, entry), rows in zip(files.items(), digests.split(counts)):
        if manifest_entry(entry["bytes"], rows.numpy().tobytes()) != entry:
            raise DataError(f"checkpoint file {folder / name} has been altered: its digest is not the manifest's")


def with_help(comm: Comm, action: Callable[[Verify], R]) -> R | None:
    """As `on_root`, with a `verify` for the action in which the other ranks take part. Collective."""
    result, failure = None, None
    if comm.rank == 0:
        try:
            result = action(lambda folder: verify(folder, comm))
        except UserError as error:
            failure = error
        comm.broadcast_json(None)
    else:
        while asked := comm.broadcast_json(None):
            _digests(Path(asked[0]), asked[1], comm, quiet=True)
    return run_on_root(comm, lambda: _given(result, failure))


def newest_valid(parent: Path, check: Verify = verify) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose every byte is right, and what is wrong with the newer ones. Raises FileError."""
    complaints: dict[Path, str] = {}
    for folder in reversed(checkpoints(parent)):
        try:
            check(folder)
            return folder, complaints
        except DataError as error:
            complaints[folder] = str(error)
    return None, complaints


def _given(result: R | None, failure: UserError | None) -> R | None:
    if failure is not None:
        raise failure
    return result


def _compare_size(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        nbytes = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"checkpoint file {path} is missing") from None
    except OSError as error:
        raise FileError(f"checkpoint file {path} cannot be read: {error.strerror}") from None
    if nbytes != entry["bytes"] and path.is_file():
        raise DataError(f"checkpoint file {path} has {nbytes} bytes, the manifest says {entry['bytes']}")


def _blocks(entry: Mapping[str, Any]) -> int:
    return -(-int(entry["bytes"]) // BLOCK_BYTES)


def _digests(folder: Path, files: Files, comm: Comm, quiet: bool = False) -> Tensor:
    """The sha256 of every block of every file, a row each, of which this rank reads its share. Collective; raises FileError,
    unless `quiet`, where any rank could not read."""
    blocks = [(name, block) for name, entry in files.items() for block in range(_blocks(entry))]
    rows, failure = torch.zeros(len(blocks), 32, dtype=torch.uint8), ""
    for i in range(comm.rank, len(blocks), comm.size):
        name, block = blocks[i]
        try:
            rows[i] = torch.frombuffer(bytearray(_digest(folder / name, block)), dtype=torch.uint8)
        except OSError as error:
            failure = failure or f"checkpoint file {folder / name} cannot be read: {error.strerror}"
    failures = [theirs for theirs in comm.all_gather_json(failure) if theirs]
    comm.all_reduce(rows.view(torch.int64))  # rows of others are zero, so the sum brings them together
    if failures and not quiet:
        raise FileError(failures[0])
    return rows


def _digest(path: Path, block: int) -> bytes:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with open(path, "rb") as file:
        file.seek(block * BLOCK_BYTES)
        while left and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()
