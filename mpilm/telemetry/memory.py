"""Memory that this process really uses."""

import contextlib
import ctypes
import re
from pathlib import Path

import torch


def _read_bytes(file: str, key: str) -> int:
    """Return a size from /proc/self, 0 if it is not there. VmRSS: all in RAM, shared pages in full."""
    with contextlib.suppress(OSError):
        if match := re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/self/{file}").read_text(), re.MULTILINE):
            return 1024 * int(match.group(1))
    return 0


def shared_bytes() -> int:
    """Return the part of this process's memory in RAM that ranks share."""
    return _read_bytes("status", "RssShmem")


def proportional_bytes() -> int:
    """Return this process's memory in RAM, with each shared page divided among the processes that share it (PSS)."""
    return _read_bytes("smaps_rollup", "Pss") or _read_bytes("status", "VmRSS")


def trim_heap() -> None:
    """Return freed memory to the kernel if the C library can: glibc otherwise keeps most of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class MemoryMeter:
    """Memory that a rank uses where it computes, from now on: what torch has allocated on a GPU, else the process's own."""

    def __init__(self, device: torch.device, has_files: bool = False):
        self.device, self.has_files = device, has_files  # parts of the state lie in files
        trim_heap()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak, VmHWM
        self._gpu = torch.get_device_module(device) if device.type != "cpu" else None
        if self._gpu is not None:
            self._gpu.reset_peak_memory_stats(device)
        self._resident, self._shared = _read_bytes("status", "VmRSS"), shared_bytes()
        self._mapped = _read_bytes("status", "RssFile")
        # the program's own, before there is a model
        self.program_bytes = self._gpu.memory_allocated(device) if self._gpu else proportional_bytes()

    @property
    def used_bytes(self) -> int:
        """Memory in use now."""
        return self._gpu.memory_allocated(self.device) if self._gpu else _read_bytes("status", "VmRSS")

    def peak_bytes(self, own_shared: int) -> int:
        """Return the highest use so far, with the program's shared pages divided as they were at the start. `own_shared` is
        this rank's part of memory that ranks share; the parts of others, which it sees too, do not count. Nor do the pages of
        files, such as those of offloaded parts: the kernel takes them back when it needs memory."""
        if self._gpu is not None:
            return self._gpu.max_memory_allocated(self.device)
        others = max(0, shared_bytes() - self._shared - own_shared)
        files = max(0, _read_bytes("status", "RssFile") - self._mapped) if self.has_files else 0
        return _read_bytes("status", "VmHWM") - self._resident + self.program_bytes - others - files
