"""Calibration: measure a machine, correct the profile by whole training steps, and write it.

All ranks measure at the same time, since those of a node share its memory and its clock rate; then the first rank of each node
measures alone, with all cores. Numbers are medians over the calls of a rank, and over the ranks.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.config.schema import Config, ModelConfig, TrainConfig, resolve_config
from mpilm.data.files import file_errors
from mpilm.doctor.checks import CheckReport
from mpilm.doctor.measure import BUDGET_S, Bench, measure_network, measure_rates
from mpilm.engine.hardware import cores_per_rank, detect_hardware, software_versions
from mpilm.engine.step import train_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import ConfigError
from mpilm.formatting import count_noun
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import saved_floats_per_token
from mpilm.parallel.flat_layout import ALIGNMENT
from mpilm.planner.cost import step_time
from mpilm.planner.layout import PlacedLayout
from mpilm.planner.profile import FORMAT, ComputeRates, Curve, MachineProfile, write_profile
from mpilm.telemetry.memory import MemoryMeter
from mpilm.verification.layouts import RandomTokens

TRAINED, VOCAB_SIZE = ((128, 128), (512, 192), (1024, 512)), 2048  # tokens and width of models that are trained


def write_calibration(comm: Comm, device: str, path: Path) -> None:
    """Measure this machine and write its profile. Collective; raises CollectiveError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        profile = calibrate(comm, device, partial)
    except CollectiveError:  # such as that it takes too long: numbers of a busy machine would mislead
        if comm.rank == 0:
            partial.unlink(missing_ok=True)
        raise
    run_on_root(comm, lambda: write_profile(path, profile))
    run_on_root(comm, partial.unlink)
    CheckReport(comm).print("calibrated", f"{path}: for python -m mpilm.plan --machine {path}")


def calibrate(comm: Comm, device: str, partial: Path | None = None) -> MachineProfile:
    """Measure this machine with these ranks. `partial` keeps the measurements, for a calibration that is killed. Collective."""
    hardware = detect_hardware(TrainConfig(device=device), comm, bind=False)  # one rank alone measures all cores
    comm = comm.with_options(gpu_aware=False, yield_while_waiting=hardware.oversubscribed)
    node, has_gpu = comm.split_node(), hardware.device.type != "cpu"
    sizes = comm.all_gather_json(node.size)
    if len(set(sizes)) > 1:
        problem = f"nodes have {min(sizes)} to {max(sizes)} ranks"
        raise CollectiveError(ConfigError(f"{problem}: start the same number on each, as many as a job will have"))
    program_bytes = MemoryMeter(hardware.device).program_bytes
    cores = max(1, round(sum(node.all_gather_json(float(cores_per_rank(node))))))
    kinds = 1 if node.size == 1 or has_gpu else 2  # of ranks: all of a node at once, or one alone
    versions, tasks = software_versions(comm), 5 * kinds + 1 + (node.size > 1) + (node.size < comm.size)
    bench = Bench(comm, node, hardware.device, tasks=tasks)
    if partial is not None:
        _resume_from(partial, bench, {**versions, "ranks": [comm.size, node.size], "cores": cores, "device": device})
    compute, memory = measure_rates(bench, hardware.threads, node.size)
    alone = replace(bench, comm=comm.with_options(gpu_aware=False, yield_while_waiting=True), alone=True)
    if kinds > 1:
        torch.set_num_threads(cores if node.rank == 0 else 1)
        rates = measure_rates(alone, cores, 1)
        torch.set_num_threads(hardware.threads)
        compute, memory = compute + rates[0], memory + rates[1]
    gpus = torch.get_device_module(hardware.device).device_count() if has_gpu else 1
    profile = MachineProfile(
        format=FORMAT, made=time.strftime("%Y-%m-%d %H:%M"), device=hardware.device.type,
        **{name: versions[name] for name in ("mpilm", "torch", "processor", "mpi")},
        nodes=comm.size // node.size, ranks_per_node=node.size, gpus=gpus, cores=cores,
        memory_bytes=_memory_bytes(hardware.device), program_bytes=max(comm.all_gather_json(program_bytes)),
        compute=tuple(compute), memory=tuple(memory), within=measure_network(bench, node),
        across=measure_network(bench, comm, node.size) if node.size < comm.size else None,
        step_s=1e-9,
    )  # fmt: skip
    corrected = []
    for each in compute:
        ranks = bench if each.ranks == node.size else alone
        torch.set_num_threads(each.threads if ranks is bench or node.rank == 0 else 1)
        corrected.append(replace(each, training=_training_slowdown(ranks, profile, each)))
    torch.set_num_threads(hardware.threads)
    profile = replace(profile, compute=tuple(corrected))
    profile = replace(profile, step_s=_unexplained_s(bench, profile))
    if max(comm.all_gather_json(bench.elapsed_s)) > BUDGET_S:
        CheckReport(comm).warn("this took long: if other programs run here, calibrate again without them")
    return profile


