"""Memory shared by the ranks of one node.

It is an unlinked file in /dev/shm, mapped by every rank: it disappears with the last process, however that ends. Its space is
reserved beforehand, so that a small /dev/shm is reported instead of raising SIGBUS. (MPI's shared windows do neither with
MPICH 5.)
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Sequence
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


class SharedPlaces:
    """Memory in which the ranks of a node show each other tensors, each rank in a place of its own.

    All ranks reserve, write to their own places, pass one barrier of `comm`, and read the places of the others. Two sets of
    places take turns: a rank that has passed the barrier may write to one while others still read the other."""

    def __init__(self, comm: Comm):
        self.comm, self._numel = comm, 0
        self._turns: list[list[Tensor]] | None = []

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's places."""
        return 8 * self._numel if self._turns else 0

    def reserve(self, numels: Sequence[int], dtype: torch.dtype) -> list[Tensor] | None:
        """Return the place of each rank, flat, of so many elements; None if the ranks share no memory. Collective, with equal
        arguments on all ranks."""
        numel = -(-max(numels) * dtype.itemsize // PAGE_BYTES) * PAGE_BYTES // 4  # of float32
        if self._turns is not None and numel > self._numel:
            numel = self._numel = max(numel, 2 * self._numel)  # few allocations, even if sizes grow with each exchange
            parts = self.comm.allocate_shared(2 * numel)
            self._turns = None if parts is None else [[part[at : at + numel] for part in parts] for at in (0, numel)]
        if self._turns is None:
            return None
        self._turns.reverse()
        return [place.view(dtype)[:count] for place, count in zip(self._turns[0], numels)]


def _map_file(path: str, nbytes: int) -> mmap.mmap | None:
    """Map rank 0's file; return None if it is not here: ranks of one node may have containers, each with its own /dev/shm."""
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), nbytes) if os.fstat(file.fileno()).st_size == nbytes else None
    except OSError:
        return None
