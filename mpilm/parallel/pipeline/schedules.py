"""Schedules: pure functions from sizes to the compute actions of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from mpilm.parallel.pipeline.actions import Action


def one_f_one_b(stages: int, microbatches: Sequence[int]) -> list[list[Action]]:
    """1F1B (Narayanan et al., arXiv 2006.09503): after a warm-up, a forward and a backward in turn; one list a stage.

    With one stage this is plain gradient accumulation.
    """
    return [_one_stage(stage, min(stages - 1 - stage, len(microbatches)), microbatches) for stage in range(stages)]


def _one_stage(stage: int, warm_up: int, microbatches: Sequence[int]) -> list[Action]:
    actions = [Action(stage, "F", m) for m in microbatches[:warm_up]]
    for done, m in enumerate(microbatches[warm_up:]):
        actions += [Action(stage, "F", m), Action(stage, "B", microbatches[done])]
    return actions + [Action(stage, "B", m) for m in microbatches[len(microbatches) - warm_up :]]
