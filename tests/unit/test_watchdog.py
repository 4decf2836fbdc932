"""What the watchdog says of ranks that have written down what they do; tests/faults/test_hanging.py has whole jobs."""

import math
import os
import subprocess
import sys
import time

import pytest

from mpilm.comm.base import SelfComm
from mpilm.comm.progress import CommCall, Progress
from mpilm.launch import watchdog
from mpilm.launch.watchdog import FIRST_TIMEOUT_S, MIN_TIMEOUT_S, TIMEOUT_FACTOR, Watchdog, format_report

PROCESSES = [["a", 11], ["a", 12], ["b", 13]]


def words(rank, waiting=None, reached=None, at="data/batch.py:9 in train"):
    return {
        "rank": rank, "step": 4, "phase": "step", "lasted_s": 31.0, "limit_s": 30.0, "waiting": waiting,
        "reached": reached or {}, "at": at,
    }  # fmt: skip


def test_those_who_are_behind_are_named():
    """Ranks 0 and 2 have come to call 7 on the data axis, rank 1 is at call 6 and computes."""
    call = ["all_reduce", "data", 7, [0, 1, 2], "", 30.0]
    found = {0: words(0, call, {"data": 7}), 1: words(1, None, {"data": 6}), 2: words(2, call, {"data": 7})}
    said = format_report(found, PROCESSES, {})
    assert "step 4 has lasted 31 s; the limit is 30 s" in said
    assert "The others wait for rank 1." in said
    assert "rank 0 on a (process 11): waits 30 s for rank 1 in all_reduce on data (call 7); step 4, at data/batch.py:9" in said
    assert "rank 1 on a (process 12): waits for no other rank; step 4" in said
    assert "rank 2 on b (process 13): waits 30 s for rank 1 in" in said


def test_ranks_that_wait_for_each_other():
    found = {
        0: words(0, ["receive", "pipeline", 3, [1], "tag 5", 12.0]),
        1: words(1, ["receive", "pipeline", 9, [0], "tag 2", 13.0]),
        2: words(2, ["barrier", "world", 2, [0, 1, 2], "", 14.0], {"world": 2}),
    }
    said = format_report(found, PROCESSES, {})
    assert "All ranks wait for each other: a message was lost, or they do not make the same calls." in said
    assert "waits 12 s for rank 1 in receive on pipeline (call 3, tag 5)" in said
    assert "waits 13 s for rank 0 in receive on pipeline (call 9, tag 2)" in said
    assert "waits 14 s for ranks 0, 1 in barrier on world (call 2)" in said


def test_ranks_that_say_nothing():
    found = {0: words(0, ["barrier", "world", 2, [0, 1, 2], "", 14.0], {"world": 2})}
    said = format_report(found, PROCESSES, {1: "its process no longer exists", 2: ""})
    assert "Missing: ranks 1, 2." in said
    assert "rank 1 on a (process 12): no response; its process no longer exists\n" in said
    assert "rank 2 on b (process 13): no response\n" in said
    assert "waits 14 s for ranks 1, 2 in barrier" in said


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "TICK_S", 0.01)


def test_the_limit_is_stated_or_learned():
    progress = Progress()
    for stated, known, wanted in (
        (0.0, None, FIRST_TIMEOUT_S),
        (0.0, 0.1, MIN_TIMEOUT_S),
        (0.0, 100.0, TIMEOUT_FACTOR * 100.0),
        (7.0, 100.0, 7.0),
    ):
        progress.phase, progress.longest_s = "step", {} if known is None else {"step": known}
        dog = Watchdog(progress, SelfComm("world"), stated)
        dog.close()
        assert dog.limit_s() == wanted
    progress.phase = "evaluation"
    assert dog.limit_s() == FIRST_TIMEOUT_S  # what is stated is of steps
    progress.phase = watchdog.PREPARATION
    assert dog.limit_s() == math.inf


def test_it_barks_past_the_limit_and_not_before(quick, monkeypatch):
    ends = []
    monkeypatch.setattr(Watchdog, "_report_and_abort", lambda self: (ends.append(self.progress.step), self._closed.set()))
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ends.append(code))
    progress = Progress()
    dog = Watchdog(progress, SelfComm("world"), 2.0)
    for step in range(5):
        progress.enter("step", step)
        time.sleep(0.05)
    assert ends == []
    deadline = time.monotonic() + 30
    while len(ends) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ends == [4, watchdog.EXIT_CODE]
    dog.close()


def test_it_ends_the_rank_also_where_it_cannot_report(quick, monkeypatch):
    ends = []
    monkeypatch.setattr(Watchdog, "_take_snapshot", lambda self, limit_s: self._closed.set() or 1 / 0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ends.append(code))
    monkeypatch.setattr(watchdog.threading, "excepthook", lambda arguments: None)
    Watchdog(Progress(), SelfComm("world"), 0.0).progress.longest_s["start"] = 0.0
    monkeypatch.setattr(watchdog, "MIN_TIMEOUT_S", 0.0)
    deadline = time.monotonic() + 30
    while not ends and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ends == [watchdog.EXIT_CODE]


def test_while_a_run_starts_every_rank_speaks_for_itself(quick, monkeypatch, capsys):
    """There is no folder yet that all of them know."""
    ends = []
    monkeypatch.setattr(watchdog, "FIRST_TIMEOUT_S", 0.0)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (ends.append(code), dog._closed.set()))
    dog = Watchdog(Progress(), SelfComm("world"), 5.0)
    deadline = time.monotonic() + 30
    while not ends and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ends[0] == watchdog.EXIT_CODE
    said = capsys.readouterr().err
    assert said.startswith("mpilm: watchdog: start 1 has lasted 0 s; the limit is 0 s")
    assert f"process {os.getpid()}): waits for no other rank; start 1, at" in said


def test_its_thread_is_gone_once_it_is_closed():
    """It holds the run: tensors that a thread frees while Python ends crash the process, in the place of its exit code."""
    dog = Watchdog(Progress(), SelfComm("world"), 0.0)
    assert dog._thread.is_alive()
    dog.close()
    assert not dog._thread.is_alive()


def test_what_is_waited_for_is_forgotten_when_it_has_come():
    progress, call, seen = Progress(), CommCall("barrier", "world", 1, (0, 1)), []
    progress.wait(call, lambda: seen.append(progress.waiting))
    assert seen[0][0] == call
    assert progress.waiting is None


def test_a_crash_on_the_way_out_does_not_take_the_place_of_the_exit_code():
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
