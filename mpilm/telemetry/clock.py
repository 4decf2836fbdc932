"""One clock for all ranks: how far each rank's own is from rank 0's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from mpilm.comm.base import Comm

Clock = Callable[[], float]
ASKED = 16  # times; the answer that took least counts


class Offset(NamedTuple):
    """`ahead_s`: to be added to this rank's time.monotonic() to have that of rank 0; it is wrong by `error_s` at most."""

    at_s: float
    ahead_s: float
    error_s: float


def clock_offset(world: Comm, now: Clock = time.monotonic) -> Offset:
    """Asked over messages, by one rank of each node, since a node has one clock (Cristian, Probabilistic clock synchronization,
    1989). Collective."""
    node = world.split_node("node of a clock")
    first = node.all_gather_json(world.rank)[0]
    ahead = [0.0, 0.0]
    for other in sorted(set(world.all_gather_json(first)) - {0}):
        if world.rank == 0:
            _answer(world, other, now)
        elif world.rank == other:
            ahead = _ask(world, now)
    return Offset(now(), *node.broadcast_json(ahead))


def between(before: Offset, after: Offset, at_s: float) -> float:
    """This rank's time `at_s` as rank 0's clock has it, by the offsets at two times: clocks run at different speeds."""
    part = (at_s - before.at_s) / (after.at_s - before.at_s) if after.at_s > before.at_s else 0.0
    return at_s + before.ahead_s + part * (after.ahead_s - before.ahead_s)


def _ask(world: Comm, now: Clock) -> list[float]:
    """How far the clock of rank 0 is ahead of this one, and half of the time that the answer took."""
    answers = []
    for _ in range(ASKED):
        theirs = torch.zeros(1, dtype=torch.float64)
        answer = world.irecv(theirs, 0)  # before it is asked for, so that it comes without delay
        asked_s = now()
        question = world.isend(torch.zeros(1, dtype=torch.float64), 0)
        answer.wait()
        answered_s = now()
        question.wait()
        answers.append(((answered_s - asked_s) / 2, float(theirs) - (asked_s + answered_s) / 2))
    error_s, ahead_s = min(answers)
    return [ahead_s, error_s]


def _answer(world: Comm, other: int, now: Clock) -> None:
    for _ in range(ASKED):
        world.irecv(torch.zeros(1, dtype=torch.float64), other).wait()
        world.isend(torch.tensor([now()], dtype=torch.float64), other).wait()
