"""Event-driven simulation of a step: the programs of all ranks in one process, with what each rank does when and waits for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mpilm.parallel.pipeline.actions import COMPUTE, Action, ActionKind, Message

Program = Sequence[Action]
ActionCosts = Callable[[ActionKind, int], float]  # seconds by kind and stage


@dataclass(frozen=True)
class TimelineEvent:
    """A stretch of time on a rank: an action, or the wait before it."""

    rank: int
    action: Action
    start_s: float
    end_s: float
    waiting: bool = False  # the rank waits for the message that `action` needs


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline: the events of each rank, in order of time."""

    by_rank: tuple[tuple[TimelineEvent, ...], ...]

    @cached_property
    def events(self) -> tuple[TimelineEvent, ...]:
        """All events, rank by rank."""
        return tuple(event for events in self.by_rank for event in events)

    @property
    def ranks(self) -> int:
        return len(self.by_rank)

    @cached_property
    def chunks(self) -> int:
        """Stages per rank."""
        return 1 + max((event.action.stage for event in self.events), default=0) // self.ranks

    @cached_property
    def step_s(self) -> float:
        """Seconds from the first start to the last end."""
        return max((event.end_s for event in self.events), default=0.0)

    @property
    def bubble(self) -> float:
        """The fraction of the step in which the average rank does not compute."""
        busy_s = sum(event.end_s - event.start_s for event in self.events if not event.waiting)
        return 1 - busy_s / self.ranks / self.step_s if self.step_s else 0.0

    def peak_in_flight(self, rank: int) -> int:
        """Return the most microbatches in flight at once, counted per stage: from forward to the end of backward (with W)."""
        actions = [event.action for event in self.by_rank[rank] if not event.waiting]
        last = next((kind for kind in "WB" if any(action.kind == kind for action in actions)), "F")  # forward only: at once
        in_flight = peak = 0
        for action in actions:
            in_flight += action.kind == "F"
            peak = max(peak, in_flight)
            in_flight -= action.kind == last
        return peak


def simulate(programs: Sequence[Program], costs: ActionCosts, transfer_s: float = 0.0) -> Timeline:
    """Return the timeline of lowered programs, one per rank; raise ValueError, naming who waits for what, on a deadlock. A
    message travels for `transfer_s` once it is sent and its receive is posted (nothing is buffered). A compute action waits for
    its message, a SEND until the one before it on its channel has arrived."""
    simulation = _Simulation(programs, costs, transfer_s)
    while any(simulation.advance(rank) for rank in range(len(programs))):
        pass
    simulation.check_finished()
    return Timeline(tuple(map(tuple, simulation.events)))


class _Simulation:
    """The next action and the clock of each rank. Times do not depend on the order in which ranks are advanced."""

    def __init__(self, programs: Sequence[Program], costs: ActionCosts, transfer_s: float):
        self.programs, self.costs, self.transfer_s = programs, costs, transfer_s
        self.next, self.clock_s = [0] * len(programs), [0.0] * len(programs)
        self.events: list[list[TimelineEvent]] = [[] for _ in programs]
        self.sent_s: dict[Message, float] = {}
        self.posted_s: dict[Message, float] = {}
        self.last_sent: dict[int, Message] = {}  # by channel

    def advance(self, rank: int) -> bool:
        """Execute actions until the rank has to wait; return whether it executed any."""
        start = self.next[rank]
        while self.next[rank] < len(self.programs[rank]) and self._execute(rank, self.programs[rank][self.next[rank]]):
            self.next[rank] += 1
        return self.next[rank] > start

    def check_finished(self) -> None:
        """Raise ValueError unless every rank has reached the end of its program."""
        stuck = []
        for rank, (i, program) in enumerate(zip(self.next, self.programs)):
            awaited = self._awaited(program[i]) if i < len(program) else None
            if awaited is not None:
                missing = "send" if awaited not in self.sent_s else "receive"
                tensor, source = ("activation", -1) if awaited.direction == "F" else ("gradient", 1)
                path = f"from stage {awaited.stage + source} to stage {awaited.stage}"
                what = f"the {missing} of the {tensor} of microbatch {awaited.microbatch} {path}"
                stuck.append(f"rank {rank} waits at {program[i]} for {what}")
        if stuck:
            raise ValueError("deadlock: " + "; ".join(stuck))

    def _awaited(self, action: Action) -> Message | None:
        """Return the message that must arrive before the action begins."""
        message = action.message
        if message is None or action.kind in ("RECV_F", "RECV_B"):
            return None
        if action.kind in COMPUTE:
            return message if message in self.posted_s else None
        return self.last_sent.get(message.channel)

    def _execute(self, rank: int, action: Action) -> bool:
        """Execute one action of a rank; return whether it could."""
        message, start_s = action.message, self.clock_s[rank]
        awaited = self._awaited(action)
        if awaited is not None:
            if awaited not in self.sent_s or awaited not in self.posted_s:
                return False
            start_s = max(start_s, self.sent_s[awaited] + self.transfer_s, self.posted_s[awaited] + self.transfer_s)
        if start_s > self.clock_s[rank]:
            self.events[rank].append(TimelineEvent(rank, action, self.clock_s[rank], start_s, waiting=True))
        self.clock_s[rank] = start_s
        if message is None or action.kind in COMPUTE:
            self.clock_s[rank] += self.costs(action.kind, action.stage)
            self.events[rank].append(TimelineEvent(rank, action, start_s, self.clock_s[rank]))
        elif action.kind in ("RECV_F", "RECV_B"):
            self.posted_s[message] = start_s
        else:
            self.sent_s[message] = start_s
            self.last_sent[message.channel] = message
        return True
