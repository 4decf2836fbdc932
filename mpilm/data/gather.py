"""Rows of every rank brought together, and digests of files that the ranks share the reading of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.data.files import DIGEST_BYTES, digest_of, touching

BLOCK_BYTES = 16 * 2**20  # digests are of blocks, so that no number of ranks changes the result


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
    mine = run_on_all_ranks(comm, lambda: b"".join(_digest_blocks(blocks[first:last])))
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
