"""Every layout of these ranks against the serial run: the same losses, gradients and weights, or a broken promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.together import AgreedError, same_everywhere, together
from mpilm.comm.trace import Traced
from mpilm.config import Config, Parallel, flatten, resolve
from mpilm.data.batch import Batch
from mpilm.errors import ConfigError, RanksDisagreeError
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.model.init import key_of
from mpilm.parallel.feasible import cut_by_cost, mesh_shape
from mpilm.parallel.pipeline.schedules import SCHEDULES
from mpilm.parallel.shard import ALIGNMENT, Piece
from mpilm.trainer.machine import Machine, look
from mpilm.trainer.sharded import ShardedModel
from mpilm.trainer.step import gradients, update
from mpilm.validation import validate

VOCAB_SIZE = 331
CUDA_TOLERANCE = 1e-4  # relative to the largest element: GPU kernels may add in another order each time


class RandomTokens:
    """Microbatches by step and number: tokens drawn at random, for models that need not learn anything."""

    def __init__(self, config: Config, vocab_size: int = VOCAB_SIZE):
        self.config, self.vocab_size = config, vocab_size

    def train(self, step: int, m: int) -> Batch:
        rows, length = self.config.train.micro_batch, self.config.model.context_length
        generator = np.random.Generator(np.random.Philox(key=key_of("verify", self.config.train.seed, step, m)))
        tokens = torch.from_numpy(generator.integers(0, self.vocab_size, (rows, length + 1), dtype=np.int64))
        samples = (step * self.config.train.global_batch + m * rows) + torch.arange(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(length), samples, rows * length)

    def target_tokens(self, step: int) -> int:
        return self.config.train.global_batch * self.config.model.context_length


@dataclass(frozen=True)
class Outcome:
    """Losses and norms of each step, the gradient of each step and the weights after the last, as far as a rank has them."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[Piece, Tensor]]
    weights: dict[Piece, Tensor]


@dataclass(frozen=True)
class Row:
    """One layout's largest differences from the serial run, over all ranks; `equal`: to the last bit."""

    loss: float
    gradient: float
    weight: float
    equal: bool


def layouts(config: Config, ranks: int) -> Iterator[tuple[Parallel, str]]:
    """All layouts of so many ranks, each with the reason why it cannot run this model, or nothing."""
    for pipeline in (p for p in range(1, ranks + 1) if ranks % p == 0):
        schedules = tuple(SCHEDULES) if pipeline > 1 or ranks == 1 else ("1f1b",)
        for schedule in schedules:
            for zero in (0, 1, 2, 3) if ranks > pipeline else (0,):
                parallel = Parallel(pipeline=pipeline, schedule=schedule, zero=zero)  # type: ignore[arg-type]
                yield resolve(replace(config, parallel=parallel)).parallel, _refusal(config, parallel, ranks)


def _refusal(config: Config, parallel: Parallel, ranks: int) -> str:
    try:
        changed = resolve(replace(config, parallel=parallel))
        validate(changed)
        mesh_shape(changed, ranks)
        cut_by_cost(changed, VOCAB_SIZE)
        return ""
    except ConfigError as error:
        return str(error)


def name_of(parallel: Parallel, ranks: int) -> str:
    """The layout in one line of a table."""
    data = ranks // parallel.pipeline
    schedule = parallel.schedule if parallel.pipeline > 1 or ranks == 1 else "-"
    return f"{data:>4}  {parallel.pipeline:>8}  {schedule:<11}  {parallel.zero:>4}"


def prove(config: Config, world: Comm, self_test: bool, say) -> None:  # type: ignore[no-untyped-def]
    """Run every layout and compare; `say` prints a line. Collective; raises AgreedError when a promise is broken.

    `self_test`: one rank changes the lowest bit of one element of its gradient, which must be noticed.
    """
    same_everywhere(world, "settings", flatten(config))
    machine = together(world, lambda: look(config.train, world))
    world = Traced(world.with_options(config.train.gpu_aware_mpi, machine.crowded))
    tolerance = CUDA_TOLERANCE if machine.device.type == "cuda" else 0.0
    serial = _serial(config, machine)
    say(f"{'data':>4}  {'pipeline':>8}  {'schedule':<11}  {'ZeRO':>4}  {'loss':>9}  {'gradient':>9}  {'weight':>9}")
    broken = ran = 0
    for parallel, reason in layouts(config, world.size):
        if reason:
            say(f"{name_of(parallel, world.size)}  not run: {reason}")
            continue
        row = _compare(run_layout(replace(config, parallel=parallel), world, machine, self_test), serial, world)
        kept = row.equal or max(row.loss, row.gradient, row.weight) <= tolerance
        ran, broken = ran + 1, broken + (not kept)
        verdict = "equal bits" if row.equal else f"within {tolerance:g}" if kept else "BROKEN"
        say(f"{name_of(parallel, world.size)}  {row.loss:>9.2g}  {row.gradient:>9.2g}  {row.weight:>9.2g}  {verdict}")
    if not ran:
        raise AgreedError(ConfigError(f"no layout of {world.size} ranks can run this model and batch, so nothing is proved"))
    promise = f"a relative difference of {tolerance:g}" if tolerance else "equal bits"
    if broken and self_test:
        noticed = f"the bit that was changed has been noticed on {broken} of {ran} layouts, as it must be"
        raise AgreedError(RanksDisagreeError(noticed))
    if broken:
        raise AgreedError(RanksDisagreeError(f"{broken} of {ran} layouts differ from the serial run; promised are {promise}"))
    counts = f"{_count(ran, 'layout')} of {_count(world.size, 'rank')}, {_count(config.train.steps, 'step')} each"
    say(f"{counts}: promised and found {promise}")


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"


