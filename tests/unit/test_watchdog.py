"""The watchdog: its limit, its report from the snapshots of ranks; tests/faults/test_hanging.py has whole jobs."""

import math
import os
import subprocess
import sys
import time

import pytest

from mpilm.comm.base import SelfComm
from mpilm.comm.flight_recorder import CommCall, FlightRecorder
from mpilm.launch import watchdog
from mpilm.launch.watchdog import FIRST_TIMEOUT_S, MIN_TIMEOUT_S, TIMEOUT_FACTOR, Watchdog, format_report

PROCESSES = [["a", 11], ["a", 12], ["b", 13]]


def snapshot(rank, waiting=None, reached=None, at="data/batch.py:9 in train"):
    return {
        "rank": rank, "step": 4, "phase": "step", "lasted_s": 31.0, "limit_s": 30.0, "waiting": waiting,
        "reached": reached or {}, "at": at,
    }  # fmt: skip


def test_report_names_the_rank_that_others_wait_for():
    """Ranks 0 and 2 have reached call 7 on the data axis; rank 1 is at call 6 and computes."""
    call = ["all_reduce", "data", 7, [0, 1, 2], "", 30.0]
    found = {0: snapshot(0, call, {"data": 7}), 1: snapshot(1, None, {"data": 6}), 2: snapshot(2, call, {"data": 7})}
    report = format_report(found, PROCESSES, {})
    assert "step 4 has lasted 31 s; the limit is 30 s" in report
    assert "The others wait for rank 1." in report
    assert "rank 0 on a (process 11): waits 30 s for rank 1 in all_reduce on data (call 7); step 4, at data/batch" in report
    assert "rank 1 on a (process 12): waits for no other rank; step 4" in report
    assert "rank 2 on b (process 13): waits 30 s for rank 1 in" in report


def test_report_of_ranks_that_wait_for_each_other_blames_none():
    found = {
        0: snapshot(0, ["receive", "pipeline", 3, [1], "tag 5", 12.0]),
        1: snapshot(1, ["receive", "pipeline", 9, [0], "tag 2", 13.0]),
        2: snapshot(2, ["barrier", "world", 2, [0, 1, 2], "", 14.0], {"world": 2}),
    }
    report = format_report(found, PROCESSES, {})
    assert "All ranks wait for each other: a message was lost, or they do not make the same calls." in report
    assert "waits 12 s for rank 1 in receive on pipeline (call 3, tag 5)" in report
    assert "waits 13 s for rank 0 in receive on pipeline (call 9, tag 2)" in report
    assert "waits 14 s for ranks 0, 1 in barrier on world (call 2)" in report


def test_report_names_missing_ranks_and_their_processes():
    found = {0: snapshot(0, ["barrier", "world", 2, [0, 1, 2], "", 14.0], {"world": 2})}
    report = format_report(found, PROCESSES, {1: "its process no longer exists", 2: ""})
    assert "Missing: ranks 1, 2." in report
    assert "rank 1 on a (process 12): no response; its process no longer exists\n" in report
    assert "rank 2 on b (process 13): no response\n" in report
    assert "waits 14 s for ranks 1, 2 in barrier" in report


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "TICK_S", 0.01)


def test_limit_is_the_setting_or_learned_from_the_longest_phase():
    recorder = FlightRecorder()
    for setting, longest_s, expected in (
        (0.0, None, FIRST_TIMEOUT_S),
        (0.0, 0.1, MIN_TIMEOUT_S),
        (0.0, 100.0, TIMEOUT_FACTOR * 100.0),
        (7.0, 100.0, 7.0),
    ):
        recorder.phase, recorder.longest_s = "step", {} if longest_s is None else {"step": longest_s}
        watched = Watchdog(recorder, SelfComm("world"), setting)
        watched.close()
        assert watched.limit_s() == expected
    recorder.phase = "evaluation"
    assert watched.limit_s() == FIRST_TIMEOUT_S  # the setting is for steps
    recorder.phase = watchdog.PREPARATION
    assert watched.limit_s() == math.inf


def test_watchdog_acts_past_the_limit_and_not_before(quick, monkeypatch):
    events = []
    monkeypatch.setattr(Watchdog, "_report_and_abort", lambda self: (events.append(self.recorder.step), self._closed.set()))
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: events.append(code))
    recorder = FlightRecorder()
    watched = Watchdog(recorder, SelfComm("world"), 2.0)
    for step in range(5):
        recorder.enter("step", step)
        time.sleep(0.05)
    assert events == []
    deadline = time.monotonic() + 30
    while len(events) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert events == [4, watchdog.EXIT_CODE]
    watched.close()


def test_watchdog_whose_report_fails_still_ends_the_rank(quick, monkeypatch):
    events = []
    monkeypatch.setattr(Watchdog, "_take_snapshot", lambda self, limit_s: self._closed.set() or 1 / 0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: events.append(code))
    monkeypatch.setattr(watchdog.threading, "excepthook", lambda arguments: None)
    Watchdog(FlightRecorder(), SelfComm("world"), 0.0).recorder.longest_s["start"] = 0.0
    monkeypatch.setattr(watchdog, "MIN_TIMEOUT_S", 0.0)
    deadline = time.monotonic() + 30
    while not events and time.monotonic() < deadline:
        time.sleep(0.02)
    assert events == [watchdog.EXIT_CODE]


def test_watchdog_without_a_folder_reports_its_own_rank(quick, monkeypatch, capsys):
    """No folder is known to all ranks while a run starts."""
    events = []
    monkeypatch.setattr(watchdog, "FIRST_TIMEOUT_S", 0.0)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (events.append(code), watched._closed.set()))
    watched = Watchdog(FlightRecorder(), SelfComm("world"), 5.0)
    deadline = time.monotonic() + 30
    while not events and time.monotonic() < deadline:
        time.sleep(0.02)
    assert events[0] == watchdog.EXIT_CODE
    report = capsys.readouterr().err
    assert report.startswith("mpilm: watchdog: start 1 has lasted 0 s; the limit is 0 s")
    assert f"process {os.getpid()}): waits for no other rank; start 1, at" in report


def test_closed_watchdog_has_no_thread():
    """It refers to the run: tensors that a thread frees while Python exits would crash the process."""
    watched = Watchdog(FlightRecorder(), SelfComm("world"), 0.0)
    assert watched._thread.is_alive()
    watched.close()
    assert not watched._thread.is_alive()


def test_progress_clears_a_call_that_has_finished():
    recorder, call, seen = FlightRecorder(), CommCall("barrier", "world", 1, (0, 1)), []
    recorder.wait(call, lambda: seen.append(recorder.waiting))
    assert seen[0][0] == call
    assert recorder.waiting is None


def test_crash_while_aborting_does_not_replace_the_exit_code():
    crash = (
        "import ctypes, os, threading, time\n"
        "from mpilm.launch import watchdog\n"
        "watchdog._ignore_crashes()\n"
        "threading.Thread(target=lambda: ctypes.CDLL(None).memset(1, 0, 8)).start()\n"
        "time.sleep(0.5)\n"
        "os._exit(watchdog.EXIT_CODE)\n"
    )
    ended = subprocess.run([sys.executable, "-c", crash], timeout=60)
    assert ended.returncode == 86
