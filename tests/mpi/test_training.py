"""Training runs on real MPI: stopped and resumed on other layouts, they equal one rank by itself."""

from pathlib import Path
from typing import Any

import pytest
from helpers import read_metrics
from runs import layout, newest_tensors
from text import tiny_config, write_tokens

from mpilm.comm.base import Comm, SelfComm
from mpilm.engine.step import train_step
from mpilm.trainer.build import build_run
from mpilm.trainer.loop import train


@pytest.fixture
def tokens(world: Comm, shared: Path) -> Path:
    """Prepared tokens that all ranks see."""
    if world.rank == 0:
        write_tokens(shared)
    world.barrier()
    return shared / "tokens"


def test_run_resumed_on_another_layout_equals_one_rank(world: Comm, shared: Path, tokens: Path) -> None:
    def train_until(steps: int, comm: Comm, folder: Path, **settings: Any) -> tuple[list[float], dict[str, bytes]]:
        config = tiny_config(
            tokens, folder, **settings, model__n_layers=2 * world.size, train__steps=steps, train__global_batch=4 * world.size,
            train__lr_schedule="constant", run__eval_every=1,
        )  # fmt: skip
        train(config, comm)
        comm.barrier()
        rows = read_metrics(folder / "metrics.jsonl")
        return [row[key] for row in rows for key in ("loss", "eval_loss") if key in row], newest_tensors(config)

    train_until(1, world, shared / "run", **layout(world.size, "interleaved"))
    resumed = train_until(2, world, shared / "run", **layout(zero=3 if world.size > 1 else 0))
    serial = train_until(2, SelfComm(), shared / f"serial-{world.rank}")
    assert resumed == serial
    assert len(serial[0]) == 4


def test_all_reduce_of_the_library_is_close_to_the_tree(world: Comm, shared: Path, tokens: Path) -> None:
    def losses(reproducible: bool) -> list[float]:
        run = build_run(tiny_config(tokens, shared / f"run-{reproducible}", train__reproducible=reproducible), world)
        return [train_step(run.model, run.batches, step).loss for step in range(3)]

    assert losses(False) == pytest.approx(losses(True), rel=1e-5)
