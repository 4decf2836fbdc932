"""An end that comes also where MPI cannot bring it about: it waits for hosts that do not answer any more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

LAUNCHERS = ("mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun")
RANK_S = 5  # seconds that MPI_Abort has for this rank
LAUNCHER_S = 60  # and its launcher, which first tells the other hosts
WAIT = "for second in $(seq {seconds}); do kill -0 {pid} 2>/dev/null || exit; sleep 1; done; kill -9 {pid}"


def end_in_time() -> None:
    """Call before MPI_Abort. The kernel ends this rank if that does not, since it may hold the interpreter lock; a process of
    its own ends the launcher, where it is on this host, or the job would last until its time is up."""
    end_this_rank_after(RANK_S)
    pid = launcher()
    if pid is not None:
        away = subprocess.DEVNULL  # a launcher waits until nobody holds the output that it has given to a rank
        words = ["sh", "-c", WAIT.format(seconds=LAUNCHER_S, pid=pid)]
        with contextlib.suppress(OSError):
            subprocess.Popen(words, stdin=away, stdout=away, stderr=away, start_new_session=True)


def end_this_rank_after(seconds: int) -> None:
    """By the kernel, whatever it is doing then; `signal.alarm(0)` takes it back."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def launcher() -> int | None:
    """The process, above this one, that has started the ranks: mpirun, by any of its names."""
    pid = os.getppid()
    with contextlib.suppress(OSError, IndexError, ValueError):
        while pid > 1:
            name, _, words = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name in LAUNCHERS:
                return pid
            pid = int(words.split()[1])
    return None
