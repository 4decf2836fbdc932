"""A folder belongs to one job at a time; a lock whose holder has gone is taken over."""

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
from mpilm.launch.lock import NAME, FolderLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    monkeypatch.setattr(lock, "TOUCH_S", 0.1)


def taken_over(folder, holder=None):
    """A new job gets the folder, in the place of `holder`, and leaves nothing when it goes; who then holds it."""
    own = FolderLock(folder, lambda text: None)
    now = json.loads((folder / NAME).read_text())
    assert (now["pid"], now["started"]) == (os.getpid(), lock._started(os.getpid()))
    assert now != holder
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        FolderLock(folder)
    own.release()
    assert list(folder.iterdir()) == []
    return now["pid"]


def written(folder, **changes):
    """A lock as another job has left it."""
    holder = {"host": "elsewhere", "pid": 1, "started": 5, "since": 0.0, "job": ""} | changes
    (folder / NAME).write_text(json.dumps(holder))
    return holder


def test_one_has_it_until_it_is_released(tmp_path):
    first = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=rf"--run.dir {tmp_path} is in use: process {os.getpid()} on \S+ trains there"):
        FolderLock(tmp_path)
    first.release()
    second = FolderLock(tmp_path)
    first.release()  # once more: the lock is no longer its own
    assert (tmp_path / NAME).exists()
    second.release()
    assert list(tmp_path.iterdir()) == []


TAKE_AND_GO = (
    "import os, sys, pathlib; from mpilm.launch.lock import FolderLock; FolderLock(pathlib.Path(sys.argv[1])); os._exit(9)"
)


def test_a_process_that_has_gone(tmp_path):
    assert subprocess.run([sys.executable, "-c", TAKE_AND_GO, str(tmp_path)], check=False).returncode == 9
    assert taken_over(tmp_path, json.loads((tmp_path / NAME).read_text())) == os.getpid()


def test_a_process_that_is_dead_and_has_not_been_asked_for(tmp_path):
    """As in a container whose first process asks for none."""
    dead = subprocess.Popen([sys.executable, "-c", TAKE_AND_GO, str(tmp_path)])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{dead.pid}").exists()
    assert taken_over(tmp_path, json.loads((tmp_path / NAME).read_text())) == os.getpid()
    assert dead.wait() == 9


def test_another_process_with_its_number(tmp_path):
    own = FolderLock(tmp_path)
    holder = json.loads((tmp_path / NAME).read_text())
    own.release()
    assert taken_over(tmp_path, written(tmp_path, **holder | {"started": holder["started"] - 1})) == os.getpid()


def test_a_process_of_another_container_is_not_looked_for_here(tmp_path):
    """It has the same host name, and a number that means another process, or none, here."""
    own = FolderLock(tmp_path)
    holder = json.loads((tmp_path / NAME).read_text())
    own.release()
    said = []
    written(tmp_path, **holder | {"pid": 2**22 + 1, "system": "another"})
    FolderLock(tmp_path, said.append).release()
    assert len(said) == 1  # it was looked at for a while, as one of another host


def test_a_job_on_another_host_that_touches_its_lock(tmp_path):
    holder, said = written(tmp_path), []
    stop = threading.Event()

    def touch():
        while not stop.wait(0.1):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ConfigError, match="process 1 on elsewhere trains there"):
        FolderLock(tmp_path, said.append)
    stop.set()
    thread.join()
    assert "is of a job on elsewhere; looking for 0 s" in said[0]
    assert json.loads((tmp_path / NAME).read_text()) == holder


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_a_job_on_another_host_that_has_gone_whatever_the_clocks_say(tmp_path, clock):
    holder = written(tmp_path)
    os.utime(tmp_path / NAME, (time.time() + clock,) * 2)
    assert taken_over(tmp_path, holder) == os.getpid()


def test_the_same_slurm_job_queued_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1e9)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert taken_over(tmp_path, written(tmp_path, job="77")) == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense"])
def test_a_file_that_says_nothing(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    assert taken_over(tmp_path) == os.getpid()


def test_of_many_that_find_it_stale_one_gets_it(tmp_path):
    for _ in range(20):
        written(tmp_path, host=os.uname().nodename, system=lock._system(), pid=2**22 + 1)
        got, barrier = [], threading.Barrier(8)

        def take(got=got, barrier=barrier):
            barrier.wait()
            with contextlib.suppress(ConfigError):
                got.append(FolderLock(tmp_path))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_it_stays_fresh(tmp_path):
    held = FolderLock(tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    time.sleep(0.5)
    assert (tmp_path / NAME).stat().st_mtime > 1e9
    held.release()
