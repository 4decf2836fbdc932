"""Tests under MPI: one report, the same tests on all ranks, and no rank that waits for another for ever.

Plain `pytest` is one rank and runs everything. Under a launcher, `mpirun -n N pytest` runs tests/mpi alone: the other tests
would run N times, and tests/faults would start mpirun inside mpirun. A failure on any rank is a failure on rank 0, and a test
that exceeds its time limit ends the job with the stacks of all ranks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from mpilm.comm.base import Comm
from mpilm.launch.run import SIZE_VARIABLES

try:
    from mpi4py import MPI
except (ImportError, RuntimeError):  # without MPI, everything but tests/mpi can still be tested
    MPI = None

WORLD = MPI.COMM_WORLD.Dup() if MPI else None  # not shared with the tests
RANK, SIZE = (WORLD.rank, WORLD.size) if WORLD else (0, 1)
LAUNCHED = SIZE > 1 or any(name in os.environ for name in SIZE_VARIABLES)
MPI_FOLDER = Path(__file__).parent / "mpi"
ROOT = str(Path(__file__).parents[1])
STDERR = pytest.StashKey[int]()
GRACE_S = 5.0  # for pytest-timeout, whose alarm ends a test that still runs Python

torch.set_num_threads(1)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # by default torch.compile starts worker processes, which is slow
settings.register_profile("untimed", settings.default, deadline=None)  # a busy machine is no error
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def world() -> Comm:
    """The ranks of this pytest: MPI's world."""
    if MPI is None:
        pytest.skip("no MPI library can be loaded")
    from mpilm.comm.mpi import mpi_world

    return mpi_world()


@pytest.fixture
def shared(world: Comm) -> Iterator[Path]:
    """One folder for all ranks of this pytest."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(world.broadcast_json(own))
        world.barrier()  # no rank removes it while another still reads


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # pytest replaces the real one while a test runs
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if RANK and reporter is not None:  # one report, from rank 0
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - open as long as pytest runs


def pytest_report_header() -> str:
    library = f"{MPI.get_vendor()[0]} {'.'.join(map(str, MPI.get_vendor()[1]))}, ranks: {SIZE}" if MPI else "no MPI library"
    return f"mpi: {library}{'; under a launcher, so only tests/mpi runs' if LAUNCHED else ''}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not even import the other folders under a launcher."""
    if LAUNCHED and collection_path.parent == MPI_FOLDER.parent and collection_path.is_dir():
        return collection_path != MPI_FOLDER or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if MPI_FOLDER not in item.path.parents]
    for item in items:
        if item not in others:
            item.add_marker(pytest.mark.mpi)
    if LAUNCHED and others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exit unless all ranks run the same tests in the same order, or they would wait for each other in different ones."""
    if WORLD is not None:
        own = [item.nodeid for item in session.items]
        for rank, theirs in enumerate(WORLD.allgather(own)):
            if theirs != own:
                odd = sorted(set(theirs) ^ set(own)) or "the order"
                pytest.exit(f"ranks {RANK} and {rank} collected different tests: {odd}", returncode=4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Make a failure on any rank one on all, so that all ranks continue with the same phase of the same test."""
    report = yield
    if SIZE > 1:
        if report.failed:  # at once: other ranks may wait for this one and never get to the exchange below
            _print(item, f"failed in {report.when}:\n{report.longreprtext}")
        own = ((item.nodeid, report.when), report.outcome, report.longreprtext if report.failed else "")
        everyone = WORLD.allgather(own)
        phases, outcomes = {theirs[0] for theirs in everyone}, {theirs[1] for theirs in everyone}
        if len(phases) > 1 or outcomes == {"passed", "skipped"}:
            _print(item, f"ranks out of step: {[theirs[:2] for theirs in everyone]}")
            WORLD.Abort(1)
        bad = [rank for rank, theirs in enumerate(everyone) if theirs[1] == "failed"]
        if bad and not report.failed:
            report.outcome = "failed"
            report.longrepr = f"failed on rank {', '.join(map(str, bad))} of {SIZE}; rank {bad[0]}:\n{everyone[bad[0]][2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """End a job whose ranks hang inside MPI, where no alarm reaches them, from another thread."""
    if not LAUNCHED:
        return (yield)
    timer = threading.Timer(_limit_s(item) + GRACE_S, _abort_with_stacks, (item,))
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def _limit_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    with contextlib.suppress(ValueError):
        return float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))
    return 60.0


def _abort_with_stacks(item: pytest.Item) -> None:
    stacks = []
    frames = sys._current_frames()
    del frames[threading.get_ident()]
    for frame in frames.values():
        lines = traceback.format_list([line for line in traceback.extract_stack(frame) if line.filename.startswith(ROOT)])
        stacks.append("".join(lines))
    _print(item, "exceeds its time limit at\n" + "and\n".join(filter(None, stacks)))
    threading.Event().wait(1.0)  # the other ranks print, too, and Abort ends them
    WORLD.Abort(1)


def _print(item: pytest.Item, text: str) -> None:
    """Write to the launcher, past pytest's capture."""
    message = f"rank {RANK} of {SIZE} on {socket.gethostname()}: {item.nodeid} {text}\n"
    os.write(item.config.stash[STDERR], message.encode())
