"""Description of a run: start row of metrics.jsonl, header, predicted memory, and the error when memory runs out."""

import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

import mpilm
from mpilm.config.schema import LORA_TARGETS, microbatch_count
from mpilm.engine.hardware import device_name, measure_peak_flops, software_versions
from mpilm.errors import OutOfMemoryError
from mpilm.formatting import command_text, count_noun, format_mebibytes
from mpilm.mesh.shape import AXES
from mpilm.model.flops import flops_per_token
from mpilm.ops.tree import utilization
from mpilm.optim.optimizer import learning_rate
from mpilm.parallel.layout_check import replica_microbatch_count
from mpilm.parallel.offload import measure_write_rate, offload_folder
from mpilm.parallel.pipeline.schedules import analytic_bubble
from mpilm.parallel.reduce.step import StepReducer
from mpilm.planner.memory import memory_parts, step_bytes
from mpilm.trainer.run import Run


def describe_run(run: Run) -> tuple[dict[str, Any], list[str]]:
    """Return the start row of metrics.jsonl and the lines to print before the first step. Collective; measures FLOP rates."""
    world, config, parallel = run.mesh.world, run.config, run.config.parallel
    predictions = world.all_gather_json(predict_memory(run))  # so that all ranks measure at once
    peak, peak_source = measure_peak_flops(run.hardware, config.train.dtype)
    facts = [peak, run.model.local_numel, run.hardware.threads, socket.gethostname(), run.model.offloaded_bytes]
    facts.append(run.hardware.bound_to)
    peaks, local_numel, threads, hosts, offloaded, bound = zip(*world.all_gather_json(facts))
    predicted = max(predictions, key=lambda parts: sum(parts.values()))
    trained, frozen = (sum(map(prod, shapes.values())) for shapes in (run.model.shapes, run.model.frozen_shapes))
    command = f"{command_text('train')} {shlex.join(sys.argv[1:])}".rstrip()
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
        "offloaded_on_rank_bytes": offloaded,
        "flops_per_token": flops_per_token(config.model, run.model.vocab_size),
        "peak_flops": sum(peaks) if all(peaks) else None,
        "peak_source": peak_source,
        "threads": run.hardware.threads,
        "device": str(run.hardware.device.type),
        "hosts": hosts,
        "cores": bound,
        "command": f"mpirun -n {world.size} {command}" if world.size > 1 else command,
        "versions": software_versions(world),
    }
    labelled = (f"  {label:<8} {text}" for label, text in _header_rows(run, row, predicted))
    return row, [_first_line(run, threads), *labelled, ""]


def _first_line(run: Run, threads: Sequence[int]) -> str:
    hardware = run.hardware
    device = device_name(hardware.device)
    text = f"{count_noun(threads[0], 'thread')} each"
    if len(set(threads)) > 1:
        text = f"{', '.join(map(str, threads))} threads (unequal: the last bits depend on which rank computes what)"
    train = run.config.train
    is_missing = train.kernels == "auto" and train.dtype == "bfloat16" and hardware.device.type == "cpu" and not train.compile
    dtype = f"{train.dtype}, fused kernels" if hardware.kernels == "fused" else train.dtype
    dtype += " (faster with numba, which is not installed)" if is_missing and hardware.kernels == "torch" else ""
    cores = ", more ranks than cores" if hardware.oversubscribed else ", bound to separate cores" if hardware.bound_to else ""
    return f"mpilm {mpilm.__version__}: {count_noun(len(threads), 'rank')}, {text}{cores}, {device}, {dtype}"


