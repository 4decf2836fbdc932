"""Memory of a rank: what is predicted, and what the process really uses."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import torch


def _kibibytes(file: str, key: str) -> int:
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1)) if match else 0


def resident_bytes() -> int:
    """Memory of this process that is in RAM, pages shared with other ranks counted whole."""
    return _kibibytes("/proc/self/status", "VmRSS") * 1024


def shared_bytes() -> int:
    """The part of `resident_bytes` that is in memory which ranks have together."""
    return _kibibytes("/proc/self/status", "RssShmem") * 1024


def trim() -> None:
    """Hand back to the kernel what has been freed, where the C library can: glibc keeps most of it otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Let `peak_resident_bytes` start anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The largest `resident_bytes` since the start or since `forget_peak`."""
    return _kibibytes("/proc/self/status", "VmHWM") * 1024


def proportional_bytes() -> int:
    """Memory of this process in RAM, each shared page divided among those who share it (PSS)."""
    return _kibibytes("/proc/self/smaps_rollup", "Pss") * 1024 or resident_bytes()


class Memory:
    """What a rank has used where it computes, from now on: of a GPU's memory what torch has given out, else the process's own.

    `program_bytes`: what the program takes before there is a model.
    """

    def __init__(self, device: torch.device):
        self.device = device
        trim()
        forget_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._resident, self._shared = resident_bytes(), shared_bytes()
        self.program_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else proportional_bytes()

    @property
    def used_bytes(self) -> int:
        """In use now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident_bytes()

    def peak_bytes(self, own_shared: int) -> int:
        """The highest use so far, the program's shared pages divided as they were at the start. `own_shared`: what is this
        rank's of memory that ranks have together; what it sees of others is left out."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        others = max(0, shared_bytes() - self._shared - own_shared)
        return peak_resident_bytes() - self._resident + self.program_bytes - others
