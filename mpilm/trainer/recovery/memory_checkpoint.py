"""Checkpoints in memory: copies of the last steps on other ranks, from which a run continues after a rank is lost."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.engine.step import NO_FLAGS, StepResult
from mpilm.engine.train_model import TrainModel

TAG = 7
RESTORE = {"restore": True}  # a message to spare ranks; others: the folder of the run, how it ended

StateRange = tuple[str, str, int, int]  # kind (TrainModel.state_slices), parameter, first element, the one after the last
OwnedRange = tuple[int, StateRange]  # with the world rank that holds it


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of the training state after `done` steps."""

    done: int
    trainer: Mapping[str, Any]  # bad steps and the result of the step
    state: Mapping[StateRange, Tensor]
    model: TrainModel | None = None  # set if the tensors alias its memory; None if they are copies

    def lookup(self, wanted: StateRange) -> Tensor | None:
        """Return the elements of a range, if this snapshot contains them."""
        *tensor, start, stop = wanted
        for (*own_tensor, first, last), x in self.state.items():
            if own_tensor == tensor and first <= start and stop <= last:
                return x[start - first : stop - first]
        return None


class InMemoryCheckpoint:
    """The last two steps, as far as this rank can restore them. Under ZeRO, and if experts are divided, a rank copies its own
    share and that of the previous rank of the reduce axes. Otherwise every replica holds everything, and nothing is copied.
    With spare ranks, the stages of a single replica copy each other's. `spared`: ranks that train and spares, if any."""

    def __init__(self, spared: Comm | None = None) -> None:
        self.snapshots: list[Snapshot] = []
        self.spared = spared
        self.model: TrainModel | None = None
        self.folder = Path()
        self._previous_ranges: list[StateRange] | None = None  # of the rank whose share is copied

    def save(self, model: TrainModel, folder: Path, done: int, trainer: Mapping[str, Any]) -> None:
        """Take a snapshot after `done` steps. Collective over the reduce axes, or over all ranks if they are one replica."""
        is_first = model is not self.model
        if is_first:
            self.model, self.folder, self._previous_ranges = model, folder, None
        state, replicas = state_ranges(model), model.reduce_comm
        ring = model.mesh.world if self.spared is not None and replicas.size == 1 else replicas
        if ring.size > 1 and (ring is not replicas or model.zero or model.experts.comm.size > 1):
            new = [Snapshot(done, trainer, copied) for copied in self._copy_shards(state, ring)]
        else:
            new = [Snapshot(done, trainer, state, model)]
        self.snapshots = [old for old in self.snapshots if old.done == done - 1 and old.model is not model] + new
        if is_first and self.spared is not None:
            self.spared.broadcast_json({"folder": str(folder)})

    def _copy_shards(self, own: Mapping[StateRange, Tensor], ring: Comm) -> list[dict[StateRange, Tensor]]:
        """Return copies of this rank's share and of the previous rank's. Collective over `ring`."""
        previous, following = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
        if self._previous_ranges is None:
            self._previous_ranges = [tuple(item) for item in ring.all_gather_json(list(own))[previous]]
        sent = torch.cat([*own.values()] or [torch.empty(0)]).cpu()
        received = torch.empty(sum(stop - start for *_, start, stop in self._previous_ranges))
        for request in (ring.irecv(received, previous, TAG), ring.isend(sent, following, TAG)):
            request.wait()
        return [_split_into_ranges(sent, list(own)), _split_into_ranges(received, self._previous_ranges)]


def state_ranges(model: TrainModel) -> dict[StateRange, Tensor]:
    """Return the model's own memory of the parameters and moments that this rank updates."""
    kinds = model.state_slices().items()
    return {(kind, item.name, item.start, item.stop): x.view(-1) for kind, items in kinds for item, x in items.items()}


def _split_into_ranges(values: Tensor, ranges: Sequence[StateRange]) -> dict[StateRange, Tensor]:
    return dict(zip(ranges, values.split([stop - start for *_, start, stop in ranges])))


@dataclass(frozen=True)
class RecoveredState:
    """The state to resume from after a failure, distributed over the ranks of `world`."""

    world: Comm
    done: int
    trainer: Mapping[str, Any]
    ranges: Sequence[OwnedRange]
    snapshots: Sequence[Snapshot]
    note: str  # for the header
    folder: Path  # of the run

    def result(self) -> StepResult:
        """Return the result of the step after which the run resumes."""
        loss, grad_norm, lr, updated, losses = self.trainer["result"]
        return StepResult(loss, grad_norm, lr, updated, NO_FLAGS, tuple(losses))

    def restore_into(self, model: TrainModel) -> None:
        """Fill the state that this rank updates. Collective over the working ranks; idle spares are in `broadcast_ranges`."""
        self.world.broadcast_json(RESTORE)
        self.broadcast_ranges(state_ranges(model))

    def broadcast_ranges(self, state: Mapping[StateRange, Tensor]) -> None:
        """Broadcast every range from its owner, and fill `state` from them. Collective over the world."""
        targets: dict[tuple[str, str], list[tuple[int, int, Tensor]]] = defaultdict(list)
        for (kind, name, first, last), x in state.items():
            targets[kind, name].append((first, last, x))
        for owner, wanted in self.ranges:
            values = self.broadcast_range(owner, wanted)
            kind, name, start, stop = wanted
            for first, last, x in targets[kind, name]:
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    x[begin - first : end - first].copy_(values[begin - start : end - start])

    def broadcast_range(self, owner: int, wanted: StateRange) -> Tensor:
        """Return a range's elements from its owner. Collective over the world."""
        *_, start, stop = wanted
        values = torch.empty(stop - start)
        if owner == self.world.rank:
            found = (snapshot.lookup(wanted) for snapshot in self.snapshots if snapshot.done == self.done)
            values.copy_(next(x for x in found if x is not None))
        self.world.broadcast(values, owner)
        return values


def latest_complete_step(
    everyone: Sequence[Sequence[Any]], shapes: Mapping[str, Mapping[str, Sequence[int]]]
) -> tuple[int, Mapping[str, Any], list[OwnedRange]] | None:
    """Return the newest step of which the ranks together hold everything, its trainer state, and the ranges to broadcast.
    `everyone`: for each rank (done, trainer, ranges) of its snapshots. `shapes`: of the complete tensors, by kind and name."""
    numel = {(kind, name): prod(shape) for kind, items in shapes.items() for name, shape in items.items()}
    trainers: dict[int, Mapping[str, Any]] = {}
    holders: dict[Any, list[tuple[int, int, int]]] = defaultdict(list)
    for rank, snapshots in enumerate(everyone):
        for done, trainer, ranges in snapshots:
            trainers[done] = trainer  # the same on all ranks
            for kind, name, start, stop in ranges:
                holders[done, (kind, name)].append((start, stop, rank))
    for done in sorted(trainers, reverse=True):
        found = [(rank, (*key, start, stop)) for key in numel for start, stop, rank in _cover(holders[done, key])]
        if sum(stop - start for _, (*_, start, stop) in found) == sum(numel.values()):
            return done, trainers[done], found
    return None


def _cover(holders: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield adjacent ranges from element 0 on, each with a rank that holds it, up to the first gap."""
    at = 0
    while candidates := [part for part in holders if part[0] <= at < part[1]]:
        _, stop, rank = max(candidates, key=lambda part: (part[1], -part[2]))
        yield at, stop, rank
        at = stop
