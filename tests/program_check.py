"""Static check of a set of programs, one per rank: complete, in order and free of deadlock, before anything is executed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpilm.parallel.pipeline.actions import COMPUTE, Action, ActionKind
from mpilm.planner.simulate import Program, simulate

KIND_SETS: tuple[frozenset[ActionKind], ...] = (frozenset("F"), frozenset("FB"), frozenset("FIW"))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _ExpectedStep:
    """The actions that the programs of all ranks must contain between them."""

    stages: int
    kinds: frozenset[ActionKind]  # the kinds of compute actions
    microbatches: int
    real_microbatches: int | None  # None: all

    def actions_of(self, stage: int) -> Iterator[Action]:
        """Yield every action of one stage."""
        for microbatch in range(self.microbatches):
            for kind in sorted(self.kinds):
                action = Action(stage, kind, microbatch)
                yield action
                if not action.is_padding(self.real_microbatches):
                    yield from filter(None, (action.input_receive(self.stages), action.output_send(self.stages)))
        if len(self.kinds) > 1:
            yield Action(stage, "REDUCE")

    def prerequisites(self, action: Action) -> Iterator[Action]:
        """Yield what must precede an action on its rank. Backwards keep their order: sums of gradients depend on it."""
        kind, microbatch = action.kind, action.microbatch
        receive = action.input_receive(self.stages)
        if receive is not None and not action.is_padding(self.real_microbatches):
            yield receive
        if kind in ("B", "I", "W"):
            yield replace(action, kind="I" if kind == "W" else "F")
            if microbatch:
                yield replace(action, microbatch=microbatch - 1)
        if kind in ("SEND_F", "SEND_B"):
            yield replace(action, kind="F" if kind == "SEND_F" else "I" if "I" in self.kinds else "B")
        if kind == "REDUCE":
            yield Action(action.stage, "W" if "W" in self.kinds else "B", self.microbatches - 1)


def check_programs(programs: Sequence[Program], real_microbatches: int | None = None) -> None:
    """Raise ValueError, naming rank and action, unless the programs of a pipeline's ranks can be executed together.

    Every stage treats every microbatch once. What an action needs precedes it on its rank. Messages are received in the
    order in which they are sent, and no rank waits for ever with unbuffered sends: one message may be under way on a
    channel. The programs must not send messages of microbatches from `real_microbatches` on.
    """
    compute = [action for program in programs for action in program if action.kind in COMPUTE]
    stages = 1 + max((action.stage for action in compute), default=-1)
    kinds: frozenset[ActionKind] = frozenset(action.kind for action in compute)
    microbatches = 1 + max((action.microbatch or 0 for action in compute), default=-1)
    if kinds not in KIND_SETS:
        raise ValueError(f"the programs compute {', '.join(sorted(kinds)) or 'nothing'}; expected F, or F and B, or F, I and W")
    expected = _ExpectedStep(stages, kinds, microbatches, real_microbatches)
    _check_owners(programs, stages)
    for rank, program in enumerate(programs):
        _check_program(rank, program, expected)
    _check_channels(programs)
    simulate(programs, lambda kind, stage: 1.0)


def _check_owners(programs: Sequence[Program], stages: int) -> None:
    owners: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for action in program:
            owner = owners.setdefault(action.stage, rank)
            if owner != rank:
                raise ValueError(f"rank {rank}: {action} belongs to another rank: stage {action.stage} is on rank {owner}")
    for stage in set(range(stages)) - owners.keys():
        raise ValueError(f"no rank has stage {stage}")


def _check_program(rank: int, program: Program, expected: _ExpectedStep) -> None:
    pending = {action for stage in {action.stage for action in program} for action in expected.actions_of(stage)}
    done: set[Action] = set()
    for action in program:
        if action not in pending:
            problem = "appears twice" if action in done else "does not belong to this step"
            raise ValueError(f"rank {rank}: {action} {problem}")
        for prerequisite in expected.prerequisites(action):
            if prerequisite not in done:
                raise ValueError(f"rank {rank}: {action} needs {prerequisite} before it")
        done.add(action)
        pending.remove(action)
    if pending:
        raise ValueError(f"rank {rank}: missing {', '.join(sorted(map(str, pending)))}")


def _check_channels(programs: Sequence[Program]) -> None:
    """Raise ValueError where a channel's receives differ in order from its sends: MPI matches them in order."""
    sends: dict[tuple[int, str], list[tuple[int, Action]]] = defaultdict(list)
    receives: dict[tuple[int, str], list[tuple[int, Action]]] = defaultdict(list)
    for rank, program in enumerate(programs):
        for action in program:
            if action.message is not None and action.kind not in COMPUTE:
                ends = sends if action.kind in ("SEND_F", "SEND_B") else receives
                ends[action.message.channel].append((rank, action))
    for channel, sent in sends.items():
        for (sender, send), (receiver, receive) in zip(sent, receives[channel]):
            if send.microbatch != receive.microbatch:
                raise ValueError(f"rank {sender} has {send} where rank {receiver} has {receive}: messages keep their order")
