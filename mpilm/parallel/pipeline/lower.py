"""Lowering: add the communication to a schedule of compute actions, which gives the program that a rank executes."""

from collections.abc import Sequence

from mpilm.parallel.pipeline.actions import COMPUTE, WEIGHT_GRADIENT, Action


def lower(actions: Sequence[Action], stages: int, real_microbatches: int | None = None) -> list[Action]:
    """Return the program of one rank, from its compute actions, in a pipeline of `stages` stages in all.

    A receive is posted one compute action before the one that needs it, so that the message travels meanwhile; at most two
    receives are posted on a channel. A send follows the action that computed its data. REDUCE follows the last backward of
    its stage. Microbatches from number `real_microbatches` on are padding of a replica that has fewer than others: the rank
    computes them, for the collectives within, but sends nothing.
    """
    last = {action.stage: i for i, action in enumerate(actions) if action.kind in WEIGHT_GRADIENT}
    receives = [action.input_receive(stages) for action in actions]
    program: list[Action | None] = receives[:1]
    for i, action in enumerate(actions):
        program += [*receives[i + 1 : i + 2], action, action.output_send(stages)]
        if last.get(action.stage) == i:
            program.append(Action(action.stage, "REDUCE"))
    return [a for a in program if a is not None and (a.kind in COMPUTE or not a.is_padding(real_microbatches))]
