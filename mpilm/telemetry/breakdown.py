"""Breakdown of a step's time by category, from the spans that a rank recorded (comm/progress.py)."""

from collections.abc import Iterable

from mpilm.comm.progress import CommCall, Span
from mpilm.parallel.pipeline.actions import COMPUTE, Action

CATEGORIES = ("compute", "bubble", "communication", "data", "optimizer")


def categorize(event: object, pipelined: bool) -> str:
    """Return the category of a span's event.

    Communication is exposed time: waiting for messages and for slower ranks, and adding gradients. The bubble is waiting for
    other stages of a pipeline, also at the end of a step, where all ranks synchronize.
    """
    if isinstance(event, Action):
        return "compute" if event.kind in COMPUTE else "communication"
    if isinstance(event, CommCall):
        return "bubble" if event.axis == "pipeline" or (pipelined and event.axis == "world") else "communication"
    return str(event)


def break_down(spans: Iterable[Span], pipelined: bool) -> dict[str, float]:
    """Return the seconds of each of CATEGORIES. A nested span counts only for itself: in ZeRO-3, forward waits for weights."""
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    outer: list[tuple[float, str]] = []  # end and category of the spans around the present one
    for event, start_s, end_s in sorted(spans, key=lambda span: (span.start_s, -span.end_s)):
        while outer and outer[-1][0] <= start_s:
            outer.pop()
        category = categorize(event, pipelined)
        seconds[category] = seconds.get(category, 0.0) + end_s - start_s
        if outer:
            seconds[outer[-1][1]] -= end_s - start_s
        outer.append((end_s, category))
    return {category: seconds[category] for category in CATEGORIES}