def _header_rows(run: Run, row: Mapping[str, Any], predicted: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield labels and texts; one without a label continues the row before. `predicted`: of the rank that uses most memory."""
    hardware = run.hardware
    yield "with", f"torch {torch.__version__}, {run.mesh.world.mpi_library}"
    if hardware.threads > max(1.0, float(hardware.cores)):
        sharing = f"{hardware.threads} threads a rank on {float(hardware.cores):.2g} core{'s' * (hardware.cores > 1)}"
        yield "warning", f"{sharing}: threads that share a core are many times slower; omit --train.threads and OMP_NUM_THREADS"
    if transport := run.mesh.world.device_transport:
        yield "", f"tensors travel by {transport}"
    if any("node" in cores for cores in row["cores"]):
        shown = [f"rank {rank}: {cores}" for rank, cores in enumerate(row["cores"][:4]) if cores]
        yield "cores", "; ".join(shown) + "; ..." * (len(row["cores"]) > 4)
    yield from _layout_rows(run)
    yield from _training_rows(run, row)
    if (train := run.config.train).warmup_steps > train.steps:
        steps = f"--train.warmup-steps {train.warmup_steps:,} exceeds --train.steps {train.steps:,}"
        yield "warning", f"{steps}: the learning rate ends at {learning_rate(train, train.steps - 1):.2e}, below --train.lr"
    if run.recheck.obstacle and run.config.fault.recheck_every:
        yield "note", f"computation is not rechecked (--fault.recheck-every): {run.recheck.obstacle}"
    where = "" if run.mesh.world.size == 1 else " (largest rank)"
    gpu = " of GPU memory" if hardware.device.type != "cpu" else ""
    peak = f"{format_mebibytes(row['predicted_memory_bytes'])}{gpu} predicted peak{where}"
    yield "memory", f"{peak}: {list_parts(predicted)}"
    if any(row["offloaded_on_rank_bytes"]) and run.mesh.rank == 0:  # which prints it
        yield "", _describe_offload(run, row["offloaded_on_rank_bytes"], row["hosts"])
    yield "run", f"{run.folder.path}" + (f", from step {run.folder.step}" if run.folder.step else "")
    for note in run.folder.notes:
        yield "note", note


def _describe_offload(run: Run, offloaded: Sequence[int], hosts: Sequence[str]) -> str:
    parts, train = f"{' and '.join(run.model.offload.parts)}: {format_mebibytes(max(offloaded))} a rank", run.config.train
    if run.hardware.device.type != "cpu":
        return f"{parts} in the memory of the host"
    folder, here = offload_folder(train), sum(size for size, host in zip(offloaded, hosts) if host == hosts[0])
    if (rate := measure_write_rate(folder)) is None:
        return f"{parts} in files in {folder}"
    least_s = 2 * here / rate  # each byte is read and written
    cost = f": at least {least_s:.1f} s more a step if memory cannot hold them" if least_s >= 0.1 else ""
    return f"{parts} in files in {folder}, which writes {format_mebibytes(round(rate))}/s{cost}"


def _layout_rows(run: Run) -> Iterator[tuple[str, str]]:
    parallel, shape = run.config.parallel, run.mesh.shape
    sizes = [f"{axis} {size}" for axis, size in zip(AXES, shape.sizes) if size > 1 or axis == "data"]
    yield "layout", " x ".join(sizes) + (f", ZeRO-{parallel.zero}" if parallel.zero else "")
    if spares := run.config.fault.spare_ranks:
        yield "", f"plus {count_noun(spares, 'spare rank')} at the start"
    kinds = (("tensor", run.model.tensor.parts), ("sequence", run.model.sequence.parts))
    if parts := " and ".join(f"{count} {kind} parts" for kind, count in kinds if count > 1):
        yield "", f"{parts}, which a resumed run keeps"
    if shape.replicas > 1 and run.config.train.reproducible:  # otherwise nobody, or the MPI library, reduces the gradients
        yield from _reduction_rows(run)
    if run.layout_note:
        yield "", run.layout_note
    if len(run.model.blocks_per_stage) > 1:
        microbatches = replica_microbatch_count(run.config, shape)
        bubble = analytic_bubble(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches)
        idle = f"; bubble {bubble:.0%} of a step if stages are even" if bubble is not None else ""
        yield "", f"schedule {parallel.schedule}, layers per stage {','.join(map(str, run.model.blocks_per_stage))}{idle}"


def _reduction_rows(run: Run) -> Iterator[tuple[str, str]]:
    parallel = run.config.parallel
    if parallel.sync_every:
        synchronized = f"replicas train independently and synchronize every {parallel.sync_every} steps"
        yield "", f"{synchronized}; loss and norm are over all replicas"
    elif parallel.powersgd_rank:
        yield "", f"gradients of matrices are compressed to rank {parallel.powersgd_rank}"
    else:
        timings = ", ".join(f"{method} {1000 * seconds:.1f} ms" for method, seconds in run.model.reduce_timings.items())
        reducer = next(iter(run.model.reducers.values()))
        if isinstance(reducer, StepReducer):
            method = "shared memory within the node" if reducer.across_ranks.uses_shared_buffers else "messages"
            yield "", f"gradient all-reduce: {method}{f' ({timings})' if timings else ''}"
        if parallel.wire_dtype == "bfloat16":
            yield "", "gradients are sent as bfloat16: the last bits depend on the layout"


def _training_rows(run: Run, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, train, total, ranks = run.config.model, run.config.train, row["microbatches"], run.mesh.shape.replicas
    tied = ", embeddings tied" if model.tie_embeddings else ""
    yield "model", f"{model.arch}, {model.n_layers} blocks of width {model.d_model}, {row['parameters']:,} parameters{tied}"
    if model.lora_rank:
        targets = ", ".join(model.lora_targets or LORA_TARGETS[model.arch])
        yield "", f"{row['parameters_trained']:,} of them are trained, in adapters of rank {model.lora_rank} on {targets}"
    for number, line in enumerate(run.data.summary_lines):
        yield "" if number % 2 else "data", line
    tokens = f"{train.global_batch} sequences of {model.context_length} = {train.global_batch * model.context_length:,} tokens"
    yield "a step", f"{tokens}, in {count_noun(total, 'microbatch')}"
    if total % ranks:
        name = "replicas" if ranks < run.mesh.shape.size else "ranks"
        sizes = ", ".join(str(total // ranks + (rank < total % ranks)) for rank in range(ranks))
        nearest = max(1, round(total / ranks)) * ranks * train.micro_batch
        idle = f"{name} have {sizes} of them and idle {1 - utilization(ranks, total):.0%} of the time"
        yield "", f"uneven: {idle}; --train.global-batch {nearest} divides evenly"


def predict_memory(run: Run) -> dict[str, int]:
    """Return the bytes that this rank will use, by part."""
    config, model, device = run.config, run.model, run.hardware.device.type
    step = step_bytes(config, model.vocab_size, model.blocks_per_stage, list(model.stages), model.program, device)
    resident = {"program": run.memory.program_bytes, **model.memory_bytes()}
    return memory_parts(config, device, resident, step, model.saved_bytes, run.mesh.world.size)


def list_parts(parts: Mapping[str, int]) -> str:
    """Return the parts of a prediction as text, without empty ones."""
    return ", ".join(f"{part} {format_mebibytes(nbytes)}" for part, nbytes in parts.items() if nbytes)


def out_of_memory_error(run: Run, error: BaseException) -> OutOfMemoryError:
    """Wrap an out-of-memory error with the predicted memory and what to change."""
    parts, recorder = predict_memory(run), run.recorder
    detail = "".join(f" ({line[:200]})" for line in str(error).strip().splitlines()[:1])
    return OutOfMemoryError(
        f"out of memory in {recorder.phase} {recorder.step + 1}, with {format_mebibytes(run.memory.used_bytes)} in "
        f"use{detail}; predicted: {format_mebibytes(sum(parts.values()))}: {list_parts(parts)}. A smaller --train.micro-batch, "
        "--train.recompute block, more pipeline stages or --parallel.zero 3 need less; fewer ranks a node leave more for each"
    )
