"""The spans that ranks record: the parts of a step, and RUN/trace-A-B.json, a Chrome trace of all ranks on one clock."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpilm.comm.base import Comm
from mpilm.comm.flight_recorder import CommCall, Span
from mpilm.mesh.mesh import Mesh
from mpilm.parallel.pipeline.actions import COMPUTE, Action

CATEGORIES = ("compute", "bubble", "communication", "data", "optimizer")
PINGS = 16  # the one with the shortest round trip counts
ACTION_CATEGORIES = {"F": "forward", "REDUCE": "reduce", "SEND": "send", "RECV": "receive"}  # B, I and W: "backward"


def _categorize(event: object, pipelined: bool) -> str:
    """Return the part of a step that an event belongs to. Communication is exposed time: waiting for messages and slower ranks,
    and adding gradients. The bubble is waiting for other stages of a pipeline, also where all ranks meet at a step's end."""
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
        category = _categorize(event, pipelined)
        seconds[category] = seconds.get(category, 0.0) + end_s - start_s
        if outer:
            seconds[outer[-1][1]] -= end_s - start_s
        outer.append((end_s, category))
    return {category: seconds[category] for category in CATEGORIES}


class Trace:
    """The spans of this rank in the steps `steps`, counted from 1, until they are written."""

    def __init__(self, steps: range, mesh: Mesh, layout: dict[str, Any]):
        self.steps, self.mesh, self.layout = steps, mesh, layout
        self._before: ClockOffset | None = None
        self._spans: list[tuple[int, list[Span]]] = []

    def begin_step(self, step: int) -> None:
        """Compare clocks at the first traced step. Called before every step. Collective."""
        if self._before is None and step in self.steps:
            self._before = measure_clock_offset(self.mesh.world)

    def add_step(self, step: int, spans: list[Span]) -> None:
        """Record the spans of a step, and one around them."""
        if spans and self._before is not None and step in self.steps:
            around = Span("step", min(span.start_s for span in spans), max(span.end_s for span in spans))
            self._spans.append((step, [around, *spans]))

    def add_after_step(self, step: int, spans: list[Span]) -> None:
        """Record how long checkpoint and evaluation after a step took, without the spans within them."""
        if self._spans and self._spans[-1][0] == step:
            self._spans.append((step, [span for span in spans if isinstance(span.event, str)]))

    def write(self, folder: Path) -> str:
        """Write the spans of all ranks into one file, if any; return a line about it on rank 0. Collective."""
        world, before = self.mesh.world, self._before
        if before is None or not self._spans:
            return ""
        first, last = self._spans[0][0], self._spans[-1][0]
        after, began_s = measure_clock_offset(world), world.broadcast_json(before.at_s)
        clock_error_us = round(1e6 * max(world.all_gather_json(max(before.error_s, after.error_s))), 3)

        def to_us(at_s: float) -> float:
            """Convert to microseconds of the trace, in eighths, whose sums are exact: viewers add up start and duration, and
            drop events that end after the one around them."""
            return round(8e6 * (to_root_time(before, after, at_s) - began_s)) / 8

        rank = {"pid": self.mesh.rank, "tid": 0}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", **rank, "args": {"name": f"rank {self.mesh.rank} ({socket.gethostname()})"}},
            {"ph": "M", "name": "process_sort_index", **rank, "args": {"sort_index": self.mesh.rank}},
        ]
        events += [event for step, spans in self._spans for span in spans for event in self._span_events(step, span, to_us)]
        about = {"steps": [first, last], "ranks": world.size, "layout": self.layout, "clock_error_us": clock_error_us}
        self._before, self._spans = None, []
        return _write_all(folder / f"trace-{first}-{last}.json", ",\n".join(map(json.dumps, events)), json.dumps(about), world)

    def _span_events(self, step: int, span: Span, to_us: Callable[[float], float]) -> Iterator[dict[str, Any]]:
        """Yield the event of a span and, for an action that sends or needs a message, its end of the arrow between stages."""
        what, name, category, args = span.event, str(span.event), str(span.event), {}
        if isinstance(what, CommCall):
            name, category = what.op, "wait"
            args = {"axis": what.axis, "call": what.number, "bytes": what.sent_bytes}
            args |= {"peer": what.peers[0]} if len(what.peers) == 1 else {}
        if isinstance(what, Action):
            category = ACTION_CATEGORIES.get(what.kind.partition("_")[0], "backward")
            args = {"action": name, "stage": what.stage}
            args |= {} if what.microbatch is None else {"microbatch": what.microbatch}
        rank, start_us = {"pid": self.mesh.rank, "tid": 0}, to_us(span.start_s)
        times = {"ts": start_us, "dur": to_us(span.end_s) - start_us}
        yield {"ph": "X", "name": name, "cat": category, **rank, **times, "args": {"step": step, **args}}
        if isinstance(what, Action) and what.message is not None:
            sends = what.kind in ("SEND_F", "SEND_B")
            if sends or what.input_receive(len(self.layout["cut"])):
                message = f"{what.message.stage}{what.message.direction}{what.message.microbatch}"
                replica = f"{self.mesh.coordinate['data']}.{self.mesh.coordinate['tensor']}"
                arrow = {"name": "message", "cat": "message", "id": f"{step}.{replica}.{message}"}
                yield {**({"ph": "s"} if sends else {"ph": "f", "bp": "e"}), **arrow, **rank, "ts": start_us}


