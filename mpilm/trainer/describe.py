"""The description of a run before its first step: the start row of metrics.jsonl and the header."""

import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

import mpilm
from mpilm.config.schema import LORA_TARGETS, microbatch_count
from mpilm.engine.hardware import measure_peak_flops, processor_name, software_versions
from mpilm.formatting import count_noun, format_mebibytes
from mpilm.mesh.shape import AXES
from mpilm.model.flops import flops_per_token
from mpilm.ops.tree import utilization
from mpilm.parallel.layout_check import replica_microbatch_count
from mpilm.parallel.pipeline.schedules import analytic_bubble
from mpilm.parallel.reduce.step import StepReducer
from mpilm.trainer.memory import list_parts, predict_memory
from mpilm.trainer.run import Run


@dataclass(frozen=True)
class RunDescription:
    """The gathered facts about a run."""

    row: dict[str, Any]  # the start row of metrics.jsonl
    predicted: dict[str, int]  # memory of the rank that needs most, by part
    threads: Sequence[int]  # of each rank


def describe_run(run: Run) -> RunDescription:
    """Gather the description from all ranks, and measure their peak FLOP rate. Collective."""
    world, config, parallel = run.mesh.world, run.config, run.config.parallel
    predictions = world.all_gather_json(predict_memory(run))  # so that all ranks measure at once
    peak, peak_source = measure_peak_flops(run.hardware.device, config.train.dtype)
    facts = [peak, run.model.local_numel, run.hardware.threads, socket.gethostname()]
    peaks, local_numel, threads, hosts = zip(*world.all_gather_json(facts))
    predicted = max(predictions, key=lambda parts: sum(parts.values()))
    trained, frozen = _parameter_counts(run)
    sizes = dict(zip(AXES, run.mesh.shape.sizes))
    row = {
        "event": "start",
        "step": run.folder.step,
        "time": time.time(),
        "ranks": world.size,
        "layout": {**sizes, "zero": parallel.zero, "schedule": parallel.schedule, "cut": list(run.model.blocks_per_stage)},
        "microbatches": microbatch_count(config),
        "parameters": trained + frozen,
        "parameters_trained": trained,
        "parameters_on_rank": local_numel,
        "predicted_memory_bytes": sum(predicted.values()),
        "predicted_memory_on_rank_bytes": [sum(parts.values()) for parts in predictions],
        "flops_per_token": flops_per_token(config.model, run.model.vocab_size),
        "peak_flops": sum(peaks) if all(peaks) else None,
        "peak_source": peak_source,
        "threads": run.hardware.threads,
        "device": str(run.hardware.device.type),
        "hosts": hosts,
        "command": _command_line(world.size),
        "versions": software_versions(world),
    }
    return RunDescription(row, predicted, threads)


def _command_line(ranks: int) -> str:
    """Return the command that started the run, as far as a rank can tell."""
    return f"{f'mpirun -n {ranks} ' if ranks > 1 else ''}python -m mpilm.train {shlex.join(sys.argv[1:])}".rstrip()


def _parameter_counts(run: Run) -> tuple[int, int]:
    """Return the number of trained and of frozen parameters."""
    return sum(map(prod, run.model.shapes.values())), sum(map(prod, run.model.frozen_shapes.values()))


def header_lines(run: Run, description: RunDescription) -> Iterator[str]:
    """Yield the lines printed before the first step."""
    config, model = run.config, run.config.model
    trained, frozen = _parameter_counts(run)
    yield from _machine_lines(run, description.threads)
    yield from _layout_lines(run)
    tied = ", embeddings tied" if model.tie_embeddings else ""
    yield f"  model    {model.arch}, {model.n_layers} blocks of width {model.d_model}, {trained + frozen:,} parameters{tied}"
    if model.lora_rank:
        targets = ", ".join(model.lora_targets or LORA_TARGETS[model.arch])
        yield f"           {trained:,} of them are trained, in adapters of rank {model.lora_rank} on {targets}"
    for number, line in enumerate(run.data.summary_lines):
        yield f"  data     {line}" if number % 2 == 0 else f"           {line}"
    batch, m = config.train.global_batch, microbatch_count(config)
    tokens = batch * model.context_length
    yield f"  a step   {batch} sequences of {model.context_length} = {tokens:,} tokens, in {count_noun(m, 'microbatch')}"
    yield from _uneven_lines(run, m)
    where = "" if run.mesh.world.size == 1 else " (largest rank)"
    gpu = " of GPU memory" if run.hardware.device.type == "cuda" else ""
    peak = f"{format_mebibytes(sum(description.predicted.values()))}{gpu} predicted peak{where}"
    yield f"  memory   {peak}: {list_parts(description.predicted)}"
    yield f"  run      {run.folder.path}" + (f", from step {run.folder.step}" if run.folder.step else "")
    for note in run.folder.notes:
        yield f"  note     {note}"
    yield ""


