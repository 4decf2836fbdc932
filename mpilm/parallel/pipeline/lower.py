"""From a schedule of compute actions to the program a rank executes: communication is added where it is due."""

from __future__ import annotations

from collections.abc import Sequence

from mpilm.parallel.pipeline.actions import Action


def lower(actions: Sequence[Action]) -> list[Action]:
    """The actions of one rank with REDUCE after the last backward of each stage."""
    last = {action.stage: i for i, action in enumerate(actions) if action.kind == "B"}
    program: list[Action] = []
    for i, action in enumerate(actions):
        program.append(action)
        if last.get(action.stage) == i:
            program.append(Action(action.stage, "REDUCE"))
    return program
