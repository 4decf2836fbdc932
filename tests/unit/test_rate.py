"""The learning rate by its closed forms, and AdamW against torch's own."""

import math

import pytest
import torch

from mpilm.config import Train
from mpilm.optim.adamw import MOMENTS, AdamW
from mpilm.optim.rate import learning_rate
from mpilm.parallel.flat import FlatParameters
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


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_adamw_is_torchs_with_decay_on_matrices_only(decay):
    settings = train(weight_decay=decay)
    flat = FlatParameters(resolve(SHAPES, {}), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    flat.values.copy_(torch.randn(flat.values.numel(), generator=generator))
    theirs = {name: value.clone().requires_grad_() for name, value in flat.by_name.items()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=1e-8)
    ours = AdamW(flat, settings)
    for step in range(20):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for group in reference.param_groups:
            group["lr"] = learning_rate(settings, step)
        reference.step()
        ours.step(gradients, learning_rate(settings, step))
    for name, parameter in theirs.items():
        torch.testing.assert_close(flat.by_name[name], parameter.detach(), rtol=1e-5, atol=1e-7)
        for kind in MOMENTS:
            torch.testing.assert_close(ours.moments[kind][name], reference.state[parameter][kind], rtol=1e-5, atol=1e-7)


def test_decay_alone():
    """Without a gradient a matrix shrinks by lr x decay, a vector stays."""
    flat = FlatParameters(resolve(SHAPES, {}), torch.device("cpu"))
    for value in flat.by_name.values():
        value.fill_(1.0)
    optimizer = AdamW(flat, train(weight_decay=0.25))
    optimizer.step({name: torch.zeros(shape) for name, shape in SHAPES.items()}, lr=0.5)
    assert {name: float(value.unique()) for name, value in flat.by_name.items()} == {
        "embed": 0.875, "norm": 1.0, "mlp": 0.875, "last_norm": 1.0,
    }  # fmt: skip


def test_moments_that_are_put_back_go_on_where_they_were():
    def run(interrupted):
        flat = FlatParameters(resolve(SHAPES, {}), torch.device("cpu"))
        optimizer = AdamW(flat, train())
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            if interrupted and step == 3:
                kept = {kind: moment.clone() for kind, moment in optimizer.flat_moments.items()}
                optimizer = AdamW(flat, train())
                for kind, moment in kept.items():
                    optimizer.flat_moments[kind].copy_(moment)
                optimizer.set_step(3)
            optimizer.step({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}, 0.1)
        return flat.values

    assert torch.equal(run(interrupted=True), run(interrupted=False))
