"""Requests to stop a run."""

import os
import signal

from mpilm.launch.stop_request import BY_FILE, StopRequest


def test_folder_named_stop_is_no_request(tmp_path):
    """The run could not remove it, and would stop at each of its starts."""
    (tmp_path / "stop").mkdir()
    assert StopRequest(tmp_path / "stop", 0.0).stop_reason(0.0) == 0
    (tmp_path / "file").touch()
    assert StopRequest(tmp_path / "file", 0.0).stop_reason(0.0) == BY_FILE


def test_late_signal_does_not_end_a_run_that_leaves(tmp_path):
    """A scheduler may send its warning after the run has saved by itself."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        request = StopRequest(tmp_path / "stop", 0.0)
        with request.catch_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.stop_reason(0.0) == 1
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
