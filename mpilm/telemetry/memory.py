"""Memory of a rank: what is predicted, and what the process really uses."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path


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
