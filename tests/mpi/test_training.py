"""Training on real MPI: what one rank computes by itself, bit for bit, stopped on the way or not."""

from pathlib import Path

import pytest
from runs import differing, held, joined, newest_tensors
from text import tiny_config, write_tokens
from torch import Tensor

from mpilm.comm.base import Comm, SelfComm
from mpilm.engine.step import train_step, validation_loss
from mpilm.telemetry.metrics import read_metrics
from mpilm.trainer.build import build_run
from mpilm.trainer.loop import train


@pytest.fixture
def shared(world: Comm, shared: Path) -> Path:
    """With the tokens in it."""
    if world.rank == 0:
        write_tokens(shared)
    world.barrier()
    return shared


@pytest.mark.parametrize("tie", [True, False])
def test_the_ranks_compute_what_one_computes(world: Comm, shared: Path, tie: bool) -> None:
    def outcome(comm: Comm, name: str) -> tuple[list[float], dict[str, Tensor]]:
        run = build_run(tiny_config(shared / "tokens", shared / name, model__tie_embeddings=tie, train__steps=4), comm)
        results = [train_step(run.model, run.batches, step) for step in range(4)]
        numbers = [number for result in results for number in (result.loss, result.grad_norm)]
        return [*numbers, validation_loss(run.model, run.batches, run.config.run.eval_batches)], joined([held(run.model)])

    together, alone = outcome(world, "together"), outcome(SelfComm(), f"alone-{world.rank}")
    assert together[0] == alone[0]
    assert differing(together[1], alone[1]) == []


def test_the_librarys_sum_is_close(world: Comm, shared: Path) -> None:
    def losses(reproducible: bool) -> list[float]:
        folder = shared / f"run-{reproducible}"
        run = build_run(tiny_config(shared / "tokens", folder, train__reproducible=reproducible), world)
        return [train_step(run.model, run.batches, step).loss for step in range(3)]

    assert losses(False) == pytest.approx(losses(True), rel=1e-5)


def test_a_run_that_is_gone_on_with(world: Comm, shared: Path) -> None:
    def train_to_end(name: str, *steps: int) -> tuple[list[float], dict[str, bytes]]:
        for until in steps:
            config = tiny_config(shared / "tokens", shared / name, train__steps=until, train__lr_schedule="constant")
            train(config, world)
        world.barrier()
        rows = read_metrics(shared / name / "metrics.jsonl")
        return [row["loss"] for row in rows if "loss" in row], newest_tensors(config)

    parts, whole = train_to_end("parts", 2, 5), train_to_end("whole", 5)
    assert len(whole[0]) == 5
    assert parts == whole
