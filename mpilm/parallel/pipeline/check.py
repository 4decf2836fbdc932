"""Is a set of programs, one a rank, complete, in order and free of deadlock? Asked before anything is executed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpilm.parallel.pipeline.actions import COMPUTE, Action, Kind
from mpilm.parallel.pipeline.simulate import Program, simulate

WHOLE: tuple[frozenset[Kind], ...] = (frozenset("F"), frozenset("FB"), frozenset("FIW"))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Step:
    """What the programs of all ranks have to do between them."""

    stages: int
    kinds: frozenset[Kind]
    microbatches: int
    present: int | None

    def of_stage(self, stage: int) -> Iterator[Action]:
        """Everything that has to be done with one stage."""
        for microbatch in range(self.microbatches):
            for kind in sorted(self.kinds):
                action = Action(stage, kind, microbatch)
                messages = [action.receive(self.stages), action.send(self.stages)]
                yield from (m for m in [action, *messages] if m and (m is action or not m.absent(self.present)))
        if len(self.kinds) > 1:
            yield Action(stage, "REDUCE")

    def needs(self, action: Action) -> Iterator[Action]:
        """What has to come before an action on the same rank. Backwards keep their order, or sums would lose theirs."""
        kind, microbatch = action.kind, action.microbatch
        maker: Kind = "I" if "I" in self.kinds else "B"
        last: Kind = "W" if "W" in self.kinds else "B"
        receive = action.receive(self.stages)
        if receive is not None and not action.absent(self.present):
            yield receive
        if kind in ("B", "I", "W"):
            yield replace(action, kind="I" if kind == "W" else "F")
            if microbatch:
                yield replace(action, microbatch=microbatch - 1)
        if kind in ("SEND_F", "SEND_B"):
            yield replace(action, kind="F" if kind == "SEND_F" else maker)
        if kind == "REDUCE":
            yield Action(action.stage, last, self.microbatches - 1)


def check(programs: Sequence[Program], present: int | None = None, blocking: bool = False) -> None:
    """Raise ValueError, naming rank and action, unless the programs of all ranks of a pipeline can be executed together.

    Every stage treats every microbatch once; what an action needs comes before it on its rank; messages are received in
    the order in which they are sent; and nobody waits for ever, with sends that nothing buffers: one message may be under
    way on a channel, none when `blocking`. Messages of microbatches from `present` on must be left out.
    """
    compute = [action for program in programs for action in program if action.kind in COMPUTE]
    step = _Step(
        stages=1 + max((action.stage for action in compute), default=-1),
        kinds=frozenset(action.kind for action in compute),
        microbatches=1 + max((action.microbatch or 0 for action in compute), default=-1),
        present=present,
    )
    if step.kinds not in WHOLE:
        raise ValueError(f"the programs compute {', '.join(sorted(step.kinds)) or 'nothing'}; it may be F, or F B, or F I W")
    _check_owners(programs, step.stages)
    for rank, program in enumerate(programs):
        _check_rank(f"rank {rank}", program, step)
    _check_channels(programs)
    simulate(programs, lambda kind, stage: 1.0, present=present, blocking=blocking)


def _check_owners(programs: Sequence[Program], stages: int) -> None:
    owner: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for action in program:
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"rank {rank}: {action} is not its own: stage {action.stage} is on rank {owner[action.stage]}")
    for stage in range(stages):
        if stage not in owner:
            raise ValueError(f"no rank has stage {stage}")


def _check_rank(where: str, program: Program, step: _Step) -> None:
    due = {action for stage in {action.stage for action in program} for action in step.of_stage(stage)}
    done: set[Action] = set()
    for action in program:
        if action not in due:
            raise ValueError(f"{where}: {action} is " + ("there twice" if action in done else "no part of this step"))
        for need in step.needs(action):
            if need not in done:
                raise ValueError(f"{where}: {action} needs {need} before it")
        done.add(action)
        due.remove(action)
    if due:
        raise ValueError(f"{where}: {', '.join(sorted(map(str, due)))} is missing")


def _check_channels(programs: Sequence[Program]) -> None:
    """MPI matches the messages of a channel in their order."""
    sends: dict[tuple[int, str], list[tuple[int, Action]]] = defaultdict(list)
    receives: dict[tuple[int, str], list[tuple[int, Action]]] = defaultdict(list)
    for rank, program in enumerate(programs):
        for action in program:
            if action.message is not None and action.kind not in COMPUTE:
                side = sends if action.kind in ("SEND_F", "SEND_B") else receives
                side[action.message.channel].append((rank, action))
    for channel, sent in sends.items():
        for (sender, send), (receiver, receive) in zip(sent, receives[channel]):
            if send.microbatch != receive.microbatch:
                raise ValueError(f"rank {sender} has {send} where rank {receiver} has {receive}: messages keep their order")