def _machine_lines(run: Run, threads: Sequence[int]) -> Iterator[str]:
    hardware, size = run.hardware, run.mesh.world.size
    device = torch.cuda.get_device_name() if hardware.device.type == "cuda" else processor_name()
    text = f"{count_noun(threads[0], 'thread')} each"
    if len(set(threads)) > 1:
        text = f"{', '.join(map(str, threads))} threads (unequal: the last bits depend on which rank computes what)"
    cores = ", more ranks than cores" if hardware.oversubscribed else ", bound to separate cores" if hardware.is_bound else ""
    yield f"mpilm {mpilm.__version__}: {count_noun(size, 'rank')}, {text}{cores}, {device}, {run.config.train.dtype}"
    yield f"  with     torch {torch.__version__}, {run.mesh.world.mpi_library}"
    if hardware.threads > max(1.0, float(hardware.cores)):
        yield (
            f"  warning  {hardware.threads} threads a rank on {float(hardware.cores):.2g} "
            f"core{'s' * (hardware.cores > 1)}: threads that share a core are many times slower; omit --train.threads and "
            "OMP_NUM_THREADS"
        )


def _layout_lines(run: Run) -> Iterator[str]:
    parallel = run.config.parallel
    sizes = zip(AXES, run.mesh.shape.sizes)
    zero = f", ZeRO-{parallel.zero}" if parallel.zero else ""
    yield "  layout   " + " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1 or axis == "data") + zero
    yield from _reduction_lines(run)
    if run.layout_note:
        yield f"           {run.layout_note}"
    if len(run.model.blocks_per_stage) > 1:
        count = replica_microbatch_count(run.config, run.mesh.shape)
        bubble = analytic_bubble(parallel.schedule, parallel.pipeline, parallel.chunks, count)
        idle = f"; bubble {bubble:.0%} of a step if stages are even" if bubble is not None else ""
        stages = ",".join(map(str, run.model.blocks_per_stage))
        yield f"           schedule {parallel.schedule}, layers per stage {stages}{idle}"


def _reduction_lines(run: Run) -> Iterator[str]:
    """Yield how gradients are reduced, unless a single replica or the MPI library reduces them."""
    parallel = run.config.parallel
    if run.mesh.shape.data == 1 or not run.config.train.reproducible:
        return
    if parallel.sync_every:
        yield (
            f"           replicas train independently and synchronize every {parallel.sync_every} steps; loss and norm are "
            "over all replicas"
        )
    elif parallel.powersgd_rank:
        yield f"           gradients of matrices are compressed to rank {parallel.powersgd_rank}"
    else:
        reducers = [reducer for reducer in run.model.reducers.values() if isinstance(reducer, StepReducer)]
        timings = ", ".join(f"{method} {1000 * seconds:.1f} ms" for method, seconds in run.model.reduce_timings.items())
        for reducer in reducers[:1]:
            method = "shared memory within the node" if reducer.is_shared else "messages"
            yield f"           gradient all-reduce: {method}{f' ({timings})' if timings else ''}"
        if parallel.wire_dtype == "bfloat16":
            yield "           gradients are sent as bfloat16: the last bits depend on the layout"


def _uneven_lines(run: Run, total: int) -> Iterator[str]:
    ranks = run.mesh.shape.data
    if total % ranks == 0:
        return
    sizes = [total // ranks + (rank < total % ranks) for rank in range(ranks)]
    nearest = max(1, round(total / ranks)) * ranks * run.config.train.micro_batch
    name = "replicas" if run.mesh.shape.pipeline > 1 else "ranks"
    yield (
        f"           uneven: {name} have {', '.join(map(str, sizes))} of them and idle {1 - utilization(ranks, total):.0%} of "
        f"the time; --train.global-batch {nearest} divides evenly"
    )
