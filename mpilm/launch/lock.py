"""Lock of a run folder: a file that names the job holding the folder, which touches the file while it runs.

On the holder's host a lock is stale if the process is gone, elsewhere if the file is no longer touched. No clocks are compared.
"""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpilm.comm.processes import process_fields
from mpilm.errors import ConfigError
from mpilm.launch.job_end import batch_job_id

LOCK_NAME = "lock.json"
TOUCH_S = 10.0
STALE_S = 45.0  # without a touch; a file system may hide touches for a while


class FolderLock:
    """Held by one rank for its job, from construction to `release`. Raises ConfigError if another job holds the folder, and
    calls `notify` with a message before it has to wait to find out."""

    def __init__(self, folder: Path, notify: Callable[[str], None] = print):
        self.path, self._notify = folder / LOCK_NAME, notify
        self._holder: dict[str, Any] = {"host": socket.gethostname(), "system": _system_id(), "pid": os.getpid()}
        self._holder |= {"started": _start_ticks(os.getpid()), "since": time.time(), "job": batch_job_id()}
        while True:
            other = _read(self.path)
            if other is not None and not self._is_stale(other):
                process = f"process {other.get('pid')} on {other.get('host')}"
                raise ConfigError(f"--run.dir {folder} is in use: {process} trains there; choose another, or wait for it")
            if _acquire(self.path, other, self._holder):
                break
        self._released = threading.Event()
        threading.Thread(target=self._touch_until_release, name="lock", daemon=True).start()

    def _is_stale(self, other: dict[str, Any]) -> bool:
        if all(other.get(key) == self._holder[key] for key in ("host", "system")):
            return other.get("started") != _start_ticks(other.get("pid"))
        if self._holder["job"] and other.get("job") == self._holder["job"]:
            return True  # the same job, requeued
        self._notify(f"{self.path} belongs to a job on {other.get('host')}; checking for {STALE_S:.0f} s whether it still runs")
        touched, deadline = _last_touch(self.path), time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_S))
            if _last_touch(self.path) != touched:
                return False
        return True

    def _touch_until_release(self) -> None:
        while not self._released.wait(TOUCH_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the folder up to other jobs. A second call does nothing."""
        self._released.set()
        with contextlib.suppress(OSError):
            if _read(self.path) == self._holder:
                self.path.unlink()


def _acquire(path: Path, stale: dict[str, Any] | None, holder: dict[str, Any]) -> bool:
    """Write the lock, with its whole content at once and in place of a stale one; return False if another job was faster."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot; two jobs at the same moment are rare
            fcntl.flock(folder, fcntl.LOCK_EX)
        with contextlib.suppress(FileExistsError), tempfile.TemporaryDirectory(prefix=f".{LOCK_NAME}.", dir=path.parent) as new:
            lock = Path(new) / LOCK_NAME
            lock.write_text(json.dumps(holder), encoding="utf-8")
            if not path.exists():
                os.link(lock, path)  # raises if a lock has appeared
                return True
            if _read(path) == stale:
                os.replace(lock, path)
                return True
        return False
    finally:
        os.close(folder)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the holder; None if the file does not exist or does not name one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else None
    return None


def _system_id() -> str:
    """Return an id of the kernel's boot and the container, within which alone process ids are comparable."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_ticks(pid: Any) -> int:
    """Return when a process started, in kernel ticks, since ids are reused; 0 if it does not exist or is a zombie."""
    fields = process_fields(pid)
    return int(fields[20]) if fields and fields[1] not in "ZX" else 0


def _last_touch(path: Path) -> float:
    try:
        with open(path, "rb") as file:  # opening makes a network file system fetch the time
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return -1.0
