"""Memory of a rank under ZeRO and pipeline, and a pipeline's step, each against what is said of it beforehand."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.measure import BENCH, STEPS, configured, mpirun, table
from benchmarks.speed import training_run

EVEN = ["--model.n-layers", "24", "--parallel.pipeline", "2", "--data.tokenizer", "bytes"]  # whose head is small


def shards(args: argparse.Namespace) -> None:
    layouts = [(2, p, z) for p, z in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0))]
    layouts += [(4, p, z) for p, z in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0))]
    rows = [("ranks", "pipeline", "ZeRO", "by formula MiB", "measured MiB", "measured / formula (goal: 0.95 .. 1.05)")]
    for ranks, pipeline, zero in layouts:
        words = ["--pipeline", str(pipeline), "--zero", str(zero)]
        command = [*mpirun(ranks), sys.executable, BENCH, "shards-worker", *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        predicted, measured = max(found, key=lambda pair: pair[0])
        ratios = [have / say for say, have in found]
        cells = (ranks, pipeline, zero, f"{predicted / 2**20:.0f}", f"{measured / 2**20:.0f}")
        rows.append((*map(str, cells), f"{min(ratios):.3f} .. {max(ratios):.3f}"))
        print("  ".join(rows[-1]), flush=True)
    table("what a rank holds for good, 103 million parameters, M = 8", rows)


def shards_worker(args: argparse.Namespace) -> None:
    """PSS after two steps less PSS before the model was built, and what the layout's formula says of it, of every rank."""
    import torch

    from mpilm.comm.mpi import mpi_world
    from mpilm.config.presets import PRESETS
    from mpilm.config.schema import ParallelConfig, TrainConfig, override, resolve_config
    from mpilm.engine.hardware import detect_hardware
    from mpilm.engine.step import train_step
    from mpilm.engine.train_model import TrainModel
    from mpilm.mesh.mesh import Mesh
    from mpilm.parallel.layout_check import partition_by_cost, resolve_mesh_shape
    from mpilm.telemetry.memory import proportional_bytes, trim_heap
    from mpilm.verification.layouts import VOCAB_SIZE, RandomTokens

    comm = mpi_world()
    config = override(PRESETS["llama-100m"](), model__context_length=16, model__n_layers=16, model__tie_embeddings=False)
    train = TrainConfig(global_batch=8, micro_batch=1, threads=1, device="cpu")
    config = resolve_config(
        dataclasses.replace(config, train=train, parallel=ParallelConfig(pipeline=args.pipeline, zero=args.zero))
    )
    detect_hardware(config.train, comm)
    mesh = Mesh.build(resolve_mesh_shape(config, comm.size), comm)

    def trained(config) -> TrainModel:  # type: ignore[no-untyped-def]
        model = TrainModel(config, mesh, partition_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, torch.device("cpu"), 16)
        model.init_parameters()
        for step in range(2):
            train_step(model, RandomTokens(config), step)
        trim_heap()
        comm.barrier()
        return model

    trained(override(config, model__d_model=48, model__d_ff=128))  # so that the program itself is all there
    before = proportional_bytes()
    comm.barrier()
    model = trained(config)
    after = proportional_bytes()
    held = model.memory_bytes()
    everyone = comm.all_gather_json([sum(held.values()) - held["passing"], after - before])
    if comm.rank == 0:
        print(json.dumps(everyone), flush=True)


