"""Training that survives the loss of ranks, with an MPI that is fault tolerant (ULFM).

The survivors shrink the world, reassemble the state of the last complete step from what they hold, divide the same work anew,
and continue. W. Bland et al., Post-failure recovery of MPI communication capability, 2013, sections 3 and 4.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import instrument
from mpilm.comm.processes import process_fields
from mpilm.config.schema import Config, replica_size
from mpilm.config.settings import override
from mpilm.errors import ConfigError, LostRankError, error_from_code
from mpilm.formatting import count_noun
from mpilm.launch.stop_request import ignore_stop_signals
from mpilm.trainer.loop import train
from mpilm.trainer.recovery.memory_checkpoint import RESTORE, InMemoryCheckpoint, RecoveredState, latest_complete_step

RESUME_HINT = "the same command resumes from the newest checkpoint"
DYING_S = 2.0  # in which a process that is being killed is gone
Failure = list[Any] | None  # code and message of the error with which the working ranks end, if any
Message = dict[str, Any]  # to all ranks, spares included; {"end": Failure} is the last


class Member(NamedTuple):
    """A rank of the world."""

    name: str
    host: str
    pid: int


def train_elastic(config: Config, world: Comm) -> None:
    """Train, and continue with the surviving ranks if some are lost. Collective; `world` shrinks."""
    if not world.is_fault_tolerant:
        needed = "an MPI that survives the loss of ranks: Open MPI 5 under mpirun --with-ft ulfm"
        raise CollectiveError(ConfigError(f"--fault.elastic needs {needed}, not {world.mpi_library} as it was started here"))
    host, pid, wanted = socket.gethostname(), os.getpid(), _wanted_count(config, world.size)
    members = [Member(*x) for x in world.all_gather_json([f"rank {world.rank} ({host}, process {pid})", host, pid])]
    own, in_memory = members[world.rank], InMemoryCheckpoint(world if wanted < world.size else None)
    recovered, has_lost_ranks, ended = None, False, Message()
    while True:
        is_complete = False
        try:
            if has_lost_ranks:  # some may have heard the end, others not
                ended = next(filter(None, world.all_gather_json(ended)), Message())
            if has_lost_ranks and not ended:
                recovered, members = agree_on_survivors(config, world, in_memory, own, members, wanted)
            if not ended and (working := _working_ranks(config, world, wanted)) is not None:
                ended = {"end": _train_working(config, working, in_memory, recovered)}
                world.broadcast_json(ended)
            elif not ended:
                ended = _idle_spare(world, recovered)
            is_complete = True
        except Exception as error:
            if not world.is_rank_failure(error):
                raise
            world.revoke()
        if world.agree(is_complete):
            break
        world.shrink()
        has_lost_ranks = True
    if failure := ended["end"]:
        raise CollectiveError(error_from_code(*failure))


def _group_size(config: Config) -> int:
    """Return the number of ranks that hold a whole model, and share sequences and experts."""
    return replica_size(config.parallel) * config.parallel.expert


def _wanted_count(config: Config, ranks: int) -> int:
    """Return the number of ranks that train while so many can; the others are spares. Collective; raises if too few remain."""
    group, spares = _group_size(config), config.fault.spare_ranks
    if spares and ranks - spares < group:
        few = f"{count_noun(max(0, ranks - spares), 'rank')} to train"
        problem = f"--fault.spare-ranks {spares} leaves {few}, of {ranks} in all: start at least {group + spares}"
        raise CollectiveError(ConfigError(problem))
    return max(1, (ranks - spares) // group) * group


def _working_ranks(config: Config, world: Comm, wanted: int) -> Comm | None:
    """Return the ranks that train: `wanted` ones, or as many whole replicas as are left; None on the others. Collective."""
    group = _group_size(config)
    count = min(wanted, max(1, world.size // group) * group)
    if count >= world.size:
        return world
    working = world.split(int(world.rank >= count), world.rank, "world")
    return working if world.rank < count else None


def _train_working(config: Config, working: Comm, in_memory: InMemoryCheckpoint, recovered: RecoveredState | None) -> Failure:
    single = working.size == replica_size(config.parallel) // config.parallel.context  # whose parameters ZeRO cannot shard
    try:
        train(override(config, parallel__zero=0) if single else config, working, in_memory, recovered)
    except CollectiveError as error:
        return [error.error.code, str(error.error)]
    return None


def _idle_spare(world: Comm, recovered: RecoveredState | None) -> Message:
    """Broadcast what this rank holds, then wait for the end, or for another loss after which the rank may be needed. The ranks
    that train obey signals to stop."""
    ignore_stop_signals()
    yielding = world.with_options(gpu_aware=False, yield_while_waiting=True)
    while "end" not in (message := yielding.broadcast_json(None)):
        if message == RESTORE:
            assert recovered is not None
            recovered.broadcast_ranges({})
        else:
            instrument(world).recorder.report_folder = Path(message["folder"]) / "watchdog"
    return Message(message)


def agree_on_survivors(
    config: Config, world: Comm, in_memory: InMemoryCheckpoint, own: Member, members: list[Member], wanted: int
) -> tuple[RecoveredState | None, list[Member]]:
    """Return the state from which a shrunk world resumes, or None if no step was complete, and its ranks. Collective; raises if
    too little is left."""
    model, replica = in_memory.model, _group_size(config)
    shapes = model.part_shapes() if model is not None else {}
    snapshots = [[snapshot.done, dict(snapshot.trainer), list(snapshot.state)] for snapshot in in_memory.snapshots]
    names, everyone, all_shapes = zip(*world.all_gather_json([own.name, snapshots, shapes]))
    survivors = [member for member in members if member.name in names]
    lost = ", ".join(member.name for member in members if member.name not in names)
    _check_majority(world, own, members, survivors, lost)
    if world.size < replica:
        flags = [f"--parallel.{axis} {getattr(config.parallel, axis)}" for axis in ("pipeline", "tensor", "context", "expert")]
        too_few = f"too few ranks ({world.size}) are left for {' and '.join(flag for flag in flags if not flag.endswith(' 1'))}"
        raise CollectiveError(LostRankError(f"{lost} lost, and {too_few}; {RESUME_HINT}"))
    if not any(everyone):
        if world.rank == 0:
            print(f"mpilm: {lost} lost before a step was complete; {count_noun(world.size, 'rank')} begin again", flush=True)
        return None, survivors
    found = latest_complete_step(everyone, max(all_shapes, key=len))  # a spare that has never trained knows no shapes
    if found is None:
        missing = "together with a part of the state that no other rank holds"
        raise CollectiveError(LostRankError(f"{lost} lost, {missing}; {RESUME_HINT}"))
    done, trainer, ranges = found
    spares = world.size - min(wanted, world.size // replica * replica)
    left = f", {spares} of them as spares" if spares else ", none as a spare" if config.fault.spare_ranks else ""
    note = f"{lost} lost; {count_noun(world.size, 'rank')} continue after step {done}{left}"
    return RecoveredState(world, done, trainer, ranges, in_memory.snapshots, note, in_memory.folder), survivors


def _check_majority(world: Comm, own: Member, members: list[Member], survivors: list[Member], lost: str) -> None:
    """Raise if ranks that may still run, on a host that cannot be reached, may be the majority: only one side of a network that
    has fallen apart may go on with the run. At equal numbers it is the side of the first rank. Collective."""
    hosts, end = {member.host for member in survivors}, time.monotonic() + DYING_S
    here = [member for member in members if member not in survivors and member.host == own.host]
    while (running := [member.name for member in here if _is_running(member)]) and time.monotonic() < end:
        time.sleep(0.05)
    seen = {name for found in world.all_gather_json(running) for name in found}
    rest = [member for member in members if member.name in seen or (member not in survivors and member.host not in hosts)]
    if len(rest) > len(survivors) or (len(rest) == len(survivors) and members[0] not in survivors):
        sides = f"they may still run, and these {count_noun(len(survivors), 'rank')} must not go on beside them"
        raise CollectiveError(LostRankError(f"no connection to {lost}; {sides}; {RESUME_HINT}"))


def _is_running(member: Member) -> bool:
    fields = process_fields(member.pid)
    return bool(fields) and fields[1] != "Z"
