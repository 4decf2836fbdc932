"""What more ranks bring, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

from mpilm.config.schema import Config, microbatch_count
from mpilm.errors import ConfigError
from mpilm.planner.search import Candidate, Job, best

WORTH = 1.4  # times the speed, for twice the ranks: less is not worth them
LOST = {
    "bubble": "the pipeline idles",
    "communication": "ranks talk",
    "update": "weights are updated",
    "fixed": "nothing is done that more ranks could share",
}


@dataclass(frozen=True)
class Point:
    """The best layout of so many ranks; or why there is none."""

    ranks: int
    candidate: Candidate | None
    refusal: str = ""

    def speed(self, other: Point) -> float:
        """Times that of another."""
        assert self.candidate is not None
        assert other.candidate is not None
        return self.candidate.tokens_per_s / other.candidate.tokens_per_s

    def efficiency(self, first: Point) -> float:
        """What a rank does in a second, against the first point's."""
        return self.speed(first) * first.ranks / self.ranks


def curve(job: Job, counts: Sequence[int]) -> list[Point]:
    """The best layout for each number of ranks."""
    points = []
    for ranks in sorted(set(counts)):
        try:
            points.append(Point(ranks, best(job, ranks)))
        except ConfigError as error:
            points.append(Point(ranks, None, str(error)))
    return points


def in_words(points: Sequence[Point]) -> list[str]:
    """Where more ranks stop helping, and why."""
    working = [point for point in points if point.candidate is not None]
    if len(working) < 2:
        return []
    said = []
    for before, after in pairwise(working):
        wanted = WORTH ** log2(after.ranks / before.ranks)
        if after.speed(before) < wanted:
            said.append(
                f"from {before.ranks} to {after.ranks} ranks the speed grows {after.speed(before):.2f} times only: "
                + _why(before, after)
            )
    fastest = max(working, key=lambda point: point.candidate.tokens_per_s)  # type: ignore[union-attr]
    if fastest is not working[-1]:
        said.append(f"more than {fastest.ranks} ranks make it slower")
    elif not said:
        part = f"{100 * working[-1].efficiency(working[0]):.0f}%"
        said.append(
            f"every rank up to {working[-1].ranks} is worth having: {part} of the speed a rank has at {working[0].ranks}"
        )
    return said


def _why(before: Point, after: Point) -> str:
    """What takes the larger part of the step than it did."""
    assert before.candidate is not None
    assert after.candidate is not None
    then, now = before.candidate.time, after.candidate.time
    grown = {name: now.parts[name] / now.total_s - then.parts[name] / then.total_s for name in LOST}
    name = max(grown, key=grown.__getitem__)
    shares = (
        f"{100 * then.parts[name] / then.total_s:.0f}% of the step before, {100 * now.parts[name] / now.total_s:.0f}% after"
    )
    uneven = _uneven(after)
    if uneven < 0.9 and grown[name] < 1 - uneven:
        count, replicas = microbatch_count(after.candidate.config), after.candidate.setting.shape.data
        return (
            f"the batch is too small: {count} microbatches do not share out over {replicas} replicas, which work "
            f"{100 * uneven:.0f}% of the time"
        )
    if grown[name] > 0.02:
        return f"{name}: {LOST[name]} for {shares}; {_work(after.candidate.config, after)}"
    return f"computing itself: the cores of a node are shared; {_work(after.candidate.config, after)}"


def _uneven(point: Point) -> float:
    assert point.candidate is not None
    count, replicas = microbatch_count(point.candidate.config), point.candidate.setting.shape.data
    return count / (replicas * -(-count // replicas))


def _work(config: Config, point: Point) -> str:
    tokens = config.train.global_batch * config.model.context_length / point.ranks
    return f"there are {tokens:,.0f} tokens a rank and step"
