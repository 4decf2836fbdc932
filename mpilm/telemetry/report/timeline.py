"""From a trace: the step of one pipeline as it was, and as `simulate` says it would be with the same costs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpilm.mesh.shape import AXES, MeshShape
from mpilm.parallel.pipeline.actions import COMPUTE, Action, ActionKind, parse_action
from mpilm.parallel.pipeline.simulate import Timeline, TimelineEvent, simulate
from mpilm.telemetry.report.rows import number

TRACED = ("forward", "backward", "reduce", "send", "receive")
MOST_EVENTS = 6000  # that a page can draw


@dataclass(frozen=True)
class Traced:
    """One step of one replica; times in milliseconds."""

    step: int
    ranks: tuple[int, ...]
    """Of the world, in the order of the pipeline."""
    measured: Timeline
    simulated: Timeline | None
    """None for a step without a pipeline, or if it cannot be: `why`."""
    why: str = ""

    @property
    def drawable(self) -> bool:
        return len(self.measured.events) <= MOST_EVENTS


def traced(trace: Mapping[str, Any]) -> Traced | None:
    """The last step that all ranks of the first replica have traced; None where there is none."""
    about = trace.get("mpilm")
    ranks = _replica(about.get("layout")) if isinstance(about, dict) else (0,)
    steps = _steps(trace["traceEvents"], ranks)
    whole = [step for step, by_rank in steps.items() if all(map(_any_drawn, (by_rank.get(rank, []) for rank in ranks)))]
    if not whole:
        return None
    step = max(whole)
    by_rank = [sorted(steps[step][rank], key=lambda event: event.start_s) for rank in ranks]
    measured = _measured(by_rank)
    if len(ranks) == 1:
        return Traced(step, ranks, measured, None)
    try:
        return Traced(step, ranks, measured, _simulated(by_rank))
    except (ValueError, KeyError) as error:
        return Traced(step, ranks, measured, None, f"It cannot be simulated: {error}.")


def _replica(layout: Any) -> tuple[int, ...]:
    """Ranks of the first replica: one for each place of the pipeline, at 0 of every other axis."""
    if not isinstance(layout, dict):
        return (0,)
    try:
        shape = MeshShape(**{axis: int(layout.get(axis, 1)) for axis in AXES})
    except (TypeError, ValueError):
        return (0,)
    return tuple(shape.rank({**dict.fromkeys(AXES, 0), "pipeline": place}) for place in range(shape.pipeline))


def _steps(events: Iterable[Any], ranks: Sequence[int]) -> dict[int, dict[int, list[TimelineEvent]]]:
    """step -> rank -> the actions traced; events that are not understood are left out."""
    place = {rank: i for i, rank in enumerate(ranks)}
    found: dict[int, dict[int, list[TimelineEvent]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        if not isinstance(event, dict) or event.get("cat") not in TRACED or event.get("pid") not in place:
            continue
        try:
            args, start_ms = event["args"], event["ts"] / 1000
            action = parse_action(args.get("action", event["name"]))
            end_ms = start_ms + event["dur"] / 1000
            found[args["step"]][event["pid"]].append(TimelineEvent(place[event["pid"]], action, start_ms, end_ms))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


def _measured(by_rank: Sequence[Sequence[TimelineEvent]]) -> Timeline:
    """The drawn events, from the first start on."""
    drawn = [[event for event in events if _takes_time(event.action)] for events in by_rank]
    first = min((event.start_s for events in drawn for event in events), default=0.0)
    return Timeline(
        tuple(tuple(TimelineEvent(e.rank, e.action, e.start_s - first, e.end_s - first) for e in events) for events in drawn)
    )


def _any_drawn(events: Sequence[TimelineEvent]) -> bool:
    return any(_takes_time(event.action) for event in events)


def _takes_time(action: Action) -> bool:
    return action.kind in (*COMPUTE, "REDUCE")


def _simulated(by_rank: Sequence[Sequence[TimelineEvent]]) -> Timeline:
    """The same order of actions, each as long as the median of its kind and stage; messages take no time."""
    lengths: dict[tuple[ActionKind, int], list[float]] = defaultdict(list)
    for events in by_rank:
        for event in events:
            if _takes_time(event.action):
                lengths[event.action.kind, event.action.stage].append(event.end_s - event.start_s)
    costs = {key: statistics.median(each) for key, each in lengths.items()}
    return simulate([[event.action for event in events] for events in by_rank], costs)


@dataclass(frozen=True)
class Waits:
    """Waiting for other ranks in one kind of call, a step and rank."""

    axis: str
    operation: str
    mean_ms: float
    most_ms: float
    """Of the rank that waits longest."""
    rank: int
    """That one."""
    calls: float
    sent_bytes: float


def waits(trace: Mapping[str, Any]) -> list[Waits]:
    """What the ranks waited for in the traced steps, longest first."""
    ms: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    calls: dict[tuple[str, str], int] = defaultdict(int)
    moved: dict[tuple[str, str], float] = defaultdict(float)
    steps, ranks = set(), set()
    for event in trace["traceEvents"]:
        if not isinstance(event, dict) or event.get("cat") not in ("step", "wait"):
            continue
        try:
            args, rank, length_ms = event["args"], int(event["pid"]), event["dur"] / 1000
            steps.add(args["step"])
            ranks.add(rank)
            if event["cat"] == "wait":
                key = str(args.get("axis", "")), str(event["name"])
                ms[key][rank] += length_ms
                calls[key] += 1
                moved[key] += number(args.get("bytes", 0))
        except (KeyError, TypeError, ValueError):
            continue
    each = max(1, len(steps) * len(ranks))
    found = []
    for key, by_rank in ms.items():
        rank = max(by_rank, key=lambda rank: by_rank[rank])
        found.append(Waits(*key, sum(by_rank.values()) / each, by_rank[rank] / max(1, len(steps)), rank,
                           calls[key] / each, moved[key] / each))  # fmt: skip
    return sorted(found, key=lambda each: -each.mean_ms)
