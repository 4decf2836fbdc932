"""The learning-rate schedule: a pure function of the step."""

import math

from mpilm.config.schema import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step `step`, counted from 0: linear warm-up, then the schedule down to min-lr."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    progress = min(1.0, (step + 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    remaining = 1.0 - progress if train.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * remaining
