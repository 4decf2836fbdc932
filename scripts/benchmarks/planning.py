"""What mpilm.plan says beforehand, against what is then measured: the step of every layout, and which is best."""

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

from benchmarks.measure import BENCH, OTHERS_ALLOWED, Load, mpirun, over_all, table
from benchmarks.speed import training_run
from mpilm.config.parse import parse
from mpilm.config.presets import PRESETS as CONFIGS
from mpilm.config.presets import VOCABULARIES
from mpilm.config.schema import Config, override, resolve_config
from mpilm.planner.profile import read_profile
from mpilm.planner.search import PlannedJob, search, to_flags

PRESETS = {  # changes that make a step of a few seconds of it
    "tiny": {},
    "llama-100m": {"train__global_batch": 4, "model__context_length": 256, "train__dtype": "float32"},
    "gpt2-124m": {"train__global_batch": 4, "train__micro_batch": 1, "model__context_length": 256, "train__dtype": "float32"},
}
RANKS = 2
TRIES = 5  # of a layout in a round, where other programs are at work
WARM_UP = 2
MODELS = {"tiny": [], "12 layers of width 384": ["--model.n-layers", "12", "--model.d-model", "384", "--model.n-heads", "6"]}
STEPS = {"tiny": 10}
CLOSE = 1.03  # times the fastest: as good as that


def plan(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        machine = args.folder or f"{folder}/machine.json"
        if not Path(machine).exists():
            subprocess.run([*mpirun(2), sys.executable, "-m", "mpilm.doctor", "--calibrate", "--output", machine], check=True)
        for preset in PRESETS if args.preset == "tiny" else [args.preset]:
            compare(preset, machine, args.rounds)


def plan_memory(args: argparse.Namespace) -> None:
    """What is said of a rank's memory, in every layout of 2 ranks, against what a run of a few steps has used."""
    with tempfile.TemporaryDirectory() as folder:
        machine = args.folder or f"{folder}/machine.json"
        if not Path(machine).exists():
            subprocess.run(
                [*mpirun(RANKS), sys.executable, "-m", "mpilm.doctor", "--calibrate", "--output", machine], check=True
            )
        rows, ratios = [("model and layout", "predicted MiB", "measured MiB", "predicted / measured (goal: 0.93 .. 1.07)")], []
        for name, words in MODELS.items():
            config = replaced_by(words)
            for each in search(PlannedJob(config, 2048, read_profile(machine)), RANKS)[0]:
                chosen = [] if each.config.parallel == resolve_config(Config()).parallel else to_flags(each).split()
                _, _, printed = training_run(RANKS, 4, "--checkpoint.every", "2", *words, *chosen)
                measured = float(re.findall(r"memory ([\d,]+) MiB", printed)[-1].replace(",", ""))
                said = each.memory_bytes / 2**20
                ratios.append(said / measured)
                rows.append((f"{name}: {each.label}", f"{said:.0f}", f"{measured:.0f}", f"{said / measured:.3f}"))
                print("  ".join(rows[-1]), flush=True)
    table(f"memory of a rank, {RANKS} ranks", rows)
    print(f"  predicted / measured: median {statistics.median(ratios):.3f}, {min(ratios):.3f} .. {max(ratios):.3f}")
    print("JSON " + json.dumps({"what": "plan memory", "ratios": ratios}))


def replaced_by(words: list[str]) -> Config:
    """The config of a command line."""
    return resolve_config(parse(words, Config(), "train", "", CONFIGS))


def job(preset: str, machine: str) -> PlannedJob:
    config = resolve_config(override(CONFIGS[preset](), **PRESETS.get(preset, {})))
    return PlannedJob(config, VOCABULARIES.get(preset, 2048), read_profile(machine))


def compare(preset: str, machine: str, wanted: int) -> None:
    """Every layout in turn, each in processes of its own, since models do not go when they are let go."""
    found = [each for each in search(job(preset, machine), RANKS)[0] if each.config.train.recompute == "none"]
    times: dict[str, list[float]] = {each.label: [] for each in found}
    for _ in range(wanted):
        for number, each in enumerate(found):
            words = ["--preset", preset, "--folder", machine, "--pipeline", str(number)]
            command = [*mpirun(RANKS), sys.executable, BENCH, "plan-worker", *words]
            for _ in range(TRIES):
                done = json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                )
                if done["others"] <= OTHERS_ALLOWED:
                    times[each.label].append(done["step_s"])
                    break
    show(preset, {each.label: each.time for each in found}, times)


