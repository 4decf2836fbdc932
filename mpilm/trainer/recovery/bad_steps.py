"""The bad steps of a run, and the loss above which a step is a spike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mpilm.config.schema import TrainConfig

WINDOW = 64  # losses remembered
MIN_LOSSES = 16  # before one can be a spike
MAD_TO_SIGMA = 1.4826  # standard deviations per median absolute deviation of a normal distribution
MIN_DEVIATION = 0.01  # of the median, if the losses hardly differ


@dataclass
class BadStepTracker:
    """Part of every checkpoint, and the same on all ranks."""

    skipped: list[int] = field(default_factory=list)  # steps that changed nothing, or whose changes were rewound
    bad: list[int] = field(default_factory=list)  # steps that were not finite, or a spike
    losses: list[float] = field(default_factory=list)  # the last losses of the other steps
    overflows: list[int] = field(default_factory=list)  # steps among the skipped ones that overflowed in float16

    @staticmethod
    def from_state(trainer: Mapping[str, Any]) -> BadStepTracker:
        """Return the tracker stored in a checkpoint's trainer.json."""
        skipped = trainer.get("skipped", [])
        lists = skipped, trainer.get("bad", skipped), trainer.get("losses", []), trainer.get("overflows", [])
        return BadStepTracker(*map(list, lists))

    def state_dict(self) -> dict[str, Any]:
        """Return what trainer.json stores."""
        return {key: value for key, value in asdict(self).items() if value or key != "overflows"}

    def record(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-WINDOW:]

    def spike_threshold(self, train: TrainConfig) -> float:
        """Return the highest loss that is not a spike."""
        if train.on_spike == "ignore" or len(self.losses) < MIN_LOSSES:
            return math.inf
        median = statistics.median(self.losses)
        deviation = MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in self.losses)
        return median + train.spike_factor * max(deviation, MIN_DEVIATION * median)

    def skip(self, step: int) -> None:
        """Record that this step changed nothing."""
        self.skipped.append(step)
        self.bad.append(step)

    def skip_overflow(self, step: int) -> None:
        """Record that the gradients of this step were too large for float16; the next loss scale is smaller."""
        self.skipped.append(step)
        self.overflows.append(step)

    def rewind(self, before: BadStepTracker, done: int, step: int) -> None:
        """Record that the state after `done` steps, stored with `before`, was restored: the steps up to `step` are skipped."""
        self.skipped = [*before.skipped, *range(done + 1, step + 1)]
        self.bad.append(step)
        self.losses = before.losses
