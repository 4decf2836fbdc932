"""Requests to save and stop: a signal, a file, the end of the run's time."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mpilm.launch.job_end import find_job_end

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
POLL_S = 0.5  # between looks at the file, which may lie on a slow file system
JOB_MARGIN_S = 30.0  # for leaving, before the scheduler ends a job
STOP_REASONS = ("", "received SIGUSR1", "received SIGTERM", "found a stop file", "reached run.time-limit", "its batch job ends")
BY_FILE, BY_TIME_LIMIT, BY_SCHEDULER = 3, 4, 5


def ignore_stop_signals() -> None:
    """Let this process survive the signals that ask a run to stop; `StopRequest.catch_signals` obeys them again."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Stop requests to one rank, as indices of STOP_REASONS: the ranks agree on the largest. The run stops when `file` appears
    and after `limit_s` seconds; 0: before the end of the batch job, if any. `query_scheduler`: this rank may ask the
    scheduler for that end."""

    def __init__(self, file: Path, limit_s: float, query_scheduler: bool = True):
        self.file, self._file_seen, self._polled = file, False, 0.0
        self._signal_reason = 0
        self._wakeup_pipe: tuple[int, int] | None = None  # the kernel's signals, readable while the main thread waits in MPI
        self._end, self._end_reason = time.time() + limit_s, BY_TIME_LIMIT
        if not limit_s:
            self._end, self._end_reason = find_job_end(query_scheduler) - JOB_MARGIN_S, BY_SCHEDULER

    @contextlib.contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Turn signals into requests, however often they come: SLURM sends SIGTERM twice, in two ways."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._wakeup_pipe = pipe = os.pipe()
        for end in pipe:
            os.set_blocking(end, False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():  # a late SIGUSR1 must not end a run that has saved and leaves with code 75
                signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else handler)
            self._wakeup_pipe = None
            for end in pipe:
                os.close(end)

    def stop_reason(self, needed_s: float) -> int:
        """Return why to stop after this step if another step and a save need `needed_s`; 0: no reason."""
        if time.time() + needed_s > self._end:
            return self._end_reason
        if (now := time.monotonic()) > self._polled + POLL_S:
            self._polled, self._file_seen = now, self.file.exists() and not self.file.is_dir()
        if self.signalled:
            return self._signal_reason
        return BY_FILE if self._file_seen else 0

    @property
    def signalled(self) -> bool:
        """True once a signal has arrived, even if the main thread, waiting inside MPI, cannot handle it yet."""
        if self._wakeup_pipe is not None:
            with contextlib.suppress(OSError):
                for number in os.read(self._wakeup_pipe[0], 64):
                    if number in SIGNALS:
                        self._signal_reason = 1 + SIGNALS.index(signal.Signals(number))
        return self._signal_reason > 0

    def clear(self) -> None:
        """Remove the file once the request is fulfilled: the next start would stop, too."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
