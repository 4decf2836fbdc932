"""One traced step: the pipeline of the first replica as measured and as simulated, and the waits of all ranks."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpilm.mesh.shape import AXES, MeshShape
from mpilm.parallel.pipeline.actions import COMPUTE, ActionKind, parse_action
from mpilm.planner.simulate import Timeline, TimelineEvent, simulate
from mpilm.telemetry.metrics import to_float


class TracedStep(NamedTuple):
    """A step of the first replica. Times are in milliseconds."""

    step: int
    ranks: tuple[int, ...]  # world ranks, in pipeline order
    measured: Timeline
    simulated: Timeline | None  # None without a pipeline, or if it cannot be simulated
    error: str = ""  # why it cannot


def find_traced_step(trace: Mapping[str, Any]) -> TracedStep | None:
    """Return the last step that all ranks of the first replica traced; None if the trace holds none."""
    about = trace.get("mpilm")
    ranks = _first_replica(about.get("layout")) if isinstance(about, dict) else (0,)
    steps = _collect_events(trace["traceEvents"], ranks)
    step = max((n for n, events in steps.items() if all(any(map(_is_timed, events[rank])) for rank in ranks)), default=None)
    if step is None:
        return None
    by_rank = [sorted(steps[step][rank], key=lambda event: event.start_s) for rank in ranks]
    timed = [list(filter(_is_timed, events)) for events in by_rank]
    begin = min(events[0].start_s for events in timed)
    shifted = [tuple(TimelineEvent(e.rank, e.action, e.start_s - begin, e.end_s - begin) for e in events) for events in timed]
    measured = Timeline(tuple(shifted))
    try:
        return TracedStep(step, ranks, measured, _simulate_step(by_rank) if len(ranks) > 1 else None)
    except (ValueError, KeyError) as error:
        return TracedStep(step, ranks, measured, None, str(error))


def _first_replica(layout: Any) -> tuple[int, ...]:
    """Return the ranks of the first replica: one for each pipeline stage, at index 0 of every other axis."""
    try:
        shape = MeshShape(**{axis: int(layout.get(axis, 1)) for axis in AXES})
    except (AttributeError, TypeError, ValueError):
        return (0,)
    return tuple(shape.rank({**dict.fromkeys(AXES, 0), "pipeline": index}) for index in range(shape.pipeline))


def _collect_events(events: Iterable[Any], ranks: Sequence[int]) -> dict[int, dict[int, list[TimelineEvent]]]:
    """Return the traced actions as step -> rank -> events; malformed events are ignored."""
    stages = {rank: stage for stage, rank in enumerate(ranks)}
    steps: dict[int, dict[int, list[TimelineEvent]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        try:
            if event["pid"] in stages:
                args, start_ms = event["args"], event["ts"] / 1000
                action = parse_action(args.get("action", event["name"]))
                timed = TimelineEvent(stages[event["pid"]], action, start_ms, start_ms + event["dur"] / 1000)
                steps[int(args["step"])][event["pid"]].append(timed)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return steps


def _is_timed(event: TimelineEvent) -> bool:
    return event.action.kind in (*COMPUTE, "REDUCE")


def _simulate_step(by_rank: Sequence[Sequence[TimelineEvent]]) -> Timeline:
    """Simulate the same actions in the same order: each takes the median of its kind and stage, messages take no time."""
    lengths: dict[tuple[ActionKind, int], list[float]] = defaultdict(list)
    for event in (event for events in by_rank for event in events if _is_timed(event)):
        lengths[event.action.kind, event.action.stage].append(event.end_s - event.start_s)
    costs = {key: statistics.median(values) for key, values in lengths.items()}
    return simulate([[event.action for event in events] for events in by_rank], lambda kind, stage: costs[kind, stage])


def sum_waits(trace: Mapping[str, Any]) -> list[tuple[str, str, float, float, int, float, float]]:
    """Return the waits for other ranks in the traced steps, longest first. Each has axis, operation, mean milliseconds per step
    and rank, those of the rank that waits longest, this rank, and calls and bytes sent per step and rank."""
    calls: dict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)  # rank, milliseconds and bytes of each
    steps, ranks = set(), set()
    for event in trace["traceEvents"]:
        try:
            if event["cat"] in ("step", "wait"):
                args, rank, length_ms = event["args"], int(event["pid"]), event["dur"] / 1000
                steps.add(args["step"])
                ranks.add(rank)
                if event["cat"] == "wait":
                    key = str(args.get("axis", "")), str(event["name"])
                    calls[key].append((rank, length_ms, to_float(args.get("bytes", 0))))
        except (KeyError, TypeError, ValueError):
            continue
    waits, shares = [], len(steps) * len(ranks)
    for key, found in calls.items():
        by_rank: dict[int, float] = defaultdict(float)
        for rank, length_ms, _ in found:
            by_rank[rank] += length_ms
        slowest, sent_bytes = max(by_rank, key=by_rank.__getitem__), sum(nbytes for _, _, nbytes in found)
        times = sum(by_rank.values()) / shares, by_rank[slowest] / len(steps)
        waits.append((*key, *times, slowest, len(found) / shares, sent_bytes / shares))
    return sorted(waits, key=lambda wait: -wait[2])
