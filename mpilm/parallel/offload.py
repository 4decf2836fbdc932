"""Parts of the state of a model in files on a local disk (from a CPU) or in the memory of the host (from a GPU).

A file is mapped: the kernel reads the pages that are used, writes changed ones back while ranks compute, and drops what does
not fit into memory. All computations stay as they are, and so do their bits. Offloading to disks: ZeRO-Infinity, Rajbhandari et
al., arXiv 2104.07857.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor

from mpilm.config.schema import OFFLOADED_PARTS, StatePart, TrainConfig
from mpilm.errors import ConfigError, FileError
from mpilm.formatting import format_mebibytes

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
TIMED_BYTES = 64 << 20


@dataclass(frozen=True)
class Offload:
    """The parts of the state that are not in the memory of the device that computes, and the folder of their files."""

    parts: tuple[StatePart, ...] = ()
    folder: Path = Path()

    def zeros(self, part: StatePart, numel: int, device: torch.device) -> Tensor:
        """Return so many float32 zeros for this part of the state. Raises FileError if the disk has no room for them."""
        if part not in self.parts or numel == 0:
            return torch.zeros(numel, device=device)
        if device.type != "cpu":
            return torch.zeros(numel, pin_memory=True)
        return torch.frombuffer(_map_file(self.folder, 4 * numel), dtype=torch.float32)


NO_OFFLOAD = Offload()


def make_offload(train: TrainConfig, device: torch.device) -> Offload:
    """Return what train.offload says. Raises ConfigError where this device or folder cannot do it."""
    parts, folder = OFFLOADED_PARTS[train.offload], offload_folder(train)
    if not parts:
        return NO_OFFLOAD
    if device.type != "cpu":
        if train.offload == "parameters":
            raise ConfigError("--train.offload parameters needs --train.device cpu; a GPU can offload its optimizer")
        if train.optimizer not in ("adamw", "sgd"):
            problem = f"--train.offload optimizer on a GPU needs --train.optimizer adamw or sgd, not {train.optimizer}"
            raise ConfigError(problem)
        return Offload(parts)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"no file can be created there ({error.strerror}); name a folder on a local disk"
        raise ConfigError(f"--train.offload-dir {folder}: {problem}") from None
    if (kind := _find_file_system(folder)) in MEMORY_FILE_SYSTEMS:
        raise ConfigError(f"--train.offload-dir {folder} lies in memory ({kind}); name a folder on a local disk")
    return Offload(parts, folder)


def offload_folder(train: TrainConfig) -> Path:
    """Return the folder of the files: as set, or the system's for temporary files."""
    return Path(train.offload_dir or tempfile.gettempdir()).expanduser()


def measure_write_rate(folder: Path) -> float | None:
    """Return the bytes per second that the disk of a folder writes, past the page cache if it can; None if it is full."""
    with (
        contextlib.suppress(OSError),
        tempfile.TemporaryFile(dir=folder) as file,
        mmap(-1, TIMED_BYTES) as block,  # O_DIRECT needs aligned memory
    ):
        block.write(os.urandom(1 << 20) * (TIMED_BYTES >> 20))
        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
        start_s = time.perf_counter()
        os.write(file.fileno(), block)
        os.fdatasync(file.fileno())
        return TIMED_BYTES / (time.perf_counter() - start_s)
    return None


def _map_file(folder: Path, nbytes: int) -> mmap:
    """Return the memory of a new file without a name: nothing is left of it when this process ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # here, not at some later write
        except OSError as error:
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            room = f"{format_mebibytes(nbytes)} more are needed there, {format_mebibytes(free)} are free"
            problem = f"--train.offload-dir {folder}: {error.strerror}: {room}; name a folder with more room"
            raise FileError(problem) from error
        return mmap(file.fileno(), nbytes)


def _find_file_system(folder: Path) -> str:
    """Return the type of the file system of a folder; empty if it is not known."""
    try:
        lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    path = folder.resolve()
    found = [(len(mounted), kind) for _, mounted, kind, *_ in lines if path.is_relative_to(mounted)]
    return max(found, key=lambda row: row[0])[1] if found else ""
