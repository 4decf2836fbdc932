"""Checkpoints written and read by MPI processes: `mpirun -n 2 pytest`, and with 1, 3 and 4 ranks."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from checkpoints import (
    assert_loads,
    draw_shapes,
    draw_sharding,
    draw_tensors,
    read_files,
    replicate,
    save_tensors,
    small_files,
    stripe,
)

from mpilm.checkpoint.format import TEMPORARY, list_checkpoints
from mpilm.checkpoint.verify import verify_checkpoint
from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.errors import FileError

SHAPES = {"embed.weight": (4000, 16), "blocks.0.attn.q.weight": (16, 16), "norm.weight": (16,)}


@pytest.mark.parametrize("seed", range(20))
def test_save_over_mpi_writes_the_bytes_of_one_rank_and_any_sharding_reads_them(world: Comm, shared: Path, seed: int) -> None:
    random = Random(seed)  # the same draws on every rank
    shapes = draw_shapes(random) | ({"norm.weight": (5000,)} if seed % 2 else {})
    values = draw_tensors(shapes)
    with small_files(random.choice([60, 1000, 1 << 24]), random.choice([500, 5_000_000_000])):
        sharding = draw_sharding(random, shapes, world.size)
        together = save_tensors(shared / "together", values, sharding, InstrumentedComm(world, checks_calls=True))
        alone = save_tensors(shared / f"alone-{world.rank}", values, replicate(shapes, 1), SelfComm())
        assert read_files(together) == read_files(alone)
        verify_checkpoint(together)
        assert_loads(together, values, draw_sharding(random, shapes, world.size), world)


def test_save_of_large_blocks_from_many_ranks_does_not_deadlock(world: Comm, shared: Path) -> None:
    """MPI does not buffer such messages: a writer that did not receive would block the senders."""
    shapes = {"embed.weight": (3000, 1000)}
    values = draw_tensors(shapes)
    with small_files(1 << 20):
        folder = save_tensors(shared, values, stripe(shapes, world.size, 1000), world)
        verify_checkpoint(folder)
        assert_loads(folder, values, stripe(shapes, world.size, 1300, first=1), world)


@contextlib.contextmanager
def limit_file_size(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_where_one_rank_cannot_write_raises_on_all(world: Comm, shared: Path) -> None:
    values, sharding = draw_tensors(SHAPES), stripe(SHAPES, world.size, 500)
    bad = world.size - 1
    with small_files(10_000):
        older = save_tensors(shared, values, sharding, world)
        before = read_files(older)
        limited = limit_file_size(50_000) if world.rank == bad else contextlib.nullcontext()
        with limited, pytest.raises(CollectiveError, match=r"step-00000008 could not be written: File too large") as caught:
            save_tensors(shared, values, sharding, world, step=8)
        assert isinstance(caught.value.error, FileError)
        assert world.size == 1 or f"(on rank {bad})" in str(caught.value)
        world.barrier()  # rank 0 has now removed the partial folder
        assert list_checkpoints(shared) == [older]
        assert read_files(older) == before
        assert not list(shared.glob(f"{TEMPORARY}*"))
        world.barrier()  # no rank starts the next one before all have looked
        verify_checkpoint(save_tensors(shared, values, sharding, world, step=8))
