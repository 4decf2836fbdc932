"""What a run remembers of its steps: which changed nothing, and how high a loss may be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mpilm.config import Train

REMEMBERED = 64  # losses
LEAST = 16  # of them before one can be a spike
SIGMA = 1.4826  # standard deviations in a median absolute deviation, of a normal distribution
NARROWEST = 0.01  # of the median, where the losses hardly differ


@dataclass
class History:
    """Part of every checkpoint, and the same on all ranks. `skipped`: steps that changed nothing, or whose changes were taken
    back; `bad`: those that were not finite or a spike; `losses`: the last ones of the other steps."""

    skipped: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @staticmethod
    def of(trainer: Mapping[str, Any]) -> History:
        """As trainer.json of a checkpoint has it."""
        skipped = trainer.get("skipped", [])
        return History(list(skipped), list(trainer.get("bad", skipped)), list(trainer.get("losses", [])))

    def words(self) -> dict[str, Any]:
        """For trainer.json."""
        return asdict(self)

    def note(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-REMEMBERED:]

    def limit(self, train: Train) -> float:
        """The highest loss that is no spike."""
        if train.on_spike == "ignore" or len(self.losses) < LEAST:
            return math.inf
        middle = statistics.median(self.losses)
        deviation = SIGMA * statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + train.spike_factor * max(deviation, NARROWEST * middle)

    def leave_out(self, step: int) -> None:
        """This step changed nothing."""
        self.skipped.append(step)
        self.bad.append(step)

    def rewind(self, before: History, done: int, step: int) -> None:
        """The state after `done` steps came back, with what was remembered then; all from there to `step` are left out."""
        self.skipped = [*before.skipped, *range(done + 1, step + 1)]
        self.bad.append(step)
        self.losses = before.losses