def _resume_from(partial: Path, bench: Bench, conditions: Mapping[str, Any]) -> None:
    """Let `bench` use the measurements that an earlier calibration has stored under equal conditions, and store more."""
    head = json.dumps(conditions, sort_keys=True)

    def read() -> list[float]:
        before, *lines = partial.read_text().split("\n")[:-1] if partial.exists() else [""]  # the last may be cut
        stored = [float(line) for line in lines if re.fullmatch(r"[\d.e-]+", line)] if before == head else []
        with file_errors(partial, "written"):
            partial.write_text("".join(f"{line}\n" for line in (head, *stored)))
        return stored

    def keep(seconds: float) -> None:
        with file_errors(partial, "written"), open(partial, "a") as file:
            file.write(f"{seconds}\n")

    bench.stored = bench.comm.broadcast_json(run_on_root(bench.comm, read))
    bench.keep = keep if bench.comm.rank == 0 else bench.keep
    if bench.stored and bench.comm.rank == 0:
        print(f"  {partial} has {count_noun(len(bench.stored), 'measurement')} of an earlier start", file=sys.stderr)


def _memory_bytes(device: torch.device) -> int:
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def _training_slowdown(bench: Bench, profile: MachineProfile, rates: ComputeRates) -> Curve:
    """Measure whole steps of small models, on every rank by itself, against the sum of their parts."""
    bench.progress(f"steps in {rates.dtype}, {count_noun(rates.ranks, 'rank')} a node")
    points = []
    for tokens, width in TRAINED:
        layout, step = _small_model(bench, SelfComm("alone"), profile, rates.ranks, tokens, width, rates.dtype)
        predicted, took_s = step_time(layout), bench.time_call(step)
        saved = tokens * saved_floats_per_token(layout.config.model, rates.dtype)
        points.append((saved, max(0.5, (took_s - predicted.update_s) / predicted.compute_s)))
    return tuple(points)


def _unexplained_s(bench: Bench, profile: MachineProfile) -> float:
    """Measure what a step of a tiny model takes beyond its prediction: Python and small messages. Collective."""
    bench.progress("a whole step")
    layout, step = _small_model(bench, bench.comm, profile, profile.ranks_per_node, 32, 64, "float32")
    took_s = bench.time_collective(bench.comm, step, 20)
    return max(0.05 * took_s, took_s - step_time(layout).total_s)


def _small_model(
    bench: Bench, comm: Comm, profile: MachineProfile, ranks_per_node: int, tokens: int, width: int, dtype: Any
) -> tuple[PlacedLayout, Callable[[], object]]:
    """Return a model of a few blocks, replicated over `comm`, and its training step on so many tokens a microbatch."""
    model = ModelConfig(n_layers=3, n_heads=max(1, width // 64), d_model=width, context_length=min(tokens, 256))
    rows = max(1, tokens // model.context_length)
    microbatches = comm.size if comm is bench.comm else 2
    train = TrainConfig(global_batch=microbatches * rows, micro_batch=rows, dtype=dtype)
    config, shape, cut = resolve_config(Config(model=model, train=train)), MeshShape(data=comm.size), (model.n_layers,)
    trained = TrainModel(config, Mesh(shape, comm), cut, VOCAB_SIZE, bench.device, ALIGNMENT)
    trained.init_parameters()
    source, steps = RandomTokens(config, VOCAB_SIZE), count()
    layout = PlacedLayout(config, VOCAB_SIZE, profile, shape, ranks_per_node, cut)
    return layout, lambda: train_step(trained, source, next(steps))
