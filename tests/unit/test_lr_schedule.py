"""The learning-rate schedule against its closed forms."""

import math

import pytest

from mpilm.config.schema import TrainConfig
from mpilm.optim.schedule import learning_rate


def train(**changes):
    return TrainConfig(**{"steps": 100, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_is_linear_up_to_the_peak(schedule):
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
def test_schedule_equals_its_closed_form(schedule, step, expected):
    assert learning_rate(train(lr_schedule=schedule), step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 0), (5, 5), (5, 50), (7, 6)])
def test_schedule_of_any_length_is_positive_and_falls(schedule, steps, warmup):
    settings = train(lr_schedule=schedule, steps=steps, warmup_steps=warmup)
    rates = [learning_rate(settings, step) for step in range(steps)]
    assert all(0 < rate <= 1.0 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
