"""The doctor on real MPI."""

import pytest

from mpilm.comm.mpi import MpiComm
from mpilm.trainer.examine import examine


def test_this_mpi_is_healthy(world: MpiComm, capsys: pytest.CaptureFixture[str]) -> None:
    examine(world, 1 << 20)
    said = capsys.readouterr().out
    assert ("all answers were right" in said) == (world.rank == 0)
    assert world.rank or "libmpi" in said
