"""How the tests behave under MPI: one report, the same tests everywhere, and no rank left waiting for another.

Plain `pytest` is one rank and runs everything. Under a launcher, `mpirun -n N pytest` runs tests/mpi alone: the rest
would run N times over, and tests/faults would start mpirun inside mpirun. A failure on any rank is a failure on rank 0,
and a test that outlives its time limit ends the whole job with the stacks of every rank.
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

from mpilm.comm.base import Comm
from mpilm.launch.run import SIZE_VARIABLES

try:
    from mpi4py import MPI
except (ImportError, RuntimeError):  # no MPI here: everything but tests/mpi can still be tested
    MPI = None

WORLD = MPI.COMM_WORLD.Dup() if MPI else None  # never shared with the tests
RANK, SIZE = (WORLD.rank, WORLD.size) if WORLD else (0, 1)
LAUNCHED = SIZE > 1 or any(name in os.environ for name in SIZE_VARIABLES)
MPI_FOLDER = Path(__file__).parent / "mpi"
ROOT = str(Path(__file__).parents[1])
STDERR = pytest.StashKey[int]()
GRACE_S = 5.0  # pytest-timeout comes first: its alarm ends a test that still runs Python

torch.set_num_threads(1)


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
        world.barrier()  # nobody removes it while another still reads


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # pytest takes the real one away while a test runs
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if RANK and reporter is not None:  # one report, from rank 0; the others write theirs away
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - open as long as pytest runs


def pytest_report_header() -> str:
    where = f"{MPI.get_vendor()[0]} {'.'.join(map(str, MPI.get_vendor()[1]))}, ranks: {SIZE}" if MPI else "no MPI library"
    return f"mpi: {where}{'; under a launcher, so only tests/mpi runs' if LAUNCHED else ''}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Under a launcher the other folders are not even imported."""
    if LAUNCHED and collection_path.parent == MPI_FOLDER.parent and collection_path.is_dir():
        return collection_path != MPI_FOLDER or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [item for item in items if MPI_FOLDER not in item.path.parents]
    for item in items:
        if item not in elsewhere:
            item.add_marker(pytest.mark.mpi)
    if LAUNCHED and elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


def pytest_collection_finish(session: pytest.Session) -> None:
    """The same tests in the same order on all ranks, or they would wait for each other in different ones."""
    if WORLD is not None:
        mine = [item.nodeid for item in session.items]
        for rank, theirs in enumerate(WORLD.allgather(mine)):
            if theirs != mine:
                odd = sorted(set(theirs) ^ set(mine)) or "the order"
                pytest.exit(f"ranks {RANK} and {rank} collected different tests: {odd}", returncode=4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """A failure anywhere is a failure everywhere, so that all ranks go on to the same phase of the same test."""
    report = yield
    if SIZE > 1:
        if report.failed:  # at once: the others may be waiting for this rank and never get to the exchange below
            _say(item, f"failed in {report.when}:\n{report.longreprtext}")
        mine = ((item.nodeid, report.when), report.outcome, report.longreprtext if report.failed else "")
        everyone = WORLD.allgather(mine)
        places, outcomes = {theirs[0] for theirs in everyone}, {theirs[1] for theirs in everyone}
        if len(places) > 1 or outcomes == {"passed", "skipped"}:
            _say(item, f"ranks out of step: {[theirs[:2] for theirs in everyone]}")
            WORLD.Abort(1)
        bad = [rank for rank, theirs in enumerate(everyone) if theirs[1] == "failed"]
        if bad and not report.failed:
            report.outcome = "failed"
            report.longrepr = f"failed on rank {', '.join(map(str, bad))} of {SIZE}; rank {bad[0]} says\n{everyone[bad[0]][2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """A rank inside MPI hears no alarm: end the job from another thread, with the line that each rank waits in."""
    if not LAUNCHED:
        return (yield)
    timer = threading.Timer(_limit_s(item) + GRACE_S, _give_up, (item,))
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


def _give_up(item: pytest.Item) -> None:
    stacks = []
    frames = sys._current_frames()
    del frames[threading.get_ident()]
    for frame in frames.values():
        lines = traceback.format_list([line for line in traceback.extract_stack(frame) if line.filename.startswith(ROOT)])
        stacks.append("".join(lines))
    _say(item, "still runs after its time limit, and stands\n" + "and\n".join(filter(None, stacks)))
    threading.Event().wait(1.0)  # what the other ranks say is wanted too, and Abort ends them
    WORLD.Abort(1)


def _say(item: pytest.Item, text: str) -> None:
    """Straight to the launcher, past pytest's capture."""
    message = f"rank {RANK} of {SIZE} on {socket.gethostname()}: {item.nodeid} {text}\n"
    os.write(item.config.stash[STDERR], message.encode())
