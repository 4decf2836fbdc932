"""The end of a job without MPI: the launcher is found, and killed if it hangs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mpilm.comm.processes import LAUNCHERS, find_ancestor

ROOT = Path(__file__).parents[2]
PRINT_LAUNCHER = "from mpilm.comm.processes import LAUNCHERS, find_ancestor; print(find_ancestor(LAUNCHERS))"
FORCE_EXIT = "from mpilm.comm import mpi; mpi.RANK_TIMEOUT_S, mpi.LAUNCHER_TIMEOUT_S = {}; mpi.force_exit()\n"


def run_under(name: str, program: str, folder: Path, then: str = "") -> subprocess.CompletedProcess:
    """Run a Python program below a shell named `name`, which prints its process id first and does `then` afterwards."""
    shell = folder / name
    shutil.copy("/bin/sh", shell)
    command = [shell, "-c", f'echo $$; "$0" -c "$1"; {then}:', sys.executable, program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)


def test_find_launcher_returns_the_mpirun_above(tmp_path):
    shell, found = run_under("mpirun", PRINT_LAUNCHER, tmp_path).stdout.split()
    assert found == shell


def test_find_launcher_ignores_other_parents(tmp_path):
    assert run_under("slurmstepd", PRINT_LAUNCHER, tmp_path).stdout.split()[1] == str(find_ancestor(LAUNCHERS))


def test_force_exit_does_not_keep_a_launcher_that_ends(tmp_path):
    """A launcher ends when no process holds the output of its ranks any more."""
    start = time.monotonic()
    program = FORCE_EXIT.format((5, 40)) + "import os; print('reached', flush=True); os._exit(0)"
    assert run_under("mpirun", program, tmp_path).stdout.split()[1] == "reached"
    assert time.monotonic() - start < 30


def test_force_exit_ends_a_hanging_rank_and_launcher(tmp_path):
    program = FORCE_EXIT.format((1, 1)) + "import time; time.sleep(60)"
    assert run_under("mpiexec", program, tmp_path, "kill -STOP $$; ").returncode == -signal.SIGKILL