def bubble(args: argparse.Namespace) -> None:
    """What the rows of a run say that ranks wait for each other, where both stages have nearly the same work."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for name, count in ((name, count) for name in ("gpipe", "1f1b") for count in (2, 4, 8)):
            batch = ["--train.micro-batch", "4", "--train.global-batch", str(4 * count)]
            logged, _, _ = training_run(2, 3 * STEPS, *EVEN, "--parallel.schedule", name, *batch)
            waits = [waiting(row) for row in logged if "rank_s" in row][STEPS:]
            found.setdefault((name, count), []).append(tuple(map(statistics.median, zip(*waits))))  # type: ignore[arg-type]
            print(name, count, found[name, count][-1], flush=True)
    rows = [("schedule", "microbatches", "by formula", "both ranks", "the one that computes longest", "of it / formula")]
    for (name, count), pairs in found.items():
        both, longest = zip(*pairs)
        ratios, formula = [each * (count + 1) for each in longest], 1 / (count + 1)
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
        percent = [f"{each:.1%}" for each in (formula, statistics.median(both), statistics.median(longest))]
        rows.append((name, str(count), *percent, spread))
    table("bubble of 2 stages (goal: 0.95 .. 1.05 of the formula)", rows)


def waiting(row: dict) -> tuple[float, float]:  # type: ignore[type-arg]
    """The part of bubble and computing together that is bubble: over both ranks, and of the one that computes longest."""
    bubble_s, compute_s = row["rank_s"]["bubble"], row["rank_s"]["compute"]
    last, wait_s = max(zip(compute_s, bubble_s))
    return sum(bubble_s) / (sum(bubble_s) + sum(compute_s)), wait_s / (wait_s + last)


def pipeline(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, BENCH, "pipeline-worker", *words], check=True)


def pipeline_worker(args: argparse.Namespace) -> None:
    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    found: dict[str, list[tuple[float, float]]] = {}
    names = ("gpipe", "1f1b", "interleaved", "zero-bubble")
    runs = {name: pipeline_side(configured(f"{args.folder}/{name}", args.preset, train__threads=1,
            parallel__pipeline=2, parallel__schedule=name), comm) for name in names}  # fmt: skip
    for number in range(args.rounds + 1):
        for name, measure in runs.items():
            pair = measure(number)
            if number:  # the first warms up
                found.setdefault(name, []).append(pair)
    if comm.rank == 0:
        rows = [("schedule", "measured s", "simulated s", "measured / simulated (goal: 0.90 .. 1.10)")]
        for name, pairs in found.items():
            ratios = [a / b for a, b in pairs]
            a, b = (statistics.median(side) for side in zip(*pairs))
            rows.append(
                (name, f"{a:.4f}", f"{b:.4f}", f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")
            )
        table(f"pipeline ({args.preset}), 2 ranks, {args.rounds} rounds of {STEPS} steps", rows)


def pipeline_side(config, comm) -> Callable[[int], tuple[float, float]]:  # type: ignore[no-untyped-def]
    """Median seconds of forward, backward and reduction of a step, and the same simulated from the costs of the actions."""
    from mpilm.engine.step import train_step
    from mpilm.parallel.layout_check import replica_microbatch_count
    from mpilm.parallel.pipeline.actions import Action
    from mpilm.parallel.pipeline.lower import lower
    from mpilm.parallel.pipeline.schedules import schedule
    from mpilm.planner.simulate import simulate
    from mpilm.trainer.build import build_run

    run = build_run(config, comm)
    run.mesh.check_calls(False)
    parallel, stages = config.parallel, len(run.model.cut)
    actions = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, replica_microbatch_count(config, run.mesh.shape))
    programs = [lower(theirs, stages) for theirs in actions]

    def measure(number: int) -> tuple[float, float]:
        costs: dict[str, list[float]] = {}
        walls = []
        for step in range(number * STEPS, (number + 1) * STEPS):
            comm.barrier()
            run.mesh.activity.take()
            train_step(run.model, run.batches, step)
            spans = [span for span in run.mesh.activity.take() if isinstance(span.what, Action)]
            walls.append(max(comm.all_gather_json(spans[-1].end_s - spans[0].start_s)))
            for action, start_s, end_s in spans:
                costs.setdefault(f"{action.kind} {action.stage}", []).append(end_s - start_s)
        everyone = comm.all_gather_json({key: statistics.mean(seconds) for key, seconds in costs.items()})
        known = {key: seconds for theirs in everyone for key, seconds in theirs.items()}
        simulated = simulate(programs, lambda kind, stage: known[f"{kind} {stage}"])
        return statistics.mean(walls), simulated.step_s

    return measure
