"""Errors of the operating system in the user's words, and digests of files in fixed blocks."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.errors import FileError
from mpilm.guard.launch import together

BLOCK_BYTES = 16 * 2**20  # digests are of blocks, so that ranks share the hashing and no number of ranks changes the result
DIGEST_BYTES = 32


@contextmanager
def touching(path: str | Path, doing: str = "read") -> Iterator[None]:
    """Turn an OSError inside into a FileError that names the file and this host."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path}: cannot {doing} it on {socket.gethostname()}: {reason}") from None


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def hex_digest(*parts: bytes | str) -> str:
    """One hex digest of several parts; where one ends and the next begins matters."""
    digests = [digest_of(part.encode() if isinstance(part, str) else part) for part in parts]
    return digest_of(b"".join(digests)).hex()


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and wait until the disk has it; raises FileError."""
    with touching(path, "write"), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def gather_rows(comm: Comm, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Every rank's array, in rank order; shapes (n_r, ...) may differ in n_r alone. Collective."""
    width = int(np.prod(rows.shape[1:], dtype=np.int64))
    counts = [int(n) * width for n in comm.all_gather_json(len(rows))]
    out = torch.empty(sum(counts), dtype=torch.int64)
    comm.all_gather(torch.from_numpy(np.array(rows).reshape(-1)), out, counts)
    return [part.numpy().reshape(-1, *rows.shape[1:]) for part in out.split(counts)]


def digest_files(paths: Sequence[Path], sizes: Sequence[int], comm: Comm) -> list[str]:
    """The hex digest of each file's first `size` bytes, from digests of its blocks dealt out over the ranks. Collective.

    Raises FileError on every rank when one cannot read its blocks.
    """
    blocks = [(path, offset) for path, size in zip(paths, sizes, strict=True) for offset in range(0, size, BLOCK_BYTES)]
    first, last = len(blocks) * comm.rank // comm.size, len(blocks) * (comm.rank + 1) // comm.size
    mine = together(comm, lambda: b"".join(_digest_blocks(blocks[first:last])))
    rows = np.frombuffer(mine, dtype=np.int64).reshape(-1, DIGEST_BYTES // 8)
    every = np.concatenate(gather_rows(comm, rows))
    ends = np.cumsum([-(-size // BLOCK_BYTES) for size in sizes], dtype=np.int64)
    parts = np.split(every, ends[:-1]) if len(paths) else []
    return [digest_of(size.to_bytes(8, "little") + part.tobytes()).hex() for part, size in zip(parts, sizes, strict=True)]


def _digest_blocks(blocks: Iterable[tuple[Path, int]]) -> Iterator[bytes]:
    for path, offset in blocks:
        with touching(path), open(path, "rb") as file:
            file.seek(offset)
            data = file.read(BLOCK_BYTES)
        yield digest_of(data)
