"""RUN/trace-A-B.json: what every rank did in steps A to B, on one clock, in the Chrome trace format, which Perfetto opens."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mpilm.comm.base import Comm
from mpilm.comm.progress import CommCall, Span
from mpilm.mesh.mesh import Mesh
from mpilm.parallel.pipeline.actions import Action
from mpilm.telemetry.clock import Offset, between, clock_offset

CATEGORIES = {
    "F": "forward", "B": "backward", "I": "backward", "W": "backward", "REDUCE": "reduce",
    "SEND_F": "send", "SEND_B": "send", "RECV_F": "receive", "RECV_B": "receive",
}  # fmt: skip
Event = dict[str, Any]


class Trace:
    """The spans of the steps `steps` on this rank, until they are written; of other steps nothing is kept."""

    def __init__(self, steps: range, mesh: Mesh, layout: dict[str, Any]):
        self.steps, self.mesh, self.layout = steps, mesh, layout
        self.before: Offset | None = None
        self.spans: list[tuple[int, list[Span]]] = []

    def ready(self, done: int) -> None:
        """Called before each step, by its number: compares clocks where the first traced one begins. Collective."""
        if self.before is None and done in self.steps:
            self.before = clock_offset(self.mesh.world)

    def keep(self, done: int, spans: list[Span]) -> None:
        """What a step was made of."""
        if spans:
            whole = Span("step", min(span.start_s for span in spans), max(span.end_s for span in spans))
            self._keep(done, [whole, *spans])

    def keep_after(self, done: int, spans: list[Span]) -> None:
        """What came after a step: how long checkpoint and evaluation took, not what they were made of."""
        if self.spans and self.spans[-1][0] == done:
            self._keep(done, [span for span in spans if isinstance(span.event, str)])

    def _keep(self, done: int, spans: list[Span]) -> None:
        if self.before is not None and done in self.steps:
            self.spans.append((done, spans))

    def write(self, folder: Path) -> str:
        """One file of what all ranks have kept, if there is any; returns what to say of it, on rank 0. Collective."""
        if self.before is None or not self.spans:
            return ""
        first, last = self.spans[0][0], self.spans[-1][0]
        after, began_s = clock_offset(self.mesh.world), self.mesh.world.broadcast_json(self.before.at_s)
        error_s = max(self.mesh.world.all_gather_json(max(self.before.error_s, after.error_s)))
        lines = [json.dumps(event) for event in self._events(self.before, after, began_s)]
        about = {
            "steps": [first, last], "ranks": self.mesh.world.size, "layout": self.layout,
            "clock_error_us": round(1e6 * error_s, 3),
        }  # fmt: skip
        self.before, self.spans = None, []
        return _write_all(folder / f"trace-{first}-{last}.json", ",\n".join(lines), json.dumps(about), self.mesh.world)

    def _events(self, before: Offset, after: Offset, began_s: float) -> list[Event]:
        """`began_s`: when the trace begins, by the clock of rank 0."""

        def microseconds(at_s: float) -> float:
            """In eighths, whose sums are exact: viewers add up begin and length, and drop what ends after what it lies in."""
            return round(8e6 * (between(before, after, at_s) - began_s)) / 8

        rank, replica = self.mesh.rank, self.mesh.coordinate["data"]
        found = [_named("process_name", rank, f"rank {rank} ({socket.gethostname()})"), _sorted_by_rank(rank)]
        for step, spans in self.spans:
            for span in spans:
                found += _events_of(rank, step, f"{step}.{replica}", len(self.layout["cut"]), span, microseconds)
        return found


def _named(what: str, rank: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": rank, "tid": 0, "args": {"name": name}}


def _sorted_by_rank(rank: int) -> Event:
    return {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}


def _event(
    rank: int, step: int, span: Span, name: str, category: str, microseconds: Callable[[float], float], **args: Any
) -> Event:
    begun = microseconds(span.start_s)
    return {
        "ph": "X", "name": name, "cat": category, "pid": rank, "tid": 0, "ts": begun,
        "dur": microseconds(span.end_s) - begun, "args": {"step": step, **args},
    }  # fmt: skip


def _events_of(
    rank: int, step: int, replica: str, stages: int, span: Span, microseconds: Callable[[float], float]
) -> list[Event]:
    """The event of a span and, where it sends a message to another stage or needs one, an end of the arrow between the two."""
    what = span.event
    if isinstance(what, CommCall):
        peer = {"peer": what.peers[0]} if len(what.peers) == 1 else {}
        said = {"axis": what.axis, "call": what.number, "bytes": what.sent_bytes, **peer}
        return [_event(rank, step, span, what.op, "wait", microseconds, **said)]
    if not isinstance(what, Action):
        return [_event(rank, step, span, str(what), str(what), microseconds)]
    said = {"action": str(what), "stage": what.stage}
    said |= {} if what.microbatch is None else {"microbatch": what.microbatch}
    event = _event(rank, step, span, str(what), CATEGORIES[what.kind], microseconds, **said)
    end = {"ph": "s"} if what.kind in ("SEND_F", "SEND_B") else {"ph": "f", "bp": "e"} if what.receive(stages) else {}
    if not end or what.message is None:
        return [event]
    message = f"{replica}.{what.message.stage}{what.message.direction}{what.message.microbatch}"
    return [event, {**end, "name": "message", "cat": "message", "id": message, "pid": rank, "tid": 0, "ts": event["ts"]}]


def _write_all(path: Path, mine: str, about: str, world: Comm) -> str:
    """Rank 0 writes the events of each rank as they come, and so never holds those of all; says how it went. Collective."""
    data = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8)
    sizes = world.all_gather_json(data.numel())
    if world.rank > 0:
        world.isend(data, 0).wait()
        return ""
    parts = _received(data, sizes, world)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(f'{{"displayTimeUnit": "ms", "mpilm": {about},\n"traceEvents": [\n'.encode())
            for number, part in enumerate(parts):
                file.write((b",\n" if number else b"") + part)
            file.write(b"\n]}\n")
        os.replace(temporary, path)
    except OSError as error:
        for _ in parts:  # the others wait until theirs has been taken
            pass
        return f"no trace: {path} cannot be written: {error.strerror}"
    return f"traced {path}"


def _received(mine: torch.Tensor, sizes: Sequence[int], world: Comm) -> Iterator[bytes]:
    yield mine.numpy().tobytes()
    for rank, size in enumerate(sizes[1:], start=1):
        theirs = torch.empty(size, dtype=torch.uint8)
        world.irecv(theirs, rank).wait()
        yield theirs.numpy().tobytes()
