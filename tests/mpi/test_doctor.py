"""The doctor on real MPI."""

import pytest

from mpilm.comm.mpi import MpiComm
from mpilm.doctor.checks import run_checks


def test_run_checks_on_this_mpi_passes(world: MpiComm, capsys: pytest.CaptureFixture[str]) -> None:
    run_checks(world, 1 << 20)
    output = capsys.readouterr().out
    assert ("all checks passed" in output) == (world.rank == 0)
    assert world.rank or "libmpi" in output