def _write_all(path: Path, events: str, about: str, world: Comm) -> str:
    """Write all ranks' events into one file, rank after rank: rank 0 never holds all. Return a line about it. Collective."""
    data = torch.frombuffer(bytearray(events.encode()), dtype=torch.uint8)
    sizes = world.all_gather_json(data.numel())
    if world.rank > 0:
        world.isend(data, 0).wait()
        return ""

    def receive_parts() -> Iterator[bytes]:
        yield data.numpy().tobytes()
        for rank, size in enumerate(sizes[1:], start=1):
            part = torch.empty(size, dtype=torch.uint8)
            world.irecv(part, rank).wait()
            yield part.numpy().tobytes()

    parts, temporary = receive_parts(), path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(f'{{"displayTimeUnit": "ms", "mpilm": {about},\n"traceEvents": [\n'.encode())
            for number, part in enumerate(parts):
                file.write((b",\n" if number else b"") + part)
            file.write(b"\n]}\n")
        os.replace(temporary, path)
    except OSError as error:
        for _ in parts:  # the other ranks wait until rank 0 has received theirs
            pass
        return f"no trace: {path} cannot be written: {error.strerror}"
    return f"wrote {path}"


class ClockOffset(NamedTuple):
    """A comparison of this rank's time.monotonic() with rank 0's."""

    at_s: float  # when, by this rank's clock
    ahead_s: float  # seconds to add to this rank's time to get rank 0's
    error_s: float  # the most that `ahead_s` is wrong by


def measure_clock_offset(world: Comm, now: Callable[[], float] = time.monotonic) -> ClockOffset:
    """Compare clocks by messages from one rank of each node to rank 0: the ranks of a node have one clock. Collective."""
    node = world.split_node("clock")
    first = node.all_gather_json(world.rank)[0]
    offset = [0.0, 0.0]
    for other in sorted(set(world.all_gather_json(first)) - {0}):
        if world.rank == 0:
            for _ in range(PINGS):
                world.irecv(torch.zeros(1, dtype=torch.float64), other).wait()
                world.isend(torch.tensor([now()], dtype=torch.float64), other).wait()
        elif world.rank == other:
            offset = _ping(world, now)
    return ClockOffset(now(), *node.broadcast_json(offset))


def to_root_time(before: ClockOffset, after: ClockOffset, at_s: float) -> float:
    """Convert this rank's time to rank 0's, interpolating between two offsets because clocks run at different speeds."""
    fraction = (at_s - before.at_s) / (after.at_s - before.at_s) if after.at_s > before.at_s else 0.0
    return at_s + before.ahead_s + fraction * (after.ahead_s - before.ahead_s)


def _ping(world: Comm, now: Callable[[], float]) -> list[float]:
    """Return how far rank 0's clock is ahead of this one, and half of the round trip as the error."""
    estimates = []
    for _ in range(PINGS):
        root_s = torch.zeros(1, dtype=torch.float64)
        answer = world.irecv(root_s, 0)  # posted before the ping, so that the answer is not delayed
        sent_s = now()
        ping = world.isend(torch.zeros(1, dtype=torch.float64), 0)
        answer.wait()
        received_s = now()
        ping.wait()
        estimates.append(((received_s - sent_s) / 2, float(root_s) - (sent_s + received_s) / 2))
    error_s, ahead_s = min(estimates)
    return [ahead_s, error_s]
