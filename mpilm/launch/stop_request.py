"""What asks a run to save and to stop: a signal, a file, the end of its time."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LOOK_S = 0.5  # between looks at the file, which may lie on a file system that is slow to answer
SLURM_S = 30.0  # kept free before SLURM ends a job, for leaving
SQUEUE_S = 20.0  # for SLURM to answer
REASONS = ("", "SIGUSR1", "SIGTERM", "its stop file", "run.time-limit", "the end of the SLURM job")


class StopRequest:
    """On one rank; the ranks agree on the largest of their reasons (numbers of REASONS).

    `file`: a run stops when it appears. `limit_s`: of the run, from now on; 0: the end of the SLURM job, where there is one;
    `asks`: whether this rank may ask SLURM for it, where the environment does not say (before 23.02).
    """

    def __init__(self, file: Path, limit_s: float, asks: bool = True):
        self.file, self._signalled, self._looked_at, self._file_seen = file, 0, 0.0, False
        self._pipe: tuple[int, int] | None = None
        self._woken = False
        self._end, self._by = time.time() + limit_s, REASONS.index("run.time-limit")
        if not limit_s:
            self._end, self._by = slurm_end(asks) - SLURM_S, len(REASONS) - 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a signal is a request, however often it comes: SLURM sends SIGTERM twice, by two ways."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        woken = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            pipe, self._pipe = self._pipe, None
            for end in pipe:
                os.close(end)

    def _heard(self, number: int, frame: object) -> None:
        self._signalled = REASONS.index(signal.Signals(number).name)

    def reason(self, needed_s: float) -> int:
        """Why to stop after this step, where another one and a save need so many seconds; 0: there is no reason."""
        if time.time() + needed_s > self._end:
            return self._by
        return self._signalled or (REASONS.index("its stop file") if self._file_is_there() else 0)

    def _file_is_there(self) -> bool:
        now = time.monotonic()
        if now > self._looked_at + LOOK_S:
            self._looked_at, self._file_seen = now, self.file.exists()
        return self._file_seen

    @property
    def signalled(self) -> bool:
        """Whether a signal has asked, after which there may not be much time; also where the main thread has not heard of it
        yet, since it waits inside MPI."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._woken = self._woken or any(number in SIGNALS for number in os.read(self._pipe[0], 64))
        return self._woken

    def done(self) -> None:
        """The request has been met: take the file away, or the next start would stop too."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)


def slurm_end(asks: bool) -> float:
    """When SLURM will end this job (time.time()); infinite where it does not say or there is none."""
    said, job = os.environ.get("SLURM_JOB_END_TIME", ""), os.environ.get("SLURM_JOB_ID", "")
    if said.isdigit():
        return float(said)
    if not (asks and job):
        return math.inf
    with contextlib.suppress(OSError, ValueError, OverflowError, subprocess.SubprocessError):
        words = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
        answer = subprocess.check_output(words, stderr=subprocess.DEVNULL, text=True, timeout=SQUEUE_S)
        return time.mktime(time.strptime(answer.strip(), "%Y-%m-%dT%H:%M:%S"))
    return math.inf
