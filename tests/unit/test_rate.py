"""The learning rate by its closed forms, and AdamW against torch's own."""

import math

import pytest
import torch
from runs import CPU, differing, joined

from mpilm.config import Train
from mpilm.optim.adamw import MOMENTS, AdamW
from mpilm.optim.rate import learning_rate
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.layout import resolve

SHAPES = {"embed": (13, 8), "norm": (8,), "mlp": (24, 8), "last_norm": (5,)}


def train(**changes):
    return Train(**{"steps": 100, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_top(schedule):
    rates = [learning_rate(train(lr_schedule=schedule), step) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 10 for step in range(10)], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 10, 0.1 + 0.45 * (1 + math.cos(math.pi / 90))),
        ("cosine", 54, 0.55),
        ("cosine", 99, 0.1),
        ("linear", 10, 0.1 + 0.9 * 89 / 90),
        ("linear", 54, 0.55),
        ("linear", 99, 0.1),
        ("constant", 10, 1.0),
        ("constant", 99, 1.0),
        ("cosine", 500, 0.1),
        ("linear", 500, 0.1),
    ],
)
def test_closed_forms(schedule, step, expected):
    assert learning_rate(train(lr_schedule=schedule), step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 0), (5, 5), (5, 50), (7, 6)])
def test_odd_lengths_stay_within_bounds(schedule, steps, warmup):
    settings = train(lr_schedule=schedule, steps=steps, warmup_steps=warmup)
    rates = [learning_rate(settings, step) for step in range(steps)]
    assert all(0 < rate <= 1.0 for rate in rates)
    falls = rates[warmup:]
    assert falls == sorted(falls, reverse=True)


def parts(settings, zero=0, rank=0, ranks=1):
    """Parameters, their optimizer, and the vector in which it finds their gradients."""
    flat = FlatParameters(resolve(SHAPES, {}), CPU, zero, rank, ranks)
    return flat, AdamW({0: flat}, settings), FlatVector.zeros(flat.summed, CPU)


def fill(flat, vector, values):
    """Give each parameter's part of a vector its values, as far as they are held here."""
    for piece, view in flat.pieces(vector).items():
        view.copy_(values[piece.name].flatten()[piece.start : piece.stop])


def randoms(generator):
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_adamw_is_torchs_with_decay_on_matrices_only(decay):
    settings = train(weight_decay=decay)
    flat, ours, vector = parts(settings)
    generator = torch.Generator().manual_seed(0)
    fill(flat, flat.values, randoms(generator))
    theirs = {name: flat.parameter(name).clone().requires_grad_() for name in SHAPES}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=1e-8)
    for step in range(20):
        gradients = randoms(generator)
        fill(flat, vector, gradients)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for group in reference.param_groups:
            group["lr"] = learning_rate(settings, step)
        reference.step()
        ours.step({0: vector}, learning_rate(settings, step))
    for name, parameter in theirs.items():
        torch.testing.assert_close(flat.parameter(name), parameter.detach(), rtol=1e-5, atol=1e-7)
        for kind in MOMENTS:
            moment = flat.parameter(name, ours.moments[kind][0])
            torch.testing.assert_close(moment, reference.state[parameter][kind], rtol=1e-5, atol=1e-7)


def test_decay_alone():
    """Without a gradient a matrix shrinks by lr x decay, a vector stays."""
    flat, optimizer, gradients = parts(train(weight_decay=0.25))
    fill(flat, flat.values, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    optimizer.step({0: gradients}, lr=0.5)
    assert {name: float(flat.parameter(name).unique()) for name in SHAPES} == {
        "embed": 0.875, "norm": 1.0, "mlp": 0.875, "last_norm": 1.0,
    }  # fmt: skip


def updated(settings, zero, ranks, steps=3):
    """The bits of values and moments after some steps, from the shards of all ranks."""
    found = {}
    for rank in range(ranks):
        flat, optimizer, vector = parts(settings, zero, rank, ranks)
        generator = torch.Generator().manual_seed(3)
        fill(flat, flat.values, randoms(generator))
        for _ in range(steps):
            fill(flat, vector, randoms(generator))
            optimizer.step({0: vector}, 0.1)
        found[rank] = {"value": flat.pieces(flat.values), **optimizer.pieces()}
    return joined(list(found.values()))


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 30])
def test_an_update_in_shards_has_the_bits_of_the_whole_one(zero, ranks):
    """30 ranks: more than there is anything for."""
    assert differing(updated(train(), zero, ranks), updated(train(), zero=0, ranks=1)) == []


def test_moments_that_are_put_back_go_on_where_they_were():
    def run(interrupted):
        flat, optimizer, vector = parts(train())
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            if interrupted and step == 3:
                kept = {kind: {p: x.clone() for p, x in of.items()} for kind, of in optimizer.pieces().items()}
                optimizer = AdamW({0: flat}, train())
                for kind, of in optimizer.pieces().items():
                    for piece, moment in of.items():
                        moment.copy_(kept[kind][piece])
                optimizer.set_step(3)
            fill(flat, vector, randoms(generator))
            optimizer.step({0: vector}, 0.1)
        return flat.values.tensor

    assert torch.equal(run(interrupted=True), run(interrupted=False))
