"""Force the job to exit when MPI_Abort would hang on unreachable hosts."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

LAUNCHERS = ("mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun")
RANK_TIMEOUT_S = 5  # for MPI_Abort to end this rank
LAUNCHER_TIMEOUT_S = 60  # for the launcher to exit: it first notifies the other hosts
KILL_LATER = "for second in $(seq {seconds}); do kill -0 {pid} 2>/dev/null || exit; sleep 1; done; kill -9 {pid}"


def force_exit() -> None:
    """Make sure that this rank and its launcher exit soon. Call before MPI_Abort.

    A kernel timer ends this rank, since MPI_Abort may hold the interpreter lock. A separate process kills the launcher if it
    runs on this host; otherwise the job would last until its time limit.
    """
    exit_after(RANK_TIMEOUT_S)
    pid = find_launcher()
    if pid is not None:
        null = subprocess.DEVNULL  # a launcher waits until every process has closed the output it inherited
        command = ["sh", "-c", KILL_LATER.format(seconds=LAUNCHER_TIMEOUT_S, pid=pid)]
        with contextlib.suppress(OSError):
            subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)


def exit_after(seconds: int) -> None:
    """Let the kernel end this rank after so many seconds. `signal.alarm(0)` cancels it."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def find_launcher() -> int | None:
    """Return the process id of the mpirun (or one of its other names) that started this rank, if it runs on this host."""
    pid = os.getppid()
    with contextlib.suppress(OSError, IndexError, ValueError):
        while pid > 1:
            name, _, fields = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name in LAUNCHERS:
                return pid
            pid = int(fields.split()[1])
    return None
