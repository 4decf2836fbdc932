"""Walk the programs of all ranks at once, in one process: who does what when, who waits, and who would wait for ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mpilm.parallel.pipeline.actions import COMPUTE, Action, Kind, Message

Program = Sequence[Action]
Costs = Mapping[tuple[Kind, int], float] | Callable[[Kind, int], float]


@dataclass(frozen=True)
class Event:
    """Something that takes time on a rank: `action` itself, or waiting for what it needs."""

    rank: int
    action: Action
    start_s: float
    end_s: float
    waiting: bool = False


@dataclass(frozen=True)
class Timeline:
    """The events of each rank, in their order."""

    by_rank: tuple[tuple[Event, ...], ...]

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """All of them, rank by rank."""
        return tuple(event for events in self.by_rank for event in events)

    @property
    def ranks(self) -> int:
        return len(self.by_rank)

    @cached_property
    def chunks(self) -> int:
        """Stages of each rank."""
        return 1 + max((event.action.stage for event in self.events), default=0) // self.ranks

    @cached_property
    def step_s(self) -> float:
        """Seconds from the first start to the last end."""
        return max((event.end_s for event in self.events), default=0.0)

    @property
    def bubble(self) -> float:
        """The part of the time in which the average rank does not compute."""
        busy_s = sum(event.end_s - event.start_s for event in self.events if not event.waiting)
        return 1 - busy_s / self.ranks / self.step_s if self.step_s else 0.0

    def peak_live(self, rank: int) -> int:
        """The most microbatches alive at once, counted for each stage: forward begun, backward (with W) not ended."""
        done = [event.action for event in self.by_rank[rank] if not event.waiting]
        kinds = {action.kind for action in done}
        last = next(kind for kind in ("W", "B", "F") if kind in kinds or kind == "F")  # forward only: nothing is kept
        live = most = 0
        for action in done:
            live += action.kind == "F"
            most = max(most, live)
            live -= action.kind == last
        return most


def simulate(
    programs: Sequence[Program], costs: Costs, transfer_s: float = 0.0, present: int | None = None, blocking: bool = False
) -> Timeline:
    """The timeline of lowered programs, one a rank. `costs` gives the seconds of (kind, stage); REDUCE may be left out.

    A message travels for `transfer_s` once it is sent and its receive is posted (nothing is buffered). A compute action
    waits for its message; a SEND waits until the one before it on its channel has arrived or, when `blocking`, until it
    has itself. Microbatches from `present` on cost nothing. Raises ValueError saying who waits for what in a deadlock.
    """
    cost = _cost_function(costs)
    walk = _Walk(
        programs, lambda action: 0.0 if action.absent(present) else cost(action.kind, action.stage), transfer_s, blocking
    )
    while any(walk.advance(rank) for rank in range(len(programs))):
        pass
    walk.raise_if_stuck()
    return Timeline(tuple(map(tuple, walk.events)))


def _cost_function(costs: Costs) -> Callable[[Kind, int], float]:
    if callable(costs):
        return costs
    table = costs
    return lambda kind, stage: table.get((kind, stage), 0.0) if kind == "REDUCE" else table[kind, stage]


class _Walk:
    """How far each rank has come. Times depend on the programs alone, not on the order in which ranks are advanced."""

    def __init__(self, programs: Sequence[Program], cost: Callable[[Action], float], transfer_s: float, blocking: bool):
        self.programs, self.cost, self.transfer_s, self.blocking = programs, cost, transfer_s, blocking
        self.next = [0] * len(programs)
        self.clock_s = [0.0] * len(programs)
        self.events: list[list[Event]] = [[] for _ in programs]
        self.sent_s: dict[Message, float] = {}
        self.posted_s: dict[Message, float] = {}
        self.before: dict[tuple[int, str], Message] = {}  # the last message sent on each channel

    def advance(self, rank: int) -> bool:
        """Carry on until the rank has to wait; whether it did anything."""
        start = self.next[rank]
        while self.next[rank] < len(self.programs[rank]) and self._step(rank, self.programs[rank][self.next[rank]]):
            self.next[rank] += 1
        return self.next[rank] > start

    def awaited(self, action: Action) -> Message | None:
        """The message that has to arrive before the action is over (a blocking SEND) or begins (all others)."""
        message = action.message
        if message is None or action.kind in ("RECV_F", "RECV_B"):
            return None
        if action.kind in COMPUTE:
            return message if message in self.posted_s else None
        return message if self.blocking else self.before.get(message.channel)

    def _step(self, rank: int, action: Action) -> bool:
        message = action.message
        if message and self.blocking and action.kind in ("SEND_F", "SEND_B"):
            self.sent_s.setdefault(message, self.clock_s[rank])
        awaited = self.awaited(action)
        start_s = self.clock_s[rank]
        if awaited is not None:
            if awaited not in self.sent_s or awaited not in self.posted_s:
                return False
            start_s = max(start_s, self.sent_s[awaited] + self.transfer_s, self.posted_s[awaited] + self.transfer_s)
        if start_s > self.clock_s[rank]:
            self.events[rank].append(Event(rank, action, self.clock_s[rank], start_s, waiting=True))
        self.clock_s[rank] = start_s
        self._do(rank, action, message)
        return True

    def _do(self, rank: int, action: Action, message: Message | None) -> None:
        now_s = self.clock_s[rank]
        match action.kind:
            case "RECV_F" | "RECV_B":
                assert message is not None
                self.posted_s[message] = now_s
            case "SEND_F" | "SEND_B":
                assert message is not None
                self.sent_s.setdefault(message, now_s)
                self.before[message.channel] = message
            case _:
                self.clock_s[rank] += self.cost(action)
                self.events[rank].append(Event(rank, action, now_s, self.clock_s[rank]))

    def raise_if_stuck(self) -> None:
        stuck = []
        for rank, (i, program) in enumerate(zip(self.next, self.programs)):
            if i < len(program):
                awaited = self.awaited(program[i])
                assert awaited is not None
                missing = "send" if awaited not in self.sent_s else "receive"
                stuck.append(f"rank {rank} waits at {program[i]} for the {missing} of {_name(awaited)}")
        if stuck:
            raise ValueError("deadlock: " + "; ".join(stuck))


def _name(message: Message) -> str:
    what, origin = ("activation", message.stage - 1) if message.direction == "F" else ("gradient", message.stage + 1)
    return f"the {what} of microbatch {message.microbatch} from stage {origin} to stage {message.stage}"
