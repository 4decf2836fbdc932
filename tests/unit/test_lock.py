"""Lock of a run folder: one job at a time holds it, and a stale lock is taken over."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpilm.errors import ConfigError
from mpilm.launch import lock
from mpilm.launch.lock import LOCK_NAME, FolderLock

LOCK_AND_EXIT = (
    "import os, sys, pathlib; from mpilm.launch.lock import FolderLock; FolderLock(pathlib.Path(sys.argv[1])); os._exit(9)"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    monkeypatch.setattr(lock, "TOUCH_S", 0.1)


def read_lock(folder):
    return json.loads((folder / LOCK_NAME).read_text())


def write_lock(folder, **changes):
    """Write a lock as another job left it."""
    holder = {"host": "elsewhere", "pid": 1, "started": 5, "since": 0.0, "job": ""} | changes
    (folder / LOCK_NAME).write_text(json.dumps(holder))
    return holder


def own_holder(folder):
    """Return what this process writes into a lock."""
    own = FolderLock(folder)
    holder = read_lock(folder)
    own.release()
    return holder


def check_takeover(folder):
    """Take the lock over and release it, which leaves nothing behind."""
    old = (folder / LOCK_NAME).read_text()
    own = FolderLock(folder, lambda text: None)
    new = read_lock(folder)
    assert (new["pid"], new["started"]) == (os.getpid(), lock._start_ticks(os.getpid()))
    assert json.dumps(new) != old
    with pytest.raises(ConfigError, match=rf"--run.dir {folder} is in use: process {os.getpid()} on \S+ trains there"):
        FolderLock(folder)
    own.release()
    assert list(folder.iterdir()) == []


def test_folder_lock_second_release_keeps_the_lock_of_another(tmp_path):
    first = FolderLock(tmp_path)
    first.release()
    second = FolderLock(tmp_path)
    first.release()
    assert (tmp_path / LOCK_NAME).exists()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_folder_lock_dead_process_is_taken_over(tmp_path):
    assert subprocess.run([sys.executable, "-c", LOCK_AND_EXIT, str(tmp_path)], check=False).returncode == 9
    check_takeover(tmp_path)


def test_folder_lock_zombie_is_taken_over(tmp_path):
    """As in a container whose first process reaps no children."""
    dead = subprocess.Popen([sys.executable, "-c", LOCK_AND_EXIT, str(tmp_path)])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{dead.pid}").exists()
    check_takeover(tmp_path)
    assert dead.wait() == 9


def test_folder_lock_reused_process_id_is_taken_over(tmp_path):
    holder = own_holder(tmp_path)
    write_lock(tmp_path, **holder | {"started": holder["started"] - 1})
    check_takeover(tmp_path)


def test_folder_lock_process_of_another_container_is_watched(tmp_path):
    """The host name is the same, but its process id means another process, or none, here."""
    messages = []
    write_lock(tmp_path, **own_holder(tmp_path) | {"pid": 2**22 + 1, "system": "another"})
    FolderLock(tmp_path, messages.append).release()
    assert len(messages) == 1


def test_folder_lock_touched_on_another_host_raises(tmp_path):
    holder, messages, stop = write_lock(tmp_path), [], threading.Event()

    def touch():
        while not stop.wait(0.1):
            os.utime(tmp_path / LOCK_NAME)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ConfigError, match="process 1 on elsewhere trains there"):
        FolderLock(tmp_path, messages.append)
    stop.set()
    thread.join()
    assert "belongs to a job on elsewhere; checking for 0 s whether it still runs" in messages[0]
    assert read_lock(tmp_path) == holder


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_folder_lock_untouched_on_another_host_is_taken_over_whatever_its_clock(tmp_path, clock):
    write_lock(tmp_path)
    os.utime(tmp_path / LOCK_NAME, (time.time() + clock,) * 2)
    check_takeover(tmp_path)


def test_folder_lock_requeued_slurm_job_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1e9)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_lock(tmp_path, job="77")
    check_takeover(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense"])
def test_folder_lock_unreadable_file_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(content)
    check_takeover(tmp_path)


def test_folder_lock_concurrent_takeovers_have_one_winner(tmp_path):
    for _ in range(20):
        write_lock(tmp_path, host=os.uname().nodename, system=lock._system_id(), pid=2**22 + 1)
        winners, barrier = [], threading.Barrier(8)

        def take(winners=winners, barrier=barrier):
            barrier.wait()
            with contextlib.suppress(ConfigError):
                winners.append(FolderLock(tmp_path))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        winners[0].release()
        assert list(tmp_path.iterdir()) == []


def test_folder_lock_is_touched_while_held(tmp_path):
    own = FolderLock(tmp_path)
    os.utime(tmp_path / LOCK_NAME, (0, 0))
    time.sleep(0.5)
    assert (tmp_path / LOCK_NAME).stat().st_mtime > 1e9
    own.release()
