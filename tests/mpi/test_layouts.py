"""Every layout of these ranks on real MPI, against the serial run by each rank itself: `mpirun -n 1|2|3|4 pytest`."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import joined, layout, newest_tensors, run, serial_config, small_config
from text import tiny_config, write_tokens

from mpilm.comm.base import Comm, SelfComm
from mpilm.config import Config
from mpilm.launch.run import launcher_world_size
from mpilm.model.flops import parameter_count
from mpilm.parallel.pipeline.schedules import SCHEDULES
from mpilm.trainer.loop import train
from mpilm.verification.layouts import VOCAB_SIZE

SIZE = launcher_world_size() or 1  # of the world, known while tests are collected


def layers(pipeline: int, schedule: str) -> int:
    """Few, and one for each stage."""
    return max(SIZE, pipeline * (2 if schedule == "interleaved" else 1))


def cases() -> Iterator[Any]:
    """Each layout of the ranks with another choice of all else."""
    number = 0
    for pipeline in (p for p in range(1, SIZE + 1) if SIZE % p == 0):
        for schedule in SCHEDULES if pipeline > 1 else ["1f1b"]:
            for zero in (0, 1, 2, 3) if pipeline < SIZE else (0,):
                changes = {
                    "model__n_layers": layers(pipeline, schedule),
                    "model__tie_embeddings": number % 2 == 0,
                    "train__global_batch": 2 * SIZE - (pipeline < SIZE and number % 3 == 0),  # uneven: a replica has one fewer
                    "train__recompute": ("none", "attention", "block")[number % 7 % 3],
                    "parallel__reduce": "sent" if number % 3 == 1 else "shared",
                }
                yield pytest.param(layout(pipeline, schedule, zero), changes, id=f"{pipeline} stages, {schedule}, ZeRO-{zero}")
                number += 1


@cache
def alone(config: Config, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    left = run(config, SelfComm(), steps)
    return left.numbers, joined([left.held])


def assert_serial(world: Comm, config: Config, steps: int = 2) -> None:
    """The numbers, and the weights and moments that the ranks hold, are those of the serial run, and none is missing."""
    left = run(
        config, world.with_options(gpu_aware=False, yield_while_waiting=True), steps
    )  # there may be more ranks than cores
    numbers, tensors = alone(serial_config(config), steps)
    held = world.all_gather_json([[piece.name, piece.start, piece.stop] for piece in left.held["value"]])
    assert left.numbers == numbers
    for kind, pieces in left.held.items():
        for piece, values in pieces.items():
            expected = tensors[f"{kind} of {piece.name}"][piece.start : piece.stop]
            assert torch.equal(values.view(torch.int32), expected), f"{kind} of {piece}"
    distinct = {tuple(piece) for theirs in held for piece in theirs}
    assert sum(stop - start for _, start, stop in distinct) == parameter_count(config.model, VOCAB_SIZE)


@pytest.mark.parametrize(("layout", "changes"), list(cases()))
def test_every_layout_has_the_bits_of_the_serial_run(world: Comm, layout: dict[str, Any], changes: dict[str, Any]) -> None:
    assert_serial(world, small_config(**layout, **changes))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_activations_too_long_for_mpi_to_buffer(world: Comm, schedule: str) -> None:
    """128 KiB each: a send ends when the other rank receives."""
    shape = {"model__n_layers": layers(SIZE, schedule), "model__d_model": 32, "model__context_length": 128}
    work = {"train__micro_batch": 8, "train__global_batch": 8 * SIZE, "model__dropout": 0.0}
    assert_serial(world, small_config(**layout(SIZE, schedule), **shape, **work), steps=1)


def test_a_run_goes_on_on_another_layout_of_the_ranks(world: Comm, shared: Path) -> None:
    def train_to_end(comm: Comm, folder: Path, steps: int, **layout: Any) -> dict[str, bytes]:
        config = tiny_config(
            shared / "tokens", folder, **layout, model__n_layers=2 * SIZE, train__steps=steps, train__global_batch=4 * SIZE,
            train__lr_schedule="constant", run__eval_every=0,
        )  # fmt: skip
        train(config, comm)
        comm.barrier()
        return newest_tensors(config)

    if world.rank == 0:
        write_tokens(shared)
    world.barrier()
    train_to_end(world, shared / "run", 1, **layout(SIZE, "interleaved"))
    together = train_to_end(world, shared / "run", 2, **layout(zero=3 if SIZE > 1 else 0))
    assert together == train_to_end(SelfComm(), shared / f"alone-{world.rank}", 2)
