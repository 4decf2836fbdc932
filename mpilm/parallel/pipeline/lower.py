"""From a schedule of compute actions to the program a rank executes: communication is added where it is due."""

from __future__ import annotations

from collections.abc import Sequence

from mpilm.parallel.pipeline.actions import COMPUTE, WEIGHT_GRADIENT, Action


def lower(actions: Sequence[Action], stages: int, present: int | None = None) -> list[Action]:
    """The program of one rank of a pipeline of `stages` stages in all, from its compute actions.

    A receive is posted one compute action before the one that needs it, so that the message travels meanwhile: a channel
    has two receives posted at most. A send follows what made the data; REDUCE follows the last backward of its stage.
    Microbatches from number `present` on do not exist on this replica: they are computed, for the collectives within,
    but nothing is sent.
    """
    last = {action.stage: i for i, action in enumerate(actions) if action.kind in WEIGHT_GRADIENT}
    receives = [action.receive(stages) for action in actions]
    program: list[Action | None] = receives[:1]
    for i, action in enumerate(actions):
        program += [*receives[i + 1 : i + 2], action, action.send(stages)]
        if last.get(action.stage) == i:
            program.append(Action(action.stage, "REDUCE"))
    return [a for a in program if a is not None and (a.kind in COMPUTE or not a.absent(present))]
