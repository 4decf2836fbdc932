"""Commands run as jobs of their own, for tests of what they print and how they end."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.errors import UserError
from mpilm.telemetry.metrics import MetricsRow, parse_row

LAUNCHER = Path(sys.executable).with_name("mpirun")  # the one that came with the library in this environment
OTHER_PYTHON = os.environ.get("MPILM_TEST_OTHER_PYTHON") or "no-other-python"  # of an environment with another MPI library
HAS_OTHER_MPI = Path(OTHER_PYTHON).with_name("mpirun").is_file() and os.sep in OTHER_PYTHON
OPEN_MPI = {  # as root, and with more ranks than cores; MPICH reads none of these
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def find_open_mpi() -> str:
    """Return the Python of this environment or the other one that has Open MPI; empty if neither has."""
    for python in (sys.executable, OTHER_PYTHON):
        launcher = Path(python).with_name("mpirun")
        if launcher.exists() and "Open MPI" in subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout:
            return python
    return ""


def mpirun(
    ranks: int, *arguments: object, limit_s: float = 60.0, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `mpirun -n RANKS python ARGUMENTS`, or plain python for 0 ranks; fail after `limit_s` seconds."""
    launcher = Path(python).with_name("mpirun")  # that of the library in the environment
    if ranks and not launcher.exists():
        pytest.skip(f"there is no {launcher}")
    command = [str(launcher), "-n", str(ranks)] if ranks else []
    command += [python, *map(str, arguments)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, **OPEN_MPI, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **variables}
    job = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = job.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        pytest.fail(f"{' '.join(command)} did not end within {limit_s} s; it printed\n{out}\n{err}")
    return subprocess.CompletedProcess(command, job.returncode, out, err)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines that mpilm printed on standard error, without those that say what a slow machine waits for."""
    notice = re.compile(r"mpilm: .* (goes on for|has waited) \d+ s ")
    return [line for line in done.stderr.splitlines() if "mpilm" in line and not notice.match(line)]


def refusal(command: str, *arguments: object, ranks: int = 0, code: int = 78, limit_s: float = 60.0) -> str:
    """Run a command that must be refused with this exit code; return its one message."""
    done = mpirun(ranks, "-m", f"mpilm.{command}", *arguments, limit_s=limit_s)
    text = f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code, text
    assert done.stderr.count("mpilm: error") == 1, text
    assert "Traceback" not in text
    return re.split(r"mpilm: error(?: on rank \d+ of \d+ on \S+)?: ", done.stderr)[1]


def refusal_in_process(command: str, *arguments: object, code: int = 78) -> str:
    """Run a command on one rank in this process; it must be refused with this exit code. Return the message."""
    main = importlib.import_module(f"mpilm.{command}").main
    with mock.patch.object(sys, "argv", [command, *map(str, arguments)]), pytest.raises((UserError, CollectiveError)) as caught:
        main()(SelfComm("world"))
    error = caught.value.error if isinstance(caught.value, CollectiveError) else caught.value
    assert error.code == code, error
    return str(error)


def read_metrics(path: Path) -> list[MetricsRow]:
    """Return the rows of a metrics file, without a cut last line and lines that are not rows."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [row for line in lines if (row := parse_row(line + b"\n"))]
