"""A barrier between the processes of one node that sleep while they wait, for more ranks than cores.

Ranks that poll take the cores from those that still compute. Here each rank has a semaphore of the C library in shared memory:
the first rank counts the others in, then wakes each once.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Callable

from torch import Tensor

SEMAPHORE_BYTES = 64  # a sem_t has 32 at most; one for each line of the cache
SEMAPHORE_NUMEL = SEMAPHORE_BYTES // 4
WAKE_S = 0.01  # between two calls of `progress`


class Timespec(ctypes.Structure):
    """struct timespec of the C library."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class NodeBarrier:
    """`memory`: SEMAPHORE_NUMEL elements of each rank, in shared memory. `progress` is called now and then while a rank waits:
    the messages that it has started may need it. A barrier of all ranks must follow the construction."""

    def __init__(self, rank: int, memory: list[Tensor], progress: Callable[[], object]):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._memory, self._progress = memory, progress
        self._semaphores = [ctypes.c_void_p(part.data_ptr()) for part in memory]
        self._own, self._is_first = self._semaphores[rank], rank == 0
        if self._libc.sem_init(self._own, 1, 0):  # 1: shared between processes
            raise OSError(ctypes.get_errno(), "sem_init")

    def wait(self) -> None:
        """Return when all ranks have called this."""
        if not self._is_first:
            self._libc.sem_post(self._semaphores[0])
            return self._take()
        for _ in self._semaphores[1:]:
            self._take()
        for semaphore in self._semaphores[1:]:
            self._libc.sem_post(semaphore)

    def _take(self) -> None:
        """Sleep until another rank posts this rank's semaphore."""
        while True:
            until_s = time.time() + WAKE_S
            until = Timespec(int(until_s), int(until_s % 1 * 1e9))
            if self._libc.sem_timedwait(self._own, ctypes.byref(until)) == 0:
                return
            if (code := ctypes.get_errno()) not in (errno.ETIMEDOUT, errno.EINTR):
                raise OSError(code, "sem_timedwait")
            self._progress()