def _serial(config: Config, machine: Machine) -> Outcome:
    return run_layout(replace(config, parallel=resolve(Config()).parallel), SelfComm("world"), machine, False)


def run_layout(config: Config, world: Comm, machine: Machine, change: bool) -> Outcome:
    """Train for `train.steps` on one layout. Collective over `world`."""
    mesh = Mesh.build(MeshShape(config.parallel.pipeline, world.size // config.parallel.pipeline), world)
    alignment = ALIGNMENT * machine.threads
    model = ShardedModel(config, mesh, cut_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, machine.device, alignment)
    model.initialise()
    source, losses, norms, found = RandomTokens(config), [], [], []
    for step in range(config.train.steps):
        loss, norm, *_ = gradients(model, source, step)
        if change and step == 0:
            _flip(model, world)
        losses.append(loss)
        norms.append(norm)
        found.append(_copies(model.gradient_pieces()))
        update(model, step, norm)
    return Outcome(losses, norms, found, _copies(model.pieces()))


def _flip(model: ShardedModel, world: Comm) -> None:
    """Change the lowest bit of one gradient element, on the last rank that updates any: a small model in many shards leaves
    some ranks without. Collective."""
    pieces = model.gradient_pieces().values()
    updating = [rank for rank, count in enumerate(world.all_gather_json(len(pieces))) if count]
    if world.rank == updating[-1]:
        max(pieces, key=torch.numel)[:1].view(torch.int32).bitwise_xor_(1)


def _copies(pieces: Mapping[Piece, Tensor]) -> dict[Piece, Tensor]:
    return {piece: x.clone() for piece, x in pieces.items()}


def _compare(ours: Outcome, serial: Outcome, world: Comm) -> Row:
    """The largest differences over all ranks. Collective."""
    numbers = list(zip(ours.losses + ours.norms, serial.losses + serial.norms))
    loss, same = max(_nan_as_inf(abs(a - b) / abs(b)) for a, b in numbers), all(a == b for a, b in numbers)
    gradient = weight = 0.0
    for mine, theirs in zip(ours.gradients, serial.gradients):
        gradient, same = max(gradient, _difference(mine, theirs)), same and _equal(mine, theirs)
    weight, same = _difference(ours.weights, serial.weights), same and _equal(ours.weights, serial.weights)
    largest = torch.tensor([loss, gradient, weight, float(not same)], dtype=torch.float64)
    world.all_reduce(largest, "max")
    loss, gradient, weight, changed = largest.tolist()
    return Row(loss, gradient, weight, equal=not changed)


def _pairs(mine: Mapping[Piece, Tensor], serial: Mapping[Piece, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    whole = {piece.name: x for piece, x in serial.items()}
    for piece, x in mine.items():
        yield x, whole[piece.name][piece.start : piece.stop]


def _difference(mine: Mapping[Piece, Tensor], serial: Mapping[Piece, Tensor]) -> float:
    """The largest difference of an element, as a part of the largest element of the same kind."""
    scale = max(float(x.abs().max()) for x in serial.values())
    return max((_nan_as_inf(float((a - b).abs().max()) / scale) for a, b in _pairs(mine, serial)), default=0.0)


def _nan_as_inf(difference: float) -> float:
    """So that nan is larger than any tolerance: no comparison with it is true."""
    return math.inf if math.isnan(difference) else difference


def _equal(mine: Mapping[Piece, Tensor], serial: Mapping[Piece, Tensor]) -> bool:
    """Whether all bits are the same; the sign of a zero is one."""
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in _pairs(mine, serial))
