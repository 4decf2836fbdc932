"""The watchdog: its limit, its report from the snapshots of ranks; tests/faults/test_hanging.py has whole jobs."""

import os
import subprocess
import sys
import threading
import time

import pytest
from thread_ranks import run_ranks

from mpilm.comm import processes
from mpilm.comm.base import SelfComm
from mpilm.comm.flight_recorder import CommCall, FlightRecorder
from mpilm.launch import watchdog
from mpilm.launch.hang_report import format_report
from mpilm.launch.heartbeat import NodeLinks
from mpilm.launch.watchdog import FIRST_LIMIT_S, LIMIT_FACTOR, MIN_LIMIT_S, Watchdog

PROBLEM = "step 4 has lasted 31 s; the limit is 30 s"
PROCESSES = {0: ["a", 11], 1: ["a", 12], 2: ["b", 13]}


def snapshot(rank, waiting=None, reached=None, at="data/batch.py:9 in train"):
    return {
        "rank": rank, "step": 4, "phase": "step", "waiting": waiting,
        "reached": reached or {}, "at": at,
    }  # fmt: skip


def test_report_names_the_rank_that_others_wait_for():
    """Ranks 0 and 2 have reached call 7 on the data axis; rank 1 is at call 6 and computes."""
    call = ["all_reduce", "data", 7, [0, 1, 2], "", 30.0]
    found = {0: snapshot(0, call, {"data": 7}), 1: snapshot(1, None, {"data": 6}), 2: snapshot(2, call, {"data": 7})}
    report = format_report(PROBLEM, found, PROCESSES, {})
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
    report = format_report(PROBLEM, found, PROCESSES, {})
    assert "All ranks wait for each other: a message was lost, or they do not make the same calls." in report
    assert "waits 12 s for rank 1 in receive on pipeline (call 3, tag 5)" in report
    assert "waits 13 s for rank 0 in receive on pipeline (call 9, tag 2)" in report
    assert "waits 14 s for ranks 0, 1 in barrier on world (call 2)" in report


def test_report_names_missing_ranks_and_their_processes():
    found = {0: snapshot(0, ["barrier", "world", 2, [0, 1, 2], "", 14.0], {"world": 2})}
    report = format_report(PROBLEM, found, PROCESSES, {1: "its process no longer exists", 2: ""})
    assert "Missing: ranks 1, 2." in report
    assert "rank 1 on a (process 12): no response; its process no longer exists\n" in report
    assert "rank 2 on b (process 13): no response\n" in report
    assert "waits 14 s for ranks 1, 2 in barrier" in report


class Findings(list):
    """Problems that a watchdog has found, and the exit code. This thread must not compute while it waits for them."""

    def __init__(self):
        super().__init__()
        self.ended = threading.Event()

    def end(self, code):
        self.append(code)
        self.ended.set()


@pytest.fixture
def quick(monkeypatch):
    """Return the findings of a watchdog that does not end the process."""
    found = Findings()
    monkeypatch.setattr(watchdog, "TICK_S", 0.02)
    monkeypatch.setattr(Watchdog, "_report_and_abort", lambda self, problem: (found.append(problem), self._closed.set()))
    monkeypatch.setattr(watchdog.os, "_exit", found.end)
    return found


def test_limit_is_stated_or_learned_from_the_longest_phase_of_its_kind():
    recorder = FlightRecorder()
    watched = Watchdog(recorder, SelfComm("world"))
    watched.close()
    for stated_s, longest_s, expected in (
        (0.0, None, FIRST_LIMIT_S),
        (0.0, 0.1, MIN_LIMIT_S),
        (0.0, 100.0, LIMIT_FACTOR * 100.0),
        (7.0, 100.0, 7.0),
        (7.0, None, 7.0),
    ):
        for phase in ("step", "evaluation", "preparation"):
            recorder.phase, recorder.longest_s = phase, {} if longest_s is None else {phase: longest_s}
            recorder.step_timeout_s = stated_s
            assert watched.limit_s() == expected


@pytest.mark.parametrize("phase", ["preparation", "start", "evaluation", "step"])
def test_watchdog_finds_a_rank_that_does_nothing_in_any_phase(quick, phase):
    recorder = FlightRecorder()
    recorder.step_timeout_s = 0.5
    recorder.enter(phase, 3)
    watched = Watchdog(recorder, SelfComm("world"))
    assert quick.ended.wait(30)
    watched.close()
    lasted = "step 4 has lasted 1 s" if phase == "step" else f"rank 0 has done nothing for 1 s in {phase} 4"
    assert quick[0].startswith(f"{lasted}; the limit is 0 s (--fault.step-timeout")
    assert quick[1] == watchdog.EXIT_CODE


def test_watchdog_gives_a_rank_that_waits_for_a_disk_or_core_more_time(quick, monkeypatch):
    monkeypatch.setattr(watchdog, "waits_for_disk_or_core", lambda: True)
    monkeypatch.setattr(watchdog, "MIN_LIMIT_S", 1.0)
    recorder = FlightRecorder()
    recorder.step_timeout_s = 0.2
    began = time.monotonic()
    watched = Watchdog(recorder, SelfComm("world"))
    assert quick.ended.wait(30)
    watched.close()
    assert "the limit is 1 s" in quick[0]
    assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("state", ["D", "R", "S"])
