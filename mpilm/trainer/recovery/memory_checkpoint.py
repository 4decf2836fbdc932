"""Checkpoints in memory: copies of the last steps on other ranks, from which a run continues after a rank is lost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.format import PARAMETER
from mpilm.comm.base import Comm
from mpilm.comm.progress import Progress
from mpilm.engine.step import NO_FLAGS, StepResult
from mpilm.engine.train_model import TrainModel
from mpilm.parallel.flat_layout import ParamSlice

TAG = 7
CMD_BROADCAST = "give"

StateSlices = Mapping[str, Mapping[ParamSlice, Tensor]]  # parameters, and moments by name
OwnedRange = tuple[int, str, str, int, int]  # a world rank, kind, parameter, first element, the one after the last


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of the training state after `done` steps."""

    done: int
    trainer: Mapping[str, Any]  # bad steps and the result of the step
    state: StateSlices
    model: TrainModel | None = None  # set if the tensors alias its memory; None if they are copies

    def inventory(self) -> list[list[Any]]:
        return [[kind, item.name, item.start, item.stop] for kind, items in self.state.items() for item in items]

    def lookup(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Return elements of a tensor, if this snapshot contains them."""
        for item, x in self.state[kind].items():
            if item.name == name and item.start <= start and stop <= item.stop:
                return x.view(-1)[start - item.start : stop - item.start]
        return None


class InMemoryCheckpoint:
    """The last two steps, as far as this rank can restore them.

    Under ZeRO a rank copies its own shard and that of the previous rank on the data axis. Without ZeRO every replica holds
    everything, and nothing is copied.
    """

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.model: TrainModel | None = None
        self.folder = Path()
        self._previous_inventory: list[list[Any]] | None = None  # of the previous rank on the data axis

    def save(self, model: TrainModel, folder: Path, done: int, trainer: Mapping[str, Any]) -> None:
        """Take a snapshot after `done` steps. Collective over the data axis."""
        state: StateSlices = {PARAMETER: model.owned_slices(), **model.optimizer.state_slices()}
        if model is not self.model:
            self.model, self.folder, self._previous_inventory = model, folder, None
        if model.zero and model.data.size > 1:
            new = self._copy_shards(Snapshot(done, trainer, state), model.data)
        else:
            new = [Snapshot(done, trainer, state, model)]
        self.snapshots = [old for old in self.snapshots if old.done == done - 1 and old.model is not model] + new

    def discard(self) -> None:
        """Drop all snapshots: the state is about to change by something else than a step."""
        self.snapshots = []

    def _copy_shards(self, own: Snapshot, data: Comm) -> list[Snapshot]:
        """Return copies of this rank's shard and of the previous rank's. Collective over `data`."""
        previous, following = (data.rank - 1) % data.size, (data.rank + 1) % data.size
        if self._previous_inventory is None:
            self._previous_inventory = data.all_gather_json(own.inventory())[previous]
        tensors = [x.reshape(-1) for items in own.state.values() for x in items.values()]
        sent = torch.cat(tensors or [torch.empty(0)]).cpu()
        received = torch.empty(sum(stop - start for *_, start, stop in self._previous_inventory))
        for request in (data.irecv(received, previous, TAG), data.isend(sent, following, TAG)):
            request.wait()
        return [
            Snapshot(own.done, own.trainer, _unpack(inventory, values))
            for inventory, values in ((own.inventory(), sent), (self._previous_inventory, received))
        ]


def _unpack(inventory: Sequence[Sequence[Any]], values: Tensor) -> StateSlices:
    state: dict[str, dict[ParamSlice, Tensor]] = {}
    for (kind, *item), x in zip(inventory, values.split([stop - start for *_, start, stop in inventory])):
        state.setdefault(kind, {})[ParamSlice(*item)] = x
    return state


@dataclass(frozen=True)
class RecoveredState:
    """The state to resume from after a failure, distributed over the ranks of `world`."""

    world: Comm
    done: int
    trainer: Mapping[str, Any]
    ranges: Sequence[OwnedRange]
    snapshots: Sequence[Snapshot]
    note: str  # for the header
    progress: Progress
    folder: Path  # of the run

    def result(self) -> StepResult:
        """Return the result of the step after which the run resumes."""
        loss, grad_norm, lr, updated = self.trainer["result"]
        return StepResult(loss, grad_norm, lr, updated, NO_FLAGS)

    def restore_into(self, state: StateSlices) -> None:
        """Fill these slices. Collective over the working ranks; idle spares are in `broadcast_ranges`."""
        self.world.broadcast_json(CMD_BROADCAST)
        self.broadcast_ranges(state)

    def broadcast_ranges(self, state: StateSlices | None = None) -> None:
        """Broadcast every range from its owner, and fill these slices from them. Collective over the world."""
        targets: dict[tuple[str, str], list[tuple[ParamSlice, Tensor]]] = {}
        for kind, items in (state or {}).items():
            for item, x in items.items():
                targets.setdefault((kind, item.name), []).append((item, x.view(-1)))
        for owned in self.ranges:
            _, kind, name, start, stop = owned
            values = self.broadcast_range(owned)
            for item, x in targets.get((kind, name), ()):
                first, last = max(start, item.start), min(stop, item.stop)
                if first < last:
                    x[first - item.start : last - item.start] = values[first - start : last - start].to(x.device)

    def broadcast_range(self, owned: OwnedRange) -> Tensor:
        """Return a range's elements from its owner. Collective over the world."""
        rank, kind, name, start, stop = owned
        values = torch.empty(stop - start)
        if rank == self.world.rank:
            found = (snapshot.lookup(kind, name, start, stop) for snapshot in self.snapshots if snapshot.done == self.done)
            values.copy_(next(x for x in found if x is not None))
        self.world.broadcast(values, rank)
        return values


def latest_complete_step(
    everyone: Sequence[Sequence[Any]], model: TrainModel | None
) -> tuple[int, Mapping[str, Any], list[OwnedRange]] | None:
    """Return the newest step of which the ranks together hold everything, its trainer state, and the ranges to broadcast.

    `everyone`: for each rank the (done, trainer, inventory) of its snapshots.
    """
    if model is None:
        return None
    shapes = {(PARAMETER, name): shape for name, shape in model.shapes.items()}
    shapes |= {(kind, name): shape for kind, items in model.moment_shapes.items() for name, shape in items.items()}
    for done in sorted({snapshot[0] for snapshots in everyone for snapshot in snapshots}, reverse=True):
        holders: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        trainer: Mapping[str, Any] = {}
        for rank, snapshots in enumerate(everyone):
            for snapshot_done, snapshot_trainer, inventory in snapshots:
                if snapshot_done == done:
                    trainer = snapshot_trainer
                    for kind, name, start, stop in inventory:
                        holders.setdefault((kind, name), []).append((start, stop, rank))
        ranges = [list(_cover(holders.get(key, []), prod(shape))) for key, shape in shapes.items()]
        if all(parts and parts[-1][1] == prod(shape) for parts, shape in zip(ranges, shapes.values())):
            return done, trainer, [(r, *key, a, b) for key, parts in zip(shapes, ranges) for a, b, r in parts]
    return None


def _cover(holders: Sequence[tuple[int, int, int]], numel: int) -> Iterator[tuple[int, int, int]]:
    """Yield adjacent ranges from element 0 on, each with a rank that holds it, up to the first gap."""
    at = 0
    while at < numel:
        candidates = (part for part in holders if part[0] <= at < part[1])
        best = max(candidates, key=lambda part: (part[1], -part[2]), default=None)
        if best is None:
            return
        stop, rank = best[1:]
        yield at, stop, rank
        at = stop
