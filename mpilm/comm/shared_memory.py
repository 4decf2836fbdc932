"""Memory shared by the ranks of one node.

It is an unlinked file in /dev/shm, mapped by every rank: it disappears with the last process, however that ends. Its space is
reserved beforehand, so that a small /dev/shm is reported instead of raising SIGBUS. (MPI's shared windows do neither with
MPICH 5.)
"""

import mmap
import os
import tempfile

import torch
from torch import Tensor

from mpilm.comm.base import Comm

SHM_FOLDER = "/dev/shm"
PAGE_BYTES = mmap.PAGESIZE


def map_shared_memory(comm: Comm, numel: int) -> list[Tensor] | None:
    """Implement Comm.allocate_shared for processes of one node. Collective."""
    sizes = [-(-4 * count // PAGE_BYTES) * PAGE_BYTES for count in comm.all_gather_json(numel)]
    path, total = "", max(PAGE_BYTES, sum(sizes))
    if comm.rank == 0:
        path = _reserve_file(total)
    path = comm.broadcast_json(path)
    mapped = _map_file(path, total) if path else None
    all_mapped = all(comm.all_gather_json(mapped is not None))
    if path and comm.rank == 0:
        os.unlink(path)
    if not all_mapped or mapped is None:
        return None
    starts = [sum(sizes[:rank]) // 4 for rank in range(comm.size)]
    memory = torch.frombuffer(mapped, dtype=torch.float32)
    return [memory[start : start + size // 4] for start, size in zip(starts, sizes)]


def _reserve_file(nbytes: int) -> str:
    """Create a file of that size in memory and return its path; return "" if it does not fit."""
    try:
        handle, path = tempfile.mkstemp(prefix="mpilm-", dir=SHM_FOLDER)
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


def _map_file(path: str, nbytes: int) -> mmap.mmap | None:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:  # ranks of one node may live in containers, each with its own /dev/shm
        return None
    try:
        return mmap.mmap(handle, nbytes) if os.fstat(handle).st_size == nbytes else None
    except OSError:
        return None
    finally:
        os.close(handle)
