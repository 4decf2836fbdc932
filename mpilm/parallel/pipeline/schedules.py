"""Schedules: pure functions from sizes to the compute actions of each rank of a pipeline, and to programs with communication.

`pipeline` ranks hold `chunks` stages each: stage = chunk * pipeline + rank. Microbatches count from 0. The backwards of a
stage always run in the order of the microbatches, so no schedule changes the order of a sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from mpilm.parallel.pipeline.actions import COMPUTE, WEIGHT_GRADIENT, Action, ActionKind

Schedule = list[list[Action]]


def gpipe(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965): every microbatch is in flight at once."""
    return _alternate(pipeline, chunks, microbatches, lambda rank: microbatches)


def one_f_one_b(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """1F1B (Narayanan et al., arXiv 2006.09503): after a warm-up, one forward and one backward in turn. Rank r keeps at most
    pipeline - r microbatches in flight. With one stage this is plain gradient accumulation."""
    return _alternate(pipeline, chunks, microbatches, lambda rank: pipeline - 1 - rank)


def interleaved(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """1F1B over several chunks per rank (Narayanan et al., arXiv 2104.04473, section 2.2): 1/chunks of the bubble."""
    warm_up = (chunks - 1) * pipeline
    return _alternate(pipeline, chunks, microbatches, lambda rank: warm_up + 2 * (pipeline - 1 - rank))


def zero_bubble(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241, section 2.3): 1F1B that defers weight gradients to where the pipeline would idle.
    Rank r defers W by r microbatches, so that no rank keeps more than `pipeline` microbatches in flight."""
    return [_split_backwards(actions, delay=rank) for rank, actions in enumerate(one_f_one_b(pipeline, chunks, microbatches))]


def forward_only(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """Forwards alone, for evaluation. Takes any sizes."""
    return [_group_actions("F", rank, pipeline, chunks, microbatches) for rank in range(pipeline)]


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = MappingProxyType(
    {"1f1b": one_f_one_b, "gpipe": gpipe, "interleaved": interleaved, "zero-bubble": zero_bubble}
)


def schedule(name: str, pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """Return the compute actions of each rank; raise ValueError where the schedule cannot have these sizes."""
    if problem := find_schedule_problem(name, pipeline, chunks, microbatches):
        raise ValueError(problem)
    return SCHEDULES[name](pipeline, chunks, microbatches)


def lower(actions: Sequence[Action], stages: int, real_microbatches: int | None = None) -> list[Action]:
    """Return the program of one rank: its compute actions and their communication, in a pipeline of `stages` stages in all. A
    receive is posted one compute action before the one that needs it, so that the message travels meanwhile; at most two are
    posted on a channel. A send follows the action that computed its data, REDUCE the last backward of its stage. Microbatches
    from number `real_microbatches` on are padding of a replica that has fewer than others: the rank computes them, for the
    collectives within, but sends nothing."""
    last = {action.stage: i for i, action in enumerate(actions) if action.kind in WEIGHT_GRADIENT}
    receives = [action.input_receive(stages) for action in actions]
    program: list[Action | None] = receives[:1]
    for i, action in enumerate(actions):
        program += [*receives[i + 1 : i + 2], action, action.output_send(stages)]
        if last.get(action.stage) == i:
            program.append(Action(action.stage, "REDUCE"))
    return [a for a in program if a is not None and (a.kind in COMPUTE or not a.is_padding(real_microbatches))]


def find_schedule_problem(name: str, pipeline: int, chunks: int, microbatches: int) -> str | None:
    """Return why the schedule cannot have these sizes and the nearest sizes that it can; None if it can."""
    if name not in SCHEDULES:
        return f"unknown schedule {name}; choose from {', '.join(SCHEDULES)}"
    for noun, value in (("ranks", pipeline), ("chunks", chunks), ("microbatches", microbatches)):
        if value < 1:
            return f"a pipeline needs 1 or more {noun}, not {value}"
    if name != "interleaved" and chunks > 1:
        return f"--parallel.chunks {chunks} needs --parallel.schedule interleaved; {name} has 1 chunk a rank"
    if name == "interleaved" and chunks < 2:
        return f"--parallel.schedule interleaved needs --parallel.chunks 2 or more, not {chunks}; one chunk a rank is 1f1b"
    if name == "interleaved" and microbatches % pipeline:
        below = microbatches // pipeline * pipeline
        nearest = f"{below} or {below + pipeline}" if below else f"{pipeline}"
        needed = f"a multiple of --parallel.pipeline {pipeline} microbatches on each replica"
        return f"--parallel.schedule interleaved needs {needed}, not {microbatches}; the nearest: {nearest}"
    return None


def analytic_bubble(
    name: str, pipeline: int, chunks: int, microbatches: int, costs: tuple[float, float, float, float] = (1, 2, 1, 1)
) -> float | None:
    """Return the bubble fraction of a schedule with equal stages, in closed form; None if no formula holds. `costs` are those
    of F, B, I and W. From arXiv 2104.04473, section 2.2 (1F1B, GPipe, interleaved), and arXiv 2401.10241, table 1 (ZB-H1: needs
    at least as many microbatches as ranks, and W no longer than I)."""
    forward, _, input_half, weight_half = costs
    idle, busy = float(pipeline - 1), float(chunks * microbatches)
    if name == "zero-bubble":
        if weight_half > input_half or microbatches < pipeline:
            return None
        idle, busy = idle * (forward + input_half - weight_half), busy * (forward + input_half + weight_half)
    return idle / (idle + busy)


def _alternate(pipeline: int, chunks: int, microbatches: int, warm_up: Callable[[int], int]) -> Schedule:
    """Return `warm_up(rank)` forwards, then one forward and one backward in turn, then the remaining backwards."""
    ranks: Schedule = []
    for rank in range(pipeline):
        forwards, backwards = (_group_actions(kind, rank, pipeline, chunks, microbatches) for kind in ("F", "B"))
        ahead = min(warm_up(rank), len(forwards))
        turns = [action for pair in zip(forwards[ahead:], backwards) for action in pair]
        ranks.append(forwards[:ahead] + turns + backwards[len(forwards) - ahead :])
    return ranks


def _group_actions(kind: ActionKind, rank: int, pipeline: int, chunks: int, microbatches: int) -> list[Action]:
    """Return one action per microbatch and chunk of a rank: `pipeline` microbatches through all chunks, then the next group."""
    stages = [chunk * pipeline + rank for chunk in range(chunks)]
    return [
        Action(stage, kind, microbatch)
        for first in range(0, microbatches, pipeline)
        for stage in (stages if kind == "F" else reversed(stages))
        for microbatch in range(first, min(first + pipeline, microbatches))
    ]


def _split_backwards(actions: list[Action], delay: int) -> list[Action]:
    """Replace each backward by I at once and W `delay` backwards later; the last Ws follow at the end."""
    split: list[Action] = []
    deferred: list[Action] = []
    for action in actions:
        if action.kind != "B":
            split.append(action)
            continue
        split.append(replace(action, kind="I"))
        deferred.append(replace(action, kind="W"))
        if len(deferred) > delay:
            split.append(deferred.pop(0))
    return split + deferred