def plan_worker(args: argparse.Namespace) -> None:
    """One layout."""
    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    planned = job(args.preset, args.folder)
    each = search(planned, comm.size)[0][args.pipeline]
    everyone, step = over_all(comm), side(each.config, planned.vocab_size, each.layout.cut, comm)
    turn(step, WARM_UP, comm, everyone)
    load = Load(everyone)
    took_s = turn(step, STEPS.get(args.preset, 3), comm, everyone)
    others = everyone(load.others(), "max")
    if comm.rank == 0:
        print(json.dumps({"step_s": took_s, "others": others}), flush=True)


def turn(step: Callable[[], object], steps: int, comm, everyone: Callable[..., float]) -> float:  # type: ignore[no-untyped-def]
    """Seconds of a step, the median of some."""
    times = []
    for _ in range(steps):
        comm.barrier()
        began = time.perf_counter()
        step()
        times.append(everyone(time.perf_counter() - began, "max"))
    return statistics.median(times)


def side(config, vocab_size: int, cut, comm) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    from mpilm.engine.hardware import detect_hardware
    from mpilm.engine.step import train_step
    from mpilm.engine.train_model import TrainModel
    from mpilm.mesh.mesh import Mesh
    from mpilm.parallel.layout_check import resolve_mesh_shape
    from mpilm.verification.layouts import RandomTokens

    machine = detect_hardware(config.train, comm)
    model = TrainModel(config, Mesh.build(resolve_mesh_shape(config, comm.size), comm), cut, vocab_size, machine.device, 16)
    for flat in model.flats.values():
        flat.values.tensor.normal_(0.0, 0.02)
    model.all_gather_parameters()
    source, steps = RandomTokens(config, vocab_size), iter(range(10**6))
    return lambda: train_step(model, source, next(steps))


def show(preset: str, said: dict, times: dict[str, list[float]]) -> None:  # type: ignore[type-arg]
    measured = {words: statistics.median(seconds) for words, seconds in times.items()}
    rows: list[tuple[str, ...]] = [("layout", "predicted s", "measured s", "predicted / measured")]
    for words, seconds in measured.items():
        spread = f"{min(times[words]):.3f} .. {max(times[words]):.3f}"
        rows.append((words, f"{said[words].total_s:.3f}", f"{seconds:.3f} ({spread})", f"{said[words].total_s / seconds:.3f}"))
    table(f"plan ({preset}), 2 ranks, {len(next(iter(times.values())))} rounds", rows)
    errors = [abs(said[words].total_s / seconds - 1) for words, seconds in measured.items()]
    first, fastest = next(iter(measured)), min(measured, key=measured.__getitem__)
    print(f"  error: median {100 * statistics.median(errors):.1f}%, worst {100 * max(errors):.1f}% (goals: 8%, 20%)")
    print(
        f"  picked: {first}; fastest: {fastest}; picked / fastest {measured[first] / measured[fastest]:.3f} (goal: <= {CLOSE})"
    )
    for words, each in said.items():
        print(f"    {words}: " + ", ".join(f"{k} {v:.4f}" for k, v in each.parts.items()))
    print(
        "JSON "
        + json.dumps({"what": f"plan {preset}", "predicted": {w: t.total_s for w, t in said.items()}, "measured": times})
    )