def test_thread_that_waits_for_a_disk_or_core_is_one_in_state_d_or_r(monkeypatch, state):
    own = str(threading.get_native_id())
    monkeypatch.setattr(processes, "process_fields", lambda path: ["x", "S" if path.endswith(own) else state])
    threading.Thread(target=lambda: time.sleep(0.5)).start()
    assert processes.waits_for_disk_or_core() == (state != "S")


def compute(recorder):
    sum(range(10**5))
    time.sleep(0.02)


def write(recorder):
    time.sleep(0.02)
    threading.Thread(target=lambda: os.write(NULL, b"x" * 10**6)).start()


def start_process(recorder):
    subprocess.run([sys.executable, "-S", "-c", "sum(range(10**6))"], check=True)


def finish_a_call(recorder):
    time.sleep(0.02)
    recorder.advance()


NULL = os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize("work", [compute, write, start_process, finish_a_call])
def test_watchdog_leaves_a_rank_alone_that_works_slowly(quick, work):
    recorder = FlightRecorder()
    recorder.step_timeout_s = 0.5
    watched = Watchdog(recorder, SelfComm("world"))
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        work(recorder)
    assert quick == []
    assert quick.ended.wait(30)  # once it has stopped
    watched.close()


def test_watchdog_leaves_a_rank_alone_that_waits_for_others(quick):
    recorder, call = FlightRecorder(), CommCall("barrier", "world", 1, (0, 1))
    recorder.step_timeout_s = 0.3
    watched = Watchdog(recorder, SelfComm("world"))
    recorder.wait(call, lambda: time.sleep(1.0))
    assert quick == []
    watched.close()


def test_step_that_follows_steps_must_finish_calls(quick, monkeypatch):
    """An endless loop computes, and so does a healthy rank in its first step, which may last."""
    monkeypatch.setattr(watchdog, "MIN_LIMIT_S", 0.5)
    recorder = FlightRecorder()
    watched = Watchdog(recorder, SelfComm("world"))
    recorder.enter("step", 0)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        compute(recorder)
    assert quick == []
    recorder.enter("step", 1)
    recorder.longest_s["step"] = 0.01
    while not quick.ended.is_set():
        compute(recorder)
    assert quick[0].startswith("rank 0 has done nothing for 1 s in step 2; the limit is 0 s")
    watched.close()


def test_rank_0_says_each_half_minute_what_it_waits_for(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "TICK_S", 0.01)
    monkeypatch.setattr(watchdog, "NOTICE_S", 0.1)
    recorder = FlightRecorder()
    watched = Watchdog(recorder, SelfComm("world"))
    recorder.enter("evaluation", 7)
    recorder.wait(CommCall("barrier", "world", 5, (0, 1)), lambda: time.sleep(0.45))
    watched.close()
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all("rank 0 has waited 0 s for rank 1 in barrier on world (call 5), in evaluation 8" in line for line in lines)


def test_rank_0_says_nothing_when_a_call_has_just_finished(monkeypatch, capfd):
    """It may finish after the tick has read the clock."""
    watched = Watchdog(FlightRecorder(), SelfComm("world"))
    watched._maybe_notice(watched.recorder.progressed_s - 1.0)
    watched._maybe_notice(watched.recorder.progressed_s)
    watched.close()
    assert capfd.readouterr().err == ""


def test_watchdog_whose_report_fails_still_ends_the_rank(quick, monkeypatch):
    monkeypatch.setattr(Watchdog, "_report_and_abort", lambda self, problem: self._closed.set() or 1 / 0)
    monkeypatch.setattr(watchdog.threading, "excepthook", lambda arguments: None)
    recorder = FlightRecorder()
    recorder.step_timeout_s = 0.1
    watched = Watchdog(recorder, SelfComm("world"))
    assert quick.ended.wait(30)
    watched.close()
    assert quick == [watchdog.EXIT_CODE]


def test_watchdog_without_a_folder_reports_its_own_rank(monkeypatch, capsys):
    """No folder is known to all ranks while a run starts."""
    codes = Findings()
    monkeypatch.setattr(watchdog, "TICK_S", 0.02)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (watched._closed.set(), codes.end(code)))
    recorder = FlightRecorder()
    recorder.step_timeout_s = 0.2
    watched = Watchdog(recorder, SelfComm("world"))
    assert codes.ended.wait(30)
    report = capsys.readouterr().err
    assert codes[0] == watchdog.EXIT_CODE
    assert report.startswith("mpilm: watchdog: rank 0 has done nothing for 0 s in start; the limit is 0 s")
    assert f"process {os.getpid()}): waits for no other rank; start, at" in report


def test_closed_watchdog_has_no_thread():
    """It refers to the run: tensors that a thread frees while Python exits would crash the process."""
    watched = Watchdog(FlightRecorder(), SelfComm("world"))
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


def test_neighbouring_nodes_have_heard_each_other_before_the_first_tick():
    """Otherwise a node that fails in its first second would never be missed."""
    nodes = [[0, 1, 2], [3, 4], [5]]

    def links(comm):
        made = NodeLinks(comm, nodes)
        comm.barrier()
        return made.node, made.neighbours, made.unheard_nodes(), made.silent_nodes(limit_s=-1.0, resumed_s=0.0)

    found = run_ranks(6, links)
    for rank, (node, neighbours, unheard, silent) in enumerate(found):
        assert neighbours == ([1, 2] if node == 0 else [0])
        assert (unheard, silent) == (([], neighbours) if rank != 2 else (neighbours, []))  # nobody sends to rank 2
