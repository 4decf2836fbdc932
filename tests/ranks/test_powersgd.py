"""PowerSGD: fewer bytes for slow networks, and nothing lost for good."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from runs import CPU, build_train_model, small_config, train_on_threads
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.engine.hardware import detect_hardware
from mpilm.engine.step import train_step
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.powersgd import PowerSGDReducer
from mpilm.trainer import build, loop
from mpilm.verification.layouts import RandomTokens

SHAPES = {"a": (24, 40), "b": (40,), "c": (3, 2)}


def low_rank_matrix(rank, number):
    """Return a matrix of this rank; all have the same row space."""
    right = torch.randn(rank, 40, generator=torch.Generator().manual_seed(1))
    return torch.randn(24, rank, generator=torch.Generator().manual_seed(number + 10)) @ right


def reduce_compressed(size, rank, steps, gradient):
    """Return the sums of each step, equal on all ranks; `gradient(r, step)` is that of "a" on rank r."""

    def body(comm):
        flat = FlatParameters({name: ParamLayout(name, shape) for name, shape in SHAPES.items()}, CPU)
        sums = flat.zeros("gradients", [(0, flat.layout.numel)])
        reducer = PowerSGDReducer(comm, flat, sums, rank, seed=0)
        found = []
        for step in range(steps):
            flat.parameter("a", sums).copy_(gradient(comm.rank, step))
            flat.parameter("b", sums).fill_(comm.rank + step)
            flat.parameter("c", sums).fill_(1.0)
            reducer.finish()
            found.append({name: flat.parameter(name, sums).clone() for name in SHAPES})
        return found

    found = run_ranks(size, body)
    for theirs in found[1:]:
        assert all(torch.equal(own[name], other[name]) for own, other in zip(found[0], theirs) for name in SHAPES)
    return found[0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sum_of_low_rank_is_exact(size):
    (step,) = reduce_compressed(size, 4, 1, lambda r, step: low_rank_matrix(4, r))
    assert torch.allclose(step["a"], sum(low_rank_matrix(4, r) for r in range(size)), atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vectors_and_small_matrices_are_sent_uncompressed(size):
    found = reduce_compressed(size, 4, 2, lambda r, step: low_rank_matrix(4, r))
    assert [float(step["b"][0]) for step in found] == [sum(r + step for r in range(size)) for step in range(2)]
    assert torch.equal(found[0]["c"], torch.full((3, 2), float(size)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_compression_errors_are_sent_in_later_steps(size):
    """The mean over the steps of a constant gradient converges to it as 1/steps, even with rank 1 of 24."""
    gradients = [torch.randn(24, 40, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    errors = {}
    for steps in (40, 160):
        found = reduce_compressed(size, 1, steps, lambda r, step: gradients[r])
        mean = sum(step["a"] for step in found) / steps
        errors[steps] = float((mean - sum(gradients)).norm() / sum(gradients).norm())
    assert errors[40] < 0.7
    assert errors[160] < errors[40] / 2


def test_compressed_step_sends_fewer_bytes():
    def sent_bytes(comm, rank):
        config = small_config(model__d_model=64, parallel__powersgd_rank=rank, parallel__reduce="messages")
        model = build_train_model(config, InstrumentedComm(comm))
        train_step(model, RandomTokens(config), 0)
        return sum(model.replicas.sent_bytes.values())

    full, compressed = (run_ranks(2, lambda comm, rank=rank: sent_bytes(comm, rank))[0] for rank in (0, 2))
    assert compressed < full / 4


def test_rank_too_high_to_compress_sends_everything_uncompressed():
    numbers, _ = train_on_threads(2, small_config(parallel__powersgd_rank=500))
    uncompressed, _ = train_on_threads(2, small_config(train__reproducible=False))
    assert numbers == pytest.approx(uncompressed, rel=1e-5)


def test_ranks_with_unequal_threads_are_refused(tmp_path):
    config = tiny_config(write_tokens(tmp_path), tmp_path / "run", parallel__powersgd_rank=2)

    def detect_unequal(train, world):
        return replace(detect_hardware(train, world), threads=1 + world.rank)

    with (
        mock.patch.object(build, "detect_hardware", detect_unequal),
        pytest.raises(CollectiveError, match="with unequal threads or processors"),
    ):
        run_ranks(2, lambda comm: loop.train(config, comm))
