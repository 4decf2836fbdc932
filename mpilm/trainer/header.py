"""What is said of a run before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

import mpilm
from mpilm.config import LORA_TARGETS, microbatches
from mpilm.mesh.shape import AXES
from mpilm.optim.reduce import BlockSum
from mpilm.parallel.feasible import replica_microbatches
from mpilm.parallel.pipeline.schedules import even_bubble
from mpilm.parallel.tree import balance
from mpilm.telemetry.words import mebibytes
from mpilm.trainer.build import Training
from mpilm.trainer.machine import processor
from mpilm.trainer.memory import listed


def trained(run: Training) -> int:
    """Parameters that are trained."""
    return sum(map(prod, run.model.shapes.values()))


def parameters(run: Training) -> int:
    return trained(run) + sum(map(prod, run.model.frozen_shapes.values()))


def header(run: Training, threads: list[int], predicted: Mapping[str, int]) -> Iterator[str]:
    """`threads`: of each rank; `predicted`: the memory of the rank that needs most."""
    config, world, model = run.config, run.mesh.world, run.config.model
    yield from _who(run, threads)
    yield from _layout(run)
    tied = ", embeddings tied" if model.tie_embeddings else ""
    yield f"  model    {model.arch}, {model.n_layers} blocks of width {model.d_model}, {parameters(run):,} parameters{tied}"
    if model.lora_rank:
        where = ", ".join(model.lora_targets or LORA_TARGETS[model.arch])
        yield f"           {trained(run):,} of them, in adapters of rank {model.lora_rank} on {where}, are trained"
    for number, line in enumerate(run.material.said):
        yield f"  data     {line}" if number % 2 == 0 else f"           {line}"
    batch, m = config.train.global_batch, microbatches(config)
    tokens = batch * model.context_length
    yield f"  a step   {batch} sequences of {model.context_length} = {tokens:,} tokens, in {m} microbatches"
    yield from _uneven(run, m)
    most = "a rank" if world.size == 1 else "on the rank that needs most"
    of = " of the GPU" if run.machine.device.type == "cuda" else ""
    yield f"  memory   {mebibytes(sum(predicted.values()))}{of} predicted {most}: {listed(predicted)}"
    yield f"  run      {run.folder.path}" + (f", from step {run.folder.step}" if run.folder.step else "")
    for note in run.folder.notes:
        yield f"  note     {note}"
    yield ""


def _who(run: Training, everyone: list[int]) -> Iterator[str]:
    machine, size = run.machine, run.mesh.world.size
    device = torch.cuda.get_device_name() if machine.device.type == "cuda" else processor()
    threads = f"{everyone[0]} thread{'s' * (everyone[0] > 1)} each"
    if len(set(everyone)) > 1:
        threads = f"{', '.join(map(str, everyone))} threads (unequal: the last bits depend on who computes what)"
    crowd = ", more ranks than cores" if machine.crowded else ", on cores of their own" if machine.bound else ""
    yield f"mpilm {mpilm.__version__}: {size} rank{'s' * (size > 1)}, {threads}{crowd}, {device}, {run.config.train.dtype}"
    yield f"  with     torch {torch.__version__}, {run.mesh.world.mpi_library}"
    cores = float(machine.cores)
    if machine.threads > max(1.0, cores):
        yield (
            f"  mind     {machine.threads} threads a rank, which has {cores:.2g} core{'s' * (cores > 1)}: they take turns, "
            "which is many times slower; leave --train.threads and OMP_NUM_THREADS out"
        )


def _layout(run: Training) -> Iterator[str]:
    parallel = run.config.parallel
    sizes = zip(AXES, run.mesh.shape.sizes)
    zero = f", ZeRO-{parallel.zero}" if parallel.zero else ""
    yield "  layout   " + " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1 or axis == "data") + zero
    yield from _sums(run)
    if run.chosen:
        yield f"           {run.chosen}"
    if len(run.model.cut) > 1:
        count = replica_microbatches(run.config, run.mesh.shape)
        idle = even_bubble(parallel.schedule, parallel.pipeline, parallel.chunks, count)
        waiting = f"; {idle:.0%} of a step idle if they are even" if idle is not None else ""
        yield f"           schedule {parallel.schedule}, layers of each stage {','.join(map(str, run.model.cut))}{waiting}"


def _sums(run: Training) -> Iterator[str]:
    """How gradients are added, where there is anything to say of it."""
    parallel = run.config.parallel
    if run.mesh.shape.data == 1 or not run.config.train.reproducible:
        return
    if parallel.sync_every:
        yield f"           replicas train by themselves and meet every {parallel.sync_every} steps; loss and norm are of all"
    elif parallel.compress:
        yield f"           gradients of matrices are compressed to rank {parallel.compress}"
    else:
        found = [of for of in run.model.gradients.values() if isinstance(of, BlockSum)]
        ways = ["in memory that the ranks of a node share" if of.shared else "by messages" for of in found[:1]]
        tried = ", ".join(f"{way} {1000 * seconds:.1f} ms" for way, seconds in run.model.tried.items())
        ways += [f"({tried})"] if tried else []
        if ways:
            yield f"           gradients are added {' '.join(ways)}"
        if parallel.wire_dtype == "bfloat16":
            yield "           what is sent of them travels as bfloat16: the last bits depend on the layout"


def _uneven(run: Training, total: int) -> Iterator[str]:
    ranks = run.mesh.shape.data
    if total % ranks == 0:
        return
    sizes = [total // ranks + (rank < total % ranks) for rank in range(ranks)]
    near = max(1, round(total / ranks)) * ranks * run.config.train.micro_batch
    who = "replicas" if run.mesh.shape.pipeline > 1 else "ranks"
    yield (
        f"           uneven: {who} have {', '.join(map(str, sizes))} of them and {1 - balance(ranks, total):.0%} of their time "
        f"is lost; --train.global-batch {near} would divide"
    )
