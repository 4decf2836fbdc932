"""Checkpoints written and read by real MPI processes: `mpirun -n 2 pytest`, and 1, 3 and 4 as well."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from checkpoints import (
    contents,
    draw_shapes,
    draw_sharding,
    draw_tensors,
    held_by_all,
    loads_the_same,
    saved,
    small_files,
    striped,
)

from mpilm.checkpoint.format import TEMPORARY, checkpoints
from mpilm.checkpoint.verify import verify
from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.errors import FileError

SHAPES = {"embed.weight": (4000, 16), "blocks.0.attn.q.weight": (16, 16), "norm.weight": (16,)}


@pytest.mark.parametrize("seed", range(20))
def test_the_bytes_are_those_of_one_rank_and_any_layout_reads_them(world: Comm, shared: Path, seed: int) -> None:
    random = Random(seed)  # the same draws on every rank
    shapes = draw_shapes(random) | ({"norm.weight": (5000,)} if seed % 2 else {})
    values = draw_tensors(shapes)
    with small_files(random.choice([60, 1000, 1 << 24]), random.choice([500, 5_000_000_000])):
        together = saved(
            shared / "together", values, draw_sharding(random, shapes, world.size), InstrumentedComm(world, check=True)
        )
        alone = saved(shared / f"alone-{world.rank}", values, held_by_all(shapes, 1), SelfComm())
        assert contents(together) == contents(alone)
        verify(together)
        loads_the_same(together, values, draw_sharding(random, shapes, world.size), world)


def test_large_blocks_from_many_givers(world: Comm, shared: Path) -> None:
    """Messages that MPI does not buffer: a writer that did not receive would block its givers."""
    shapes = {"embed.weight": (3000, 1000)}
    values = draw_tensors(shapes)
    with small_files(1 << 20):
        folder = saved(shared, values, striped(shapes, world.size, 1000), world)
        verify(folder)
        loads_the_same(folder, values, striped(shapes, world.size, 1300, first=1), world)


@contextlib.contextmanager
def files_no_longer_than(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_rank_that_cannot_write_is_told_of_on_all(world: Comm, shared: Path) -> None:
    values, sharding = draw_tensors(SHAPES), striped(SHAPES, world.size, 500)
    bad = world.size - 1
    with small_files(10_000):
        older = saved(shared, values, sharding, world)
        before = contents(older)
        limited = files_no_longer_than(50_000) if world.rank == bad else contextlib.nullcontext()
        with limited, pytest.raises(CollectiveError, match=r"step-00000008 could not be written: File too large") as caught:
            saved(shared, values, sharding, world, step=8)
        assert isinstance(caught.value.error, FileError)
        assert world.size == 1 or f"(on rank {bad})" in str(caught.value)
        world.barrier()  # rank 0 has by now removed what was half-written
        assert checkpoints(shared) == [older]
        assert contents(older) == before
        assert not list(shared.glob(f"{TEMPORARY}*"))
        world.barrier()  # all have looked before the next one is begun
        verify(saved(shared, values, sharding, world, step=8))
