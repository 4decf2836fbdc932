"""Memory that the ranks of one node have together.

A file in memory that has no name any more once every rank has it mapped: it goes with the last process, however that ends. Its
room is reserved beforehand, so that a small /dev/shm is an answer and not a SIGBUS. (MPI's own shared windows do neither with
MPICH 5.)
"""

from __future__ import annotations

import mmap
import os
import tempfile

import torch
from torch import Tensor

from mpilm.comm.base import Comm

FOLDER = "/dev/shm"
PAGE = mmap.PAGESIZE


def share(comm: Comm, numel: int) -> list[Tensor] | None:
    """See Comm.share. `comm`: processes of one node. Collective."""
    sizes = [-(-4 * count // PAGE) * PAGE for count in comm.all_gather_json(numel)]
    path, total = "", max(PAGE, sum(sizes))
    if comm.rank == 0:
        path = _reserved(total)
    path = comm.broadcast_json(path)
    mapped = _mapped(path, total) if path else None
    everywhere = all(comm.all_gather_json(mapped is not None))
    if path and comm.rank == 0:
        os.unlink(path)
    if not everywhere or mapped is None:
        return None
    starts = [sum(sizes[:rank]) for rank in range(comm.size)]
    counts = [size // 4 for size in sizes]
    every = torch.frombuffer(mapped, dtype=torch.float32)
    return [every[start // 4 : start // 4 + count] for start, count in zip(starts, counts)]


def _reserved(nbytes: int) -> str:
    """A file of that size in memory; an empty name where there is no room for it."""
    try:
        handle, path = tempfile.mkstemp(prefix="mpilm-", dir=FOLDER)
    except OSError:
        return ""
    try:
        os.posix_fallocate(handle, 0, nbytes)
        return path
    except OSError:
        os.unlink(path)
        return ""
    finally:
        os.close(handle)


def _mapped(path: str, nbytes: int) -> mmap.mmap | None:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:  # ranks of one node may live in containers with a /dev/shm each
        return None
    try:
        if os.fstat(handle).st_size != nbytes:
            return None
        return mmap.mmap(handle, nbytes)
    except OSError:
        return None
    finally:
        os.close(handle)
