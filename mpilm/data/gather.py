"""Arrays of all ranks, and digests of files whose reading the ranks share."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.data.files import blake2b_digest, file_errors

BLOCK_BYTES = 16 * 2**20  # files are digested in blocks of this size, so the number of ranks does not change a digest


def all_gather_rows(comm: Comm, rows: NDArray) -> list[NDArray]:
    """Return every rank's array, in rank order; shapes (n_r, ...) may differ in n_r alone. Collective."""
    counts = [int(np.prod(shape, dtype=np.int64)) for shape in comm.all_gather_json(rows.shape)]
    mine = torch.from_numpy(np.array(rows).reshape(-1))
    out = torch.empty(sum(counts), dtype=mine.dtype)
    comm.all_gather(mine, out, counts)
    return [part.numpy().reshape(-1, *rows.shape[1:]) for part in out.split(counts)]


def digest_files(paths: Sequence[Path], sizes: Sequence[int], comm: Comm) -> list[str]:
    """Return the hex digest of each file's first `size` bytes. Collective; raises FileError on every rank."""
    blocks = [(path, start) for path, size in zip(paths, sizes, strict=True) for start in range(0, size, BLOCK_BYTES)]
    mine = blocks[len(blocks) * comm.rank // comm.size : len(blocks) * (comm.rank + 1) // comm.size]
    digests = run_on_all_ranks(comm, lambda: [_digest_block(path, start) for path, start in mine])
    every = (bytes.fromhex(digest) for theirs in comm.all_gather_json(digests) for digest in theirs)
    parts = [b"".join(islice(every, -(-size // BLOCK_BYTES))) for size in sizes]
    return [blake2b_digest(size.to_bytes(8, "little") + part).hex() for size, part in zip(sizes, parts)]


def _digest_block(path: Path, start: int) -> str:
    with file_errors(path), open(path, "rb") as file:
        file.seek(start)
        return blake2b_digest(file.read(BLOCK_BYTES)).hex()
