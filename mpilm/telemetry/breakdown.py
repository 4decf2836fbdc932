"""What the time of a step went into, from the spans that a rank has kept (comm/activity.py)."""

from __future__ import annotations

from collections.abc import Iterable

from mpilm.comm.progress import CommCall, Span
from mpilm.parallel.pipeline.actions import COMPUTE, Action

PARTS = ("compute", "bubble", "communication", "data", "optimizer")


def part_of(what: object, pipelined: bool) -> str:
    """The part of a step that a span belongs to.

    Communication is what training stands still for: waiting for messages and for slower ranks, and the adding of gradients.
    The bubble is the waiting for other stages of a pipeline, also at the end of a step, where all ranks meet.
    """
    if isinstance(what, Action):
        return "compute" if what.kind in COMPUTE else "communication"
    if isinstance(what, CommCall):
        return "bubble" if what.axis == "pipeline" or (pipelined and what.axis == "world") else "communication"
    return str(what)


def breakdown(spans: Iterable[Span], pipelined: bool) -> dict[str, float]:
    """Seconds of each of PARTS. What lies within another span counts for itself, and not for the outer one (with ZeRO-3 a
    forward waits for weights)."""
    seconds = dict.fromkeys(PARTS, 0.0)
    open_until: list[tuple[float, str]] = []
    for what, start_s, end_s in sorted(spans, key=lambda span: (span.start_s, -span.end_s)):
        while open_until and open_until[-1][0] <= start_s:
            open_until.pop()
        part = part_of(what, pipelined)
        seconds[part] = seconds.get(part, 0.0) + end_s - start_s
        if open_until:
            seconds[open_until[-1][1]] -= end_s - start_s
        open_until.append((end_s, part))
    return {part: seconds[part] for part in PARTS}
