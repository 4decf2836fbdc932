"""Training that survives the loss of ranks, where the MPI lets the others speak (ULFM): they shrink the world, bring the state
of the last whole step together from what they hold, share the same work out anew, and go on.

W. Bland et al., Post-failure recovery of MPI communication capability, 2013, sections 3 and 4.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpilm.checkpoint.save import PARAMETER
from mpilm.comm.activity import Activity
from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError
from mpilm.config import Config, replaced
from mpilm.errors import ConfigError, LostRankError, from_code
from mpilm.guard.fault import faults
from mpilm.parallel.shard import Piece
from mpilm.trainer.step import NOTHING, StepResult

if TYPE_CHECKING:
    from mpilm.trainer.build import Training
    from mpilm.trainer.sharded import ShardedModel

TAG = 7
GIVE = "give"

Kinds = Mapping[str, Mapping[Piece, Tensor]]  # parameters, and moments by kind
Range = tuple[int, str, str, int, int]  # a rank of the world, kind, name, first element, the one after the last


@dataclass(frozen=True)
class Version:
    """Some of the state after `done` steps, as a rank holds it. `of`: the model whose own memory this is; None: a copy."""

    done: int
    history: Mapping[str, Any]
    kinds: Kinds
    of: ShardedModel | None = None

    def inventory(self) -> list[list[Any]]:
        return [[kind, *_words(piece)] for kind, pieces in self.kinds.items() for piece in pieces]

    def find(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Elements of a tensor, where they are here."""
        for piece, x in self.kinds[kind].items():
            if piece.name == name and piece.start <= start and stop <= piece.stop:
                return x.view(-1)[start - piece.start : stop - piece.start]
        return None


class Kept:
    """What a rank could bring back of the last two steps. Under ZeRO that is a copy of what it updates itself, and one of what
    the rank before it on the data axis does; without, every replica holds all, and nothing is copied."""

    def __init__(self) -> None:
        self.versions: list[Version] = []
        self.model: ShardedModel | None = None
        self.folder = Path()
        self._before: list[list[Any]] | None = None  # inventory of the rank before this one

    def keep(self, run: Training, done: int, result: StepResult) -> None:
        """The state after `done` steps, now. Collective over the data axis."""
        model = run.model
        history = {**run.history.words(), "result": [result.loss, result.grad_norm, result.lr, result.updated]}
        kinds: Kinds = {PARAMETER: model.pieces(), **model.optimizer.pieces()}
        if model is not self.model:
            self.model, self.folder, self._before = model, run.folder.path, None
        if model.zero and model.data.size > 1:
            now = self._copies(Version(done, history, kinds), model.data)
        else:
            now = [Version(done, history, kinds, model)]
        self.versions = [old for old in self.versions if old.done == done - 1 and old.of is not model] + now

    def forget(self) -> None:
        """The state is about to change in another way than by a step."""
        self.versions = []

    def _copies(self, own: Version, data: Comm) -> list[Version]:
        """This rank's part and that of the rank before it, which it sends. Collective over `data`."""
        before, after = (data.rank - 1) % data.size, (data.rank + 1) % data.size
        if self._before is None:
            self._before = data.all_gather_json(own.inventory())[before]
        mine = torch.cat([x.reshape(-1) for pieces in own.kinds.values() for x in pieces.values()] or [torch.empty(0)]).cpu()
        theirs = torch.empty(sum(stop - start for *_, start, stop in self._before))
        for request in (data.irecv(theirs, before, TAG), data.isend(mine, after, TAG)):
            request.wait()
        return [
            Version(own.done, own.history, _parted(inventory, values))
            for inventory, values in ((own.inventory(), mine), (self._before, theirs))
        ]


class Forgetful(Kept):
    """Of a run that is not to survive a loss."""

    def keep(self, run: Training, done: int, result: StepResult) -> None:
        pass


def _words(piece: Piece) -> list[Any]:
    return [piece.name, piece.start, piece.stop]


def _parted(inventory: Sequence[Sequence[Any]], values: Tensor) -> Kinds:
    kinds: dict[str, dict[Piece, Tensor]] = {}
    for (kind, *words), x in zip(inventory, values.split([stop - start for *_, start, stop in inventory])):
        kinds.setdefault(kind, {})[Piece(*words)] = x
    return kinds


