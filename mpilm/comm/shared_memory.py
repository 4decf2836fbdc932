"""Memory shared by the ranks of one node.

It is an unlinked file in /dev/shm, mapped by every rank: it disappears with the last process, however that ends. Its space is
reserved beforehand, so that a small /dev/shm is reported instead of raising SIGBUS. (MPI's shared windows do neither with
MPICH 5.)
"""

import contextlib
import mmap
import os
import tempfile
from itertools import accumulate

import torch
from torch import Tensor

from mpilm.comm.base import Comm

SHM_FOLDER = "/dev/shm"
PAGE_BYTES = mmap.PAGESIZE


def map_shared_memory(comm: Comm, numel: int) -> list[Tensor] | None:
    """Implement Comm.allocate_shared for processes of one node. Collective."""
    sizes = [-(-4 * count // PAGE_BYTES) * PAGE_BYTES for count in comm.all_gather_json(numel)]
    path, total = "", max(PAGE_BYTES, sum(sizes))
    with contextlib.ExitStack() as stack:  # deletes the file once all ranks have mapped it
        if comm.rank == 0:
            with contextlib.suppress(OSError):  # no such folder, or not enough space
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="mpilm-", dir=SHM_FOLDER))
                os.posix_fallocate(file.fileno(), 0, total)
                path = file.name
        mapped = _map_file(comm.broadcast_json(path), total)
        all_mapped = all(comm.all_gather_json(mapped is not None))
    if not all_mapped or mapped is None:
        return None
    memory = torch.frombuffer(mapped, dtype=torch.float32)
    return [memory[start // 4 : (start + size) // 4] for start, size in zip(accumulate(sizes, initial=0), sizes)]


def _map_file(path: str, nbytes: int) -> mmap.mmap | None:
    """Map rank 0's file; return None if it is not here: ranks of one node may have containers, each with its own /dev/shm."""
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), nbytes) if os.fstat(file.fileno()).st_size == nbytes else None
    except OSError:
        return None
