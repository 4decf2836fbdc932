"""What this rank is doing: noted by its communicators and by the loop, read by the watchdog from another thread; and, for
whoever asks, how long everything took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

REMEMBERED = 32  # calls
PACKAGE = Path(__file__).parents[1]


class Call(NamedTuple):
    """Something said to other ranks. `number`: counted on its communicator; `waits_for`: ranks of the world that take part;
    `sent_bytes`: that this rank sends, or receives from one."""

    op: str
    axis: str
    number: int
    waits_for: Sequence[int]
    detail: str = ""
    sent_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.op} on {self.axis}, call {self.number}{', ' * bool(self.detail)}{self.detail}"


class Span(NamedTuple):
    """Something that took time, in seconds of time.monotonic: a call that was waited for, an action of a schedule, or what a
    word says."""

    what: object
    start_s: float
    end_s: float


def nothing(point: str, step: int) -> None:
    """At a point of the program where nothing is to happen."""


class Activity:
    """`phase` since when (time.monotonic), within `step`; the call that is being waited for, and the last ones.

    `at`: called at named points of the program; tests bring faults about there.
    """

    def __init__(self, at: Callable[[str, int], None] = nothing):
        self.step, self.phase, self.since = 0, "start", time.monotonic()
        self.longest_s: dict[str, float] = {}
        self.waiting: tuple[Call, float] | None = None
        self.calls: deque[Call] = deque(maxlen=REMEMBERED)
        self._spans: list[Span] | None = None
        self._at = at
        self._over = False

    def enter(self, phase: str, step: int) -> None:
        """A part of the run begins, and the one before has ended."""
        self._rest_if_over()
        lasted_s = time.monotonic() - self.since
        self.longest_s[self.phase] = max(lasted_s, self.longest_s.get(self.phase, 0.0))
        self.step, self.phase, self.since = step, phase, time.monotonic()

    def at(self, point: str) -> None:
        self._at(point, self.step)

    def wait(self, call: Call, finish: Callable[[], object]) -> None:
        """Do `finish`, which waits for other ranks."""
        self._rest_if_over()
        began_s = time.monotonic()
        self.waiting = call, began_s
        finish()
        self.waiting = None
        self._note(call, began_s)

    @contextmanager
    def span(self, what: object) -> Iterator[None]:
        """What is done meanwhile takes the time that `what` takes; one may lie in another."""
        began_s = time.monotonic()
        yield
        self._note(what, began_s)

    def take(self) -> list[Span]:
        """All that has ended since the last time it was asked for; the first time begins the keeping."""
        spans, self._spans = self._spans or [], []
        return spans

    def _note(self, what: object, began_s: float) -> None:
        if self._spans is not None:
            self._spans.append(Span(what, began_s, time.monotonic()))

    def end(self) -> None:
        """The end of this process has been decided, from another thread: what comes to life again must not go on."""
        self._over = True

    def _rest_if_over(self) -> None:
        while self._over:
            time.sleep(1.0)


def place(frame: FrameType | None) -> str:
    """The innermost line of this package that is not about communication."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and path.parent.name not in ("comm", "guard"):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "a place outside of mpilm"
