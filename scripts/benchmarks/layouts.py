"""Memory of a rank under ZeRO and pipeline, and the step of a pipeline, each against its prediction."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.measure import BENCH, STEPS, make_config, mpirun, print_table
from benchmarks.speed import training_run

# With bytes as tokens the output matrix is small, and the stages are even.
EVEN = ["--model.n-layers", "24", "--parallel.pipeline", "2", "--data.tokenizer", "bytes"]


def shards(args: argparse.Namespace) -> None:
    layouts = [(2, p, z) for p, z in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0))]
    layouts += [(4, p, z) for p, z in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0))]
    rows = [("ranks", "pipeline", "ZeRO", "by formula MiB", "measured MiB", "measured / formula (goal: 0.95 .. 1.05)")]
    for ranks, pipeline, zero in layouts:
        words = ["--pipeline", str(pipeline), "--zero", str(zero)]
        command = [*mpirun(ranks), sys.executable, BENCH, "shards-worker", *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratios = [measured / predicted for predicted, measured in found]
        predicted, measured = max(found, key=lambda pair: pair[0])
        cells = (ranks, pipeline, zero, f"{predicted / 2**20:.0f}", f"{measured / 2**20:.0f}")
        rows.append((*map(str, cells), f"{min(ratios):.3f} .. {max(ratios):.3f}"))
        print("  ".join(rows[-1]), flush=True)
    print_table("permanent memory of a rank, 103 million parameters, M = 8", rows)


def shards_worker(args: argparse.Namespace) -> None:
    """Print, for every rank, the bytes by the formula, and the PSS after two steps minus the PSS before the model was built."""
    import torch

    from mpilm.comm.mpi import mpi_world
    from mpilm.config.presets import PRESETS
    from mpilm.config.schema import ParallelConfig, TrainConfig, resolve_config
    from mpilm.config.settings import override
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
    mesh = Mesh(resolve_mesh_shape(config, comm.size), comm)

    def train_two_steps(config) -> TrainModel:  # type: ignore[no-untyped-def]
        model = TrainModel(config, mesh, partition_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, torch.device("cpu"), 16)
        model.init_parameters()
        for step in range(2):
            train_step(model, RandomTokens(config), step)
        trim_heap()
        comm.barrier()
        return model

    train_two_steps(override(config, model__d_model=48, model__d_ff=128))  # loads all parts of the program
    before = proportional_bytes()
    comm.barrier()
    model = train_two_steps(config)
    after = proportional_bytes()
    held = model.memory_bytes()
    pairs = comm.all_gather_json([sum(held.values()) - held["passing"], after - before])
    if comm.rank == 0:
        print(json.dumps(pairs), flush=True)


def bubble(args: argparse.Namespace) -> None:
    """Compare the bubble in the rows of a run with the formula, for two stages with nearly the same work."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for name, count in ((name, count) for name in ("gpipe", "1f1b") for count in (2, 4, 8)):
            batch = ["--train.micro-batch", "4", "--train.global-batch", str(4 * count)]
            logged, _, _ = training_run(2, 3 * STEPS, *EVEN, "--parallel.schedule", name, *batch)
            bubbles = [bubble_parts(row) for row in logged if "rank_s" in row][STEPS:]
            found.setdefault((name, count), []).append(tuple(map(statistics.median, zip(*bubbles))))  # type: ignore[arg-type]
            print(name, count, found[name, count][-1], flush=True)
    rows = [("schedule", "microbatches", "by formula", "both ranks", "the rank that computes longest", "its bubble / formula")]
    for (name, count), pairs in found.items():
        both, longest = zip(*pairs)
        ratios, formula = [each * (count + 1) for each in longest], 1 / (count + 1)
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
        percent = [f"{each:.1%}" for each in (formula, statistics.median(both), statistics.median(longest))]
        rows.append((name, str(count), *percent, spread))
    print_table("bubble of 2 stages (goal: 0.95 .. 1.05 of the formula)", rows)


def bubble_parts(row: dict) -> tuple[float, float]:  # type: ignore[type-arg]
    """Return the bubble as a part of bubble and compute: over both ranks, and of the rank that computes longest."""
    bubble_s, compute_s = row["rank_s"]["bubble"], row["rank_s"]["compute"]
    longest_s, wait_s = max(zip(compute_s, bubble_s))
    return sum(bubble_s) / (sum(bubble_s) + sum(compute_s)), wait_s / (wait_s + longest_s)


def pipeline(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, BENCH, "pipeline-worker", *words], check=True)


def pipeline_worker(args: argparse.Namespace) -> None:
    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    found: dict[str, list[tuple[float, float]]] = {}
    names = ("gpipe", "1f1b", "interleaved", "zero-bubble")
    runs = {name: pipeline_side(make_config(f"{args.folder}/{name}", args.preset, train__threads=1,
            parallel__pipeline=2, parallel__schedule=name), comm) for name in names}  # fmt: skip
    for number in range(args.rounds + 1):
        for name, measure in runs.items():
            pair = measure(number)
            if number:  # the first one is a warm-up
                found.setdefault(name, []).append(pair)
    if comm.rank == 0:
        rows = [("schedule", "measured s", "simulated s", "measured / simulated (goal: 0.90 .. 1.10)")]
        for name, pairs in found.items():
            ratios = [a / b for a, b in pairs]
            a, b = (statistics.median(side) for side in zip(*pairs))
            rows.append(
                (name, f"{a:.4f}", f"{b:.4f}", f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")
            )
        print_table(f"pipeline ({args.preset}), 2 ranks, {args.rounds} rounds of {STEPS} steps", rows)


def pipeline_side(config, comm) -> Callable[[int], tuple[float, float]]:  # type: ignore[no-untyped-def]
    """Return a function that measures the seconds of forward, backward and reduction, and simulates them from the actions."""
    from mpilm.engine.step import train_step
    from mpilm.parallel.layout_check import replica_microbatch_count
    from mpilm.parallel.pipeline.actions import Action
    from mpilm.parallel.pipeline.schedules import lower, schedule
    from mpilm.planner.simulate import simulate
    from mpilm.trainer.build import build_run

    run = build_run(config, comm)
    run.mesh.check_calls(False)
    parallel, stages = config.parallel, len(run.model.blocks_per_stage)
    actions = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, replica_microbatch_count(config, run.mesh.shape))
    programs = [lower(of_rank, stages) for of_rank in actions]

    def measure(number: int) -> tuple[float, float]:
        costs: dict[str, list[float]] = {}
        walls = []
        for step in range(number * STEPS, (number + 1) * STEPS):
            comm.barrier()
            run.recorder.drain_spans()
            train_step(run.model, run.batches, step)
            spans = [span for span in run.recorder.drain_spans() if isinstance(span.event, Action)]
            walls.append(max(comm.all_gather_json(spans[-1].end_s - spans[0].start_s)))
            for action, start_s, end_s in spans:
                costs.setdefault(f"{action.kind} {action.stage}", []).append(end_s - start_s)
        by_rank = comm.all_gather_json({key: statistics.mean(seconds) for key, seconds in costs.items()})
        known = {key: seconds for of_rank in by_rank for key, seconds in of_rank.items()}
        simulated = simulate(programs, lambda kind, stage: known[f"{kind} {stage}"])
        return statistics.mean(walls), simulated.step_s

    return measure
