"""The flight recorder of one rank: the current phase, the call it waits for, and the time of everything it does.

Communicators and the training loop record it; the watchdog reads it from another thread.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

R = TypeVar("R")
RECENT_CALLS = 32
PACKAGE = Path(__file__).parents[1]


class CommCall(NamedTuple):
    """One communication call."""

    op: str
    axis: str  # name of the communicator
    number: int  # counted on that communicator
    peers: Sequence[int]  # world ranks that take part
    detail: str = ""
    sent_bytes: int = 0  # bytes that this rank sends, or receives from one peer

    def __str__(self) -> str:
        return f"{self.op} on {self.axis}, call {self.number}{', ' * bool(self.detail)}{self.detail}"


class Span(NamedTuple):
    """A period of time.monotonic() spent on an event: a CommCall, an action of a schedule, or a named activity."""

    event: object
    start_s: float
    end_s: float


class FlightRecorder:
    """The state of one rank, written by its main thread, and what the watchdog must know of its run."""

    def __init__(self) -> None:
        self.step, self.phase, self.since = -1, "start", time.monotonic()  # step: -1 before and between runs
        self.longest_s: dict[str, float] = {}  # longest duration of each phase so far
        self.waiting: tuple[CommCall, float] | None = None  # the pending call, and when it began
        self.calls: deque[CommCall] = deque(maxlen=RECENT_CALLS)
        self._spans: list[Span] | None = None
        self.progress, self.progressed_s = 0, time.monotonic()  # calls, phases and spans that have ended, and the last end
        self.step_timeout_s = 0.0  # stated limit of a step and of standing still; 0: none
        self.report_folder: Path | None = None  # for details of a hang; all ranks see it
        self.is_signalled: Callable[[], bool] = lambda: False
        self.is_aborting = False  # set by the watchdog before it aborts: a call that unblocks after this must not return

    def enter(self, phase: str, step: int = -1) -> None:
        """Begin a phase of the run, which ends the previous one. `step`: its number, for phases of which each step has one."""
        self.advance()
        self.longest_s[self.phase] = max(time.monotonic() - self.since, self.longest_s.get(self.phase, 0.0))
        self.step, self.phase, self.since = step, phase, time.monotonic()

    def advance(self) -> None:
        """Record that this rank has finished something. If the watchdog ends the job, this does not return."""
        while self.is_aborting:
            time.sleep(1.0)
        self.progress += 1
        self.progressed_s = time.monotonic()

    def wait(self, call: CommCall, finish: Callable[[], R]) -> R:
        """Return the result of `finish`, which waits for other ranks, and record its duration."""
        self.advance()
        self.waiting = call, time.monotonic()
        with self.span(call):
            result = finish()
        self.waiting = None
        return result

    @contextmanager
    def span(self, event: object) -> Iterator[None]:
        """Record the duration of the block as a span of `event`. Spans may nest."""
        start_s = time.monotonic()
        yield
        self.advance()
        if self._spans is not None:
            self._spans.append(Span(event, start_s, time.monotonic()))

    def drain_spans(self) -> list[Span]:
        """Return the spans that ended since the last call; the first call starts the recording."""
        spans, self._spans = self._spans or [], []
        return spans


def locate_caller(frame: FrameType | None) -> str:
    """Return file, line and function of the innermost frame of this package outside comm/, launch/ and testing/."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and path.parent.name not in ("comm", "launch", "testing"):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "code outside mpilm"
