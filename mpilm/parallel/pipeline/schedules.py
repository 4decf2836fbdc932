"""Schedules: pure functions from sizes to the compute actions of each rank of a pipeline.

`pipeline` ranks hold `chunks` stages each: stage number = chunk * pipeline + rank. Microbatches count from 0. The
backwards of a stage always run in the order of the microbatches, so no schedule changes the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from mpilm.parallel.pipeline.actions import Action, Kind

Schedule = list[list[Action]]


def gpipe(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965): every microbatch is alive at once."""
    return _one_of_each(pipeline, chunks, microbatches, lambda rank: microbatches)


def one_f_one_b(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """1F1B (Narayanan et al., arXiv 2006.09503): after a warm-up, a forward and a backward in turn.

    Rank r holds pipeline - r microbatches at most. With one stage this is plain gradient accumulation.
    """
    return _one_of_each(pipeline, chunks, microbatches, lambda rank: pipeline - 1 - rank)


def interleaved(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """1F1B over several chunks a rank (Narayanan et al., arXiv 2104.04473, section 2.2): a bubble 1/chunks as large."""
    return _one_of_each(
        pipeline, chunks, microbatches, lambda rank: 2 * (pipeline - 1 - rank) + (chunks - 1) * pipeline
    )  # fmt: skip


def zero_bubble(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241, section 2.3): 1F1B whose weight gradients wait where the pipeline would idle.

    Rank r is r microbatches behind with W, so that no rank holds more than `pipeline` microbatches.
    """
    return [_split(actions, delay=rank) for rank, actions in enumerate(one_f_one_b(pipeline, chunks, microbatches))]


def forward_only(pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """Forwards alone, for evaluation; any sizes."""
    return [_in_groups("F", rank, pipeline, chunks, microbatches) for rank in range(pipeline)]


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = MappingProxyType(
    {"1f1b": one_f_one_b, "gpipe": gpipe, "interleaved": interleaved, "zero-bubble": zero_bubble}
)


def schedule(name: str, pipeline: int, chunks: int, microbatches: int) -> Schedule:
    """The compute actions of each rank; raises ValueError with the refusal where the sizes do not fit."""
    reason = refusal(name, pipeline, chunks, microbatches)
    if reason is not None:
        raise ValueError(reason)
    return SCHEDULES[name](pipeline, chunks, microbatches)


def refusal(name: str, pipeline: int, chunks: int, microbatches: int) -> str | None:
    """Why this schedule cannot work with these sizes, and the nearest that can; None where it works."""
    if name not in SCHEDULES:
        return f"there is no schedule {name}; there are {', '.join(SCHEDULES)}"
    for what, value in (("ranks", pipeline), ("chunks", chunks), ("microbatches", microbatches)):
        if value < 1:
            return f"a pipeline of {value} {what} does no work; the smallest number is 1"
    if name != "interleaved" and chunks > 1:
        return f"--parallel.chunks {chunks} needs --parallel.schedule interleaved; {name} has 1 chunk a rank"
    if name == "interleaved" and chunks < 2:
        return f"--parallel.schedule interleaved needs --parallel.chunks 2 or more, not {chunks}; one chunk a rank is 1f1b"
    if name == "interleaved" and microbatches % pipeline:
        below = microbatches // pipeline * pipeline
        nearest = f"{below} or {below + pipeline}" if below else f"{pipeline}"
        return (
            f"--parallel.schedule interleaved needs a multiple of --parallel.pipeline {pipeline} microbatches on each replica, "
            f"not {microbatches}; the nearest: {nearest}"
        )
    return None


def even_bubble(
    name: str, pipeline: int, chunks: int, microbatches: int, costs: tuple[float, float, float, float] = (1, 2, 1, 1)
) -> float | None:
    """The bubble of a schedule whose stages are all alike, in closed form; None where none is known.

    `costs` are those of F, B, I and W. From arXiv 2104.04473, section 2.2 (1F1B, GPipe, interleaved), and arXiv 2401.10241,
    table 1 (ZB-H1; it wants as many microbatches as ranks, and W no longer than I).
    """
    forward, _, half, weight = costs
    idle, busy = float(pipeline - 1), float(chunks * microbatches)
    if name == "zero-bubble":
        if weight > half or microbatches < pipeline:
            return None
        idle, busy = idle * (forward + half - weight), busy * (forward + half + weight)
    return idle / (idle + busy)


def _one_of_each(pipeline: int, chunks: int, microbatches: int, warm_up: Callable[[int], int]) -> Schedule:
    """After `warm_up(rank)` forwards a forward and a backward in turn, then the backwards that are left."""
    ranks: Schedule = []
    for rank in range(pipeline):
        forwards, backwards = (_in_groups(kind, rank, pipeline, chunks, microbatches) for kind in ("F", "B"))
        ahead = min(warm_up(rank), len(forwards))
        turns = [action for pair in zip(forwards[ahead:], backwards) for action in pair]
        ranks.append(forwards[:ahead] + turns + backwards[len(forwards) - ahead :])
    return ranks


def _in_groups(kind: Kind, rank: int, pipeline: int, chunks: int, microbatches: int) -> list[Action]:
    """One action for each microbatch and chunk of a rank: `pipeline` microbatches through every chunk, then the next ones."""
    stages = [chunk * pipeline + rank for chunk in range(chunks)]
    return [
        Action(stage, kind, microbatch)
        for first in range(0, microbatches, pipeline)
        for stage in (stages if kind == "F" else reversed(stages))
        for microbatch in range(first, min(first + pipeline, microbatches))
    ]


def _split(actions: list[Action], delay: int) -> list[Action]:
    """Each backward as I, and as W `delay` backwards later; what is left of W at the end."""
    split: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        if action.kind != "B":
            split.append(action)
            continue
        split.append(replace(action, kind="I"))
        waiting.append(replace(action, kind="W"))
        if len(waiting) > delay:
            split.append(waiting.pop(0))
    return split + waiting
