"""The end that comes without MPI."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mpilm.comm.abort import find_launcher

ASK = "from mpilm.comm.abort import find_launcher; print(find_launcher())"
STUCK = """
import time
from mpilm.comm import abort

abort.LAUNCHER_TIMEOUT_S = abort.RANK_TIMEOUT_S = 1
abort.force_exit()
time.sleep(60)
"""
ROOT = Path(__file__).parents[2]


def under(name: str, program: str, folder: Path, afterwards: str = "") -> subprocess.CompletedProcess:
    """A program, started by a shell of that name, which says its number first and does something `afterwards`."""
    shell = folder / name
    shutil.copy("/bin/sh", shell)
    words = [shell, "-c", f'echo $$; "$0" -c "$1"; {afterwards}:', sys.executable, program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=50, check=False)


def test_the_launcher_is_found_above_this_process(tmp_path):
    shell, found = under("mpirun", ASK, tmp_path).stdout.split()
    assert found == shell


def test_what_is_no_launcher_is_left_alone(tmp_path):
    assert under("slurmstepd", ASK, tmp_path).stdout.split()[1] == str(find_launcher())


def test_the_launcher_does_not_wait_for_the_one_who_waits_for_it(tmp_path):
    """It ends when nobody holds the output of its ranks any more."""
    began = time.monotonic()
    program = "from mpilm.comm import abort; abort.LAUNCHER_TIMEOUT_S = 40; abort.force_exit(); print('here', flush=True)"
    assert under("mpirun", f"{program}; import os; os._exit(0)", tmp_path).stdout.split()[1] == "here"
    assert time.monotonic() - began < 30


def test_a_rank_and_a_launcher_that_hang_are_ended(tmp_path):
    assert under("mpiexec", STUCK, tmp_path, "kill -STOP $$; ").returncode == -signal.SIGKILL