@dataclass(frozen=True)
class Carried:
    """The state that the ranks of `world` go on from, none of whom holds all of it. `note`: what has happened; `folder`: of the
    run."""

    world: Comm
    done: int
    history: Mapping[str, Any]
    ranges: Sequence[Range]
    versions: Sequence[Version]
    note: str
    activity: Activity
    folder: Path

    def result(self) -> StepResult:
        """Of the step after which the run goes on."""
        loss, grad_norm, lr, updated = self.history["result"]
        return StepResult(loss, grad_norm, lr, updated, NOTHING)

    def hand_over(self, kinds: Kinds) -> None:
        """Fill these pieces. Collective over the ranks that work, the others being in `give`."""
        self.world.broadcast_json(GIVE)
        self.give(kinds)

    def give(self, kinds: Kinds | None = None) -> None:
        """Fill these pieces, and let others have what this rank holds. Collective over the world."""
        wanted: dict[tuple[str, str], list[tuple[Piece, Tensor]]] = {}
        for kind, pieces in (kinds or {}).items():
            for piece, x in pieces.items():
                wanted.setdefault((kind, piece.name), []).append((piece, x.view(-1)))
        for rank, kind, name, start, stop in self.ranges:
            self.activity.at("recover.give")
            values = torch.empty(stop - start)
            if rank == self.world.rank:
                values.copy_(self._held(kind, name, start, stop))
            self.world.broadcast(values, rank)
            for piece, x in wanted.get((kind, name), ()):
                first, last = max(start, piece.start), min(stop, piece.stop)
                if first < last:
                    x[first - piece.start : last - piece.start] = values[first - start : last - start].to(x.device)

    def _held(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        found = (version.find(kind, name, start, stop) for version in self.versions if version.done == self.done)
        return next(x for x in found if x is not None)


def survive(config: Config, world: Comm) -> None:
    """Train, and go on with the ranks that are left when some are lost. Collective; `world` shrinks."""
    from mpilm.trainer.loop import train

    if not world.survives:
        raise AgreedError(ConfigError(
            f"--fault.elastic needs an MPI that lets the survivors speak: Open MPI 5 under mpirun --with-ft ulfm, not "
            f"{world.mpi_library} as it was started here"
        ))  # fmt: skip
    kept, activity, carried = Kept(), Activity(faults(world.rank)), None
    members = world.all_gather_json(f"rank {world.rank} ({socket.gethostname()}, process {os.getpid()})")
    me, there = members[world.rank], list(members)
    while True:
        try:
            team = _team(config, world)
            if team is None:
                return _stand_by(world, carried)
            train(_fitting(config, team.size), team, kept, carried, activity)
            world.broadcast_json(None)
            return
        except AgreedError as agreed:
            world.broadcast_json([agreed.error.code, str(agreed.error)])
            raise
        except Exception as error:
            if not world.lost(error):
                raise
        world.shrink()
        carried, there = _agreed(config, world, kept, activity, me, there)


def _team(config: Config, world: Comm) -> Comm | None:
    """The ranks that work: as many as pipelines of this length can have; None on the others. Collective."""
    length = config.parallel.pipeline
    working = max(1, world.size // length) * length
    if working >= world.size:
        return world
    team = world.split(int(world.rank >= working), world.rank, "world")
    return team if world.rank < working else None


def _fitting(config: Config, ranks: int) -> Config:
    """There is nothing to shard over where one replica is left."""
    alone = ranks == config.parallel.pipeline
    return replaced(config, parallel__zero=0) if alone and config.parallel.zero else config


def _stand_by(world: Comm, carried: Carried | None) -> None:
    """Give what this rank holds, and wait for the others' end, or for another loss, after which it may be needed."""
    patient = world.with_options(gpu_aware=False, patient=True)
    while (said := patient.broadcast_json(None)) == GIVE:
        assert carried is not None
        carried.give()
    if said:
        raise AgreedError(from_code(*said))


def _agreed(
    config: Config, world: Comm, kept: Kept, activity: Activity, me: str, there: list[str]
) -> tuple[Carried, list[str]]:
    """What the ranks of a shrunk world go on from, and who they are. Collective, until nobody is lost on the way."""
    while True:
        try:
            activity.at("recover.agree")
            now = world.all_gather_json(me)
            lost = ", ".join(who for who in there if who not in now)
            everyone = world.all_gather_json([[v.done, dict(v.history), v.inventory()] for v in kept.versions])
        except Exception as error:
            if not world.lost(error):
                raise
            world.shrink()
            continue
        if world.size < config.parallel.pipeline:
            raise AgreedError(
                LostRankError(f"{lost} lost, and {world.size} ranks are too few for {_pipeline(config)}; {_AGAIN}")
            )
        found = _newest_whole(everyone, kept.model)
        if found is None:
            raise AgreedError(LostRankError(f"{lost} lost, with a part of the state that no other rank holds; {_AGAIN}"))
        done, history, ranges = found
        idle = world.size % config.parallel.pipeline
        note = f"{lost} lost; {world.size} ranks go on after step {done}{f', {idle} of them standing by' * bool(idle)}"
        return Carried(world, done, history, ranges, kept.versions, note, activity, kept.folder), now


_AGAIN = "the same command goes on from the newest checkpoint"


def _pipeline(config: Config) -> str:
    return f"--parallel.pipeline {config.parallel.pipeline}"


def _newest_whole(
    everyone: Sequence[Sequence[Any]], model: ShardedModel | None
) -> tuple[int, Mapping[str, Any], list[Range]] | None:
    """The newest step of which the ranks together hold everything, and which rank gives what."""
    if model is None:
        return None
    shapes = {(PARAMETER, name): shape for name, shape in model.shapes.items()}
    shapes |= {(kind, name): shape for kind, of in model.moment_shapes.items() for name, shape in of.items()}
    for done in sorted({version[0] for theirs in everyone for version in theirs}, reverse=True):
        held: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        history: Mapping[str, Any] = {}
        for rank, theirs in enumerate(everyone):
            for version_done, version_history, inventory in theirs:
                if version_done == done:
                    history = version_history
                    for kind, name, start, stop in inventory:
                        held.setdefault((kind, name), []).append((start, stop, rank))
        ranges = [list(_covered(held.get(key, []), prod(shape))) for key, shape in shapes.items()]
        if all(parts and parts[-1][1] == prod(shape) for parts, shape in zip(ranges, shapes.values())):
            return done, history, [(r, *key, a, b) for key, parts in zip(shapes, ranges) for a, b, r in parts]
    return None


def _covered(held: Sequence[tuple[int, int, int]], numel: int) -> Iterator[tuple[int, int, int]]:
    """Ranges one after the other from element 0 on, each with a rank that holds it; until there is a gap."""
    at = 0
    while at < numel:
        found = max((part for part in held if part[0] <= at < part[1]), key=lambda part: (part[1], -part[2]), default=None)
        if found is None:
            return
        stop, rank = found[1:]
        yield at, stop, rank
        at = stop
