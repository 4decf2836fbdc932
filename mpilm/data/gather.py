"""Arrays of all ranks, and digests of files whose reading the ranks share."""

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.data.files import BLOCK_BYTES, blake2b_digest, file_errors

READ_BYTES = 2**20  # that stay in the cache until they are hashed
AHEAD_BYTES = 2**22  # that the kernel is asked to read meanwhile


def all_gather_rows(comm: Comm, rows: NDArray) -> list[NDArray]:
    """Return every rank's array, in rank order; shapes (n_r, ...) may differ in n_r alone. Collective."""
    counts = [int(np.prod(shape, dtype=np.int64)) for shape in comm.all_gather_json(rows.shape)]
    mine = torch.from_numpy(np.array(rows).reshape(-1))
    out = torch.empty(sum(counts), dtype=mine.dtype)
    comm.all_gather(mine, out, counts)
    return [part.numpy().reshape(-1, *rows.shape[1:]) for part in out.split(counts)]


def digest_files(paths: Sequence[Path], sizes: Sequence[int], comm: Comm) -> list[str]:
    """Return the hex digest of each file's first `size` bytes. Collective; raises FileError on every rank."""
    digests = digest_blocks(paths, sizes, comm, lambda: blake2b(digest_size=32))
    return [blake2b_digest(size.to_bytes(8, "little") + joined).hex() for size, joined in zip(sizes, digests)]


def digest_blocks(paths: Sequence[Path], sizes: Sequence[int], comm: Comm, new_hash: Callable[[], Any]) -> list[bytes]:
    """Return the joined digests of the blocks of each file. Collective; raises FileError on every rank."""
    blocks = [(path, start) for path, size in zip(paths, sizes, strict=True) for start in range(0, size, BLOCK_BYTES)]
    mine = blocks[len(blocks) * comm.rank // comm.size : len(blocks) * (comm.rank + 1) // comm.size]
    digests = run_on_all_ranks(comm, lambda: [_digest_block(path, start, new_hash()) for path, start in mine])
    every = (bytes.fromhex(digest) for theirs in comm.all_gather_json(digests) for digest in theirs)
    return [b"".join(islice(every, -(-size // BLOCK_BYTES))) for size in sizes]


def _digest_block(path: Path, start: int, digest: Any) -> str:
    stop = start + BLOCK_BYTES
    with file_errors(path), open(path, "rb") as file:
        file.seek(start)
        while data := file.read(min(READ_BYTES, stop - file.tell())):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), file.tell() + AHEAD_BYTES, READ_BYTES, os.POSIX_FADV_WILLNEED)
            digest.update(data)
    return digest.hexdigest()
