"""Predictions of mpilm.plan against measurements: the step time of every layout, the best layout, and memory."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import BENCH, MAX_OTHER_CORES, Load, make_reduce, mpirun, print_table
from benchmarks.speed import training_run
from mpilm.config.parse import parse
from mpilm.config.presets import PRESETS as CONFIGS
from mpilm.config.presets import VOCABULARIES
from mpilm.config.schema import Config, resolve_config
from mpilm.config.settings import override
from mpilm.planner.profile import read_profile
from mpilm.planner.search import PlannedJob, search, to_flags

PRESETS = {  # changes that make a step take a few seconds
    "tiny": {},
    "llama-100m": {"train__global_batch": 4, "model__context_length": 256, "train__dtype": "float32"},
    "gpt2-124m": {"train__global_batch": 4, "train__micro_batch": 1, "model__context_length": 256, "train__dtype": "float32"},
}
RANKS = 2
ATTEMPTS = 5  # for a layout in a round, while other programs use the machine
WARM_UP = 2
MODELS = {"tiny": [], "12 layers of width 384": ["--model.n-layers", "12", "--model.d-model", "384", "--model.n-heads", "6"]}
STEPS = {"tiny": 10}
CLOSE = 1.03  # times the fastest step: equally good


def plan(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        machine = args.folder or f"{folder}/machine.json"
        if not Path(machine).exists():
            subprocess.run([*mpirun(2), sys.executable, "-m", "mpilm.doctor", "--calibrate", "--output", machine], check=True)
        for preset in PRESETS if args.preset == "tiny" else [args.preset]:
            compare(preset, machine, args.rounds)


def plan_memory(args: argparse.Namespace) -> None:
    """Compare the predicted memory of a rank, in every layout of 2 ranks, with the memory that a short run uses."""
    with tempfile.TemporaryDirectory() as folder:
        machine = args.folder or f"{folder}/machine.json"
        if not Path(machine).exists():
            subprocess.run(
                [*mpirun(RANKS), sys.executable, "-m", "mpilm.doctor", "--calibrate", "--output", machine], check=True
            )
        rows, ratios = [("model and layout", "predicted MiB", "measured MiB", "predicted / measured (goal: 0.93 .. 1.07)")], []
        for name, words in MODELS.items():
            config = parse_config(words)
            for each in search(PlannedJob(config, 2048, read_profile(machine)), RANKS)[0]:
                chosen = [] if each.config.parallel == resolve_config(Config()).parallel else to_flags(each).split()
                _, _, printed = training_run(RANKS, 4, "--checkpoint.every", "2", *words, *chosen)
                measured = float(re.findall(r"memory ([\d,]+) MiB", printed)[-1].replace(",", ""))
                predicted = each.memory_bytes / 2**20
                ratios.append(predicted / measured)
                rows.append((f"{name}: {each.label}", f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.3f}"))
                print("  ".join(rows[-1]), flush=True)
    print_table(f"memory of a rank, {RANKS} ranks", rows)
    print(f"  predicted / measured: median {statistics.median(ratios):.3f}, {min(ratios):.3f} .. {max(ratios):.3f}")
    print("JSON " + json.dumps({"what": "plan memory", "ratios": ratios}))


def parse_config(words: list[str]) -> Config:
    """Return the config of a command line."""
    return resolve_config(parse(words, Config(), "train", "", CONFIGS))


def make_job(preset: str, machine: str) -> PlannedJob:
    config = resolve_config(override(CONFIGS[preset](), **PRESETS.get(preset, {})))
    return PlannedJob(config, VOCABULARIES.get(preset, 2048), read_profile(machine))


def compare(preset: str, machine: str, wanted: int) -> None:
    """Measure the layouts in turn, each in processes of its own, since a process does not return all memory of a model."""
    found = [each for each in search(make_job(preset, machine), RANKS)[0] if each.config.train.recompute == "none"]
    times: dict[str, list[float]] = {each.label: [] for each in found}
    for _ in range(wanted):
        for number, each in enumerate(found):
            words = ["--preset", preset, "--folder", machine, "--pipeline", str(number)]
            command = [*mpirun(RANKS), sys.executable, BENCH, "plan-worker", *words]
            for _ in range(ATTEMPTS):
                done = json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                )
                if done["other_cores"] <= MAX_OTHER_CORES:
                    times[each.label].append(done["step_s"])
                    break
    print_plan(preset, {each.label: each.time for each in found}, times)


def plan_worker(args: argparse.Namespace) -> None:
    """Measure one layout."""
    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    planned = make_job(args.preset, args.folder)
    each = search(planned, comm.size)[0][args.pipeline]
    reduce, step = make_reduce(comm), make_step(each.config, planned.vocab_size, each.cut, comm)
    time_step(step, WARM_UP, comm, reduce)
    load = Load(reduce)
    took_s = time_step(step, STEPS.get(args.preset, 3), comm, reduce)
    other_cores = reduce(load.other_cores(), "max")
    if comm.rank == 0:
        print(json.dumps({"step_s": took_s, "other_cores": other_cores}), flush=True)


def time_step(step: Callable[[], object], steps: int, comm, reduce: Callable[..., float]) -> float:  # type: ignore[no-untyped-def]
    """Return the median seconds of a step."""
    times = []
    for _ in range(steps):
        comm.barrier()
        began = time.perf_counter()
        step()
        times.append(reduce(time.perf_counter() - began, "max"))
    return statistics.median(times)


def make_step(config, vocab_size: int, blocks_per_stage, comm) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    from mpilm.engine.hardware import detect_hardware
    from mpilm.engine.step import train_step
    from mpilm.engine.train_model import TrainModel
    from mpilm.mesh.mesh import Mesh
    from mpilm.parallel.layout_check import resolve_mesh_shape
    from mpilm.verification.layouts import RandomTokens

    hardware, mesh = detect_hardware(config.train, comm), Mesh(resolve_mesh_shape(config, comm.size), comm)
    model = TrainModel(config, mesh, blocks_per_stage, vocab_size, hardware.device, 16)
    model.init_parameters()
    source, steps = RandomTokens(config, vocab_size), iter(range(10**6))
    return lambda: train_step(model, source, next(steps))


def print_plan(preset: str, predictions: dict, times: dict[str, list[float]]) -> None:  # type: ignore[type-arg]
    measured = {label: statistics.median(seconds) for label, seconds in times.items()}
    rows: list[tuple[str, ...]] = [("layout", "predicted s", "measured s", "predicted / measured")]
    for label, seconds in measured.items():
        spread = f"{min(times[label]):.3f} .. {max(times[label]):.3f}"
        predicted_s = predictions[label].total_s
        rows.append((label, f"{predicted_s:.3f}", f"{seconds:.3f} ({spread})", f"{predicted_s / seconds:.3f}"))
    print_table(f"plan ({preset}), 2 ranks, {len(next(iter(times.values())))} rounds", rows)
    errors = [abs(predictions[label].total_s / seconds - 1) for label, seconds in measured.items()]
    first, fastest = next(iter(measured)), min(measured, key=measured.__getitem__)
    print(f"  error: median {100 * statistics.median(errors):.1f}%, worst {100 * max(errors):.1f}% (goals: 4%, 9%)")
    print(
        f"  picked: {first}; fastest: {fastest}; picked / fastest {measured[first] / measured[fastest]:.3f} (goal: <= {CLOSE})"
    )
    for label, each in predictions.items():
        print(f"    {label}: " + ", ".join(f"{k} {v:.4f}" for k, v in each.parts.items()))
    print(
        "JSON "
        + json.dumps({"what": f"plan {preset}", "predicted": {w: t.total_s for w, t in predictions.items()}, "measured": times})
    )
