"""A folder that belongs to one job at a time.

The lock is a file in the folder that names its holder and is touched while the job runs. On the holder's own host the process
decides whether it is stale; elsewhere whether the file is still touched, which no clock has a part in.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpilm.errors import ConfigError

NAME = "lock.json"
TOUCH_S = 10.0
STALE_S = 45.0  # not touched for so long: a file system may hide a touch for a while


class FolderLock:
    """Held from construction to `release`, by one rank for its job. Raises ConfigError where another job has the folder; says
    with `say` when it has to wait to find out."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        self.path, self.say = folder / NAME, say
        self._mine = {
            "host": socket.gethostname(), "system": _system(), "pid": os.getpid(), "started": _started(os.getpid()),
            "since": time.time(), "job": os.environ.get("SLURM_JOB_ID", ""),
        }  # fmt: skip
        while not _create(self.path, self._mine):
            holder = _read(self.path)
            if holder is not None and not self._stale(holder):
                raise ConfigError(
                    f"--run.dir {folder} is in use: process {holder.get('pid')} on {holder.get('host')} trains there; choose "
                    "another, or wait for it"
                )
            if _replace(self.path, holder, self._mine):
                break
        self._released = threading.Event()
        threading.Thread(target=self._keep_fresh, name="lock", daemon=True).start()

    def _stale(self, holder: dict[str, Any]) -> bool:
        """Whether the holder has gone."""
        if all(holder.get(key) == self._mine[key] for key in ("host", "system")):
            return holder.get("started") != _started(holder.get("pid"))
        if self._mine["job"] and holder.get("job") == self._mine["job"]:
            return True  # the same job, queued again
        self.say(f"{self.path} is of a job on {holder.get('host')}; looking for {STALE_S:.0f} s whether it still runs")
        seen, end = _touched(self.path), time.monotonic() + STALE_S
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_S))
            if _touched(self.path) != seen:
                return False
        return True

    def _keep_fresh(self) -> None:
        while not self._released.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        if not self._released.is_set():
            self._released.set()
            with contextlib.suppress(OSError):
                if _read(self.path) == self._mine:
                    self.path.unlink()


def _create(path: Path, holder: dict[str, Any]) -> bool:
    """Put the whole file there at once, unless there is one."""
    with _written(path, holder) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True


def _replace(path: Path, stale: dict[str, Any] | None, holder: dict[str, Any]) -> bool:
    """Put it in the place of a stale one, unless another job has done so meanwhile: one at a time may try."""
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot; two jobs that start at one moment are rare
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _read(path) != stale or not path.exists():
            return False
        with _written(path, holder) as temporary:
            os.replace(temporary, path)
        return True
    finally:
        os.close(handle)


@contextlib.contextmanager
def _written(path: Path, holder: dict[str, Any]) -> Iterator[str]:
    """A file beside `path` with the words of a holder; gone afterwards, if it is still there."""
    handle, temporary = tempfile.mkstemp(prefix=f".{NAME}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(holder, file)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _read(path: Path) -> dict[str, Any] | None:
    """The holder; None where there is none, or a file that does not say."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _system() -> str:
    """What tells a boot of a kernel, and a container, from others: process numbers mean something within one only."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: Any) -> int:
    """When a process of this host started, in the kernel's ticks; 0 where there is none, or a dead one that nobody has asked
    for: numbers are used again."""
    try:
        state, *numbers = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(numbers[18])
    except (OSError, ValueError, TypeError, IndexError):
        return 0


def _touched(path: Path) -> float:
    """When the file was touched; opened first, which makes a network file system look."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return -1.0
