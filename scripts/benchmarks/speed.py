"""Speed, start-up time and memory of data-parallel training, against a plain torch loop, independent runs, and torch DDP."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import (
    BENCH,
    MAX_OTHER_CORES,
    MAX_ROUNDS,
    ROOT,
    STEPS,
    Load,
    make_config,
    mpilm_side,
    mpirun,
    print_report,
    print_table,
    speed_ratios,
    time_sides,
)


def torch_side(config, rank: int = 0, ranks: int = 1, **options: Callable) -> Callable[[int], None]:  # type: ignore[no-untyped-def, type-arg]
    """Return the step of the plain torch loop on mpilm's batches; `options`: those of torch_loop that distribute it."""
    from benchmarks.plain import torch_loop
    from mpilm.comm.base import SelfComm
    from mpilm.data.batch import Batches
    from mpilm.data.corpus import open_corpus
    from mpilm.data.samples import CorpusSamples, TextExamples

    corpus = open_corpus(config.data, SelfComm())
    stream = TextExamples(CorpusSamples(corpus, config.model.context_length, config.data.eval_fraction))
    batches = Batches(stream, config.train.seed, config.train.global_batch, config.train.micro_batch)
    return torch_loop(config, batches, corpus.tokenizer.vocab_size, rank=rank, ranks=ranks, **options)


def overhead(args: argparse.Namespace) -> None:
    from mpilm.comm.base import SelfComm

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(folder, args.preset, train__threads=args.threads)
        comm = SelfComm()
        sides = {"mpilm, one rank": mpilm_side(config, comm), "plain torch loop": torch_side(config)}
        times, void = time_sides(sides, args.rounds, comm)
    ratios = speed_ratios(times, "plain torch loop", "mpilm, one rank")
    print_report(f"overhead ({args.preset})", times, {"mpilm / plain torch": (ratios, ">= 0.97")}, void)


WIDE = {
    "model__d_model": 768,
    "model__n_layers": 6,
    "model__n_heads": 12,
    "model__context_length": 512,
    "train__global_batch": 4,
}


def dtype(args: argparse.Namespace) -> None:
    """Compare one rank in bfloat16 with itself in float32, on all cores."""
    from mpilm.comm.base import SelfComm

    with tempfile.TemporaryDirectory() as folder:
        comm = SelfComm()
        sides = {name: mpilm_side(make_config(f"{folder}/{name}", args.preset, train__dtype=name, **WIDE), comm)
                 for name in ("float32", "bfloat16")}  # fmt: skip
        times, void = time_sides(sides, args.rounds, comm)
    ratios = {"bfloat16 / float32": (speed_ratios(times, "float32", "bfloat16"), ">= 1.5")}
    print_report("6 blocks of width 768, 512 tokens per microbatch", times, ratios, void)


SETTINGS = {  # of 10 million parameters with a vocabulary of 2,048
    "compute-bound": {"train__global_batch": 16, "train__micro_batch": 2},  # 1,024 tokens per rank and step
    "communication-bound": {"train__global_batch": 2, "train__micro_batch": 1},  # 128
}
TEN_MILLION = {"model__d_model": 320, "model__n_layers": 8, "model__n_heads": 5, "model__context_length": 128}


def data_parallel_worker(args: argparse.Namespace) -> None:
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.plain import shard_fsdp2, skip_fsdp2_sync
    from mpilm.comm.base import SelfComm
    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    dist.init_process_group("gloo", init_method=f"file://{args.folder}/gloo", rank=comm.rank, world_size=comm.size)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(comm.rank), "LOCAL_RANK": str(comm.rank), "WORLD_SIZE": "2"}
    accelerator = Accelerator(cpu=True)
    for setting, batch in SETTINGS.items():
        shape = {**TEN_MILLION, **batch, "train__threads": 1}
        config = make_config(f"{args.folder}/{setting}", args.preset, **shape)
        ranks = {"rank": comm.rank, "ranks": comm.size}

        def side(name, comm=comm, shape=shape, setting=setting, **changes):  # type: ignore[no-untyped-def]
            return mpilm_side(make_config(f"{args.folder}/{setting}-{name}", args.preset, **{**shape, **changes}), comm)

        sides = {
            "mpilm, 2 ranks": side("together"),
            "two independent runs": side(f"alone-{comm.rank}", SelfComm(), train__global_batch=config.train.global_batch // 2),
            "torch DDP, gloo": torch_side(config, **ranks, wrap=DistributedDataParallel),
            "torch FSDP2, gloo": torch_side(config, **ranks, wrap=shard_fsdp2, skip_sync=skip_fsdp2_sync),
            "Accelerate, gloo": torch_side(config, **ranks, wrap=accelerator.prepare),
            "mpilm, ZeRO-3": side("zero", parallel__zero=3),
            "mpilm, MPI's Allreduce": side("library", train__reproducible=False),
        }
        times, void = time_sides(sides, args.rounds, comm)
        if comm.rank == 0:
            ours, small = "mpilm, 2 ranks", setting == "communication-bound"
            print_report(f"data-parallel, {setting} ({args.preset}, 10 million parameters)", times, {
                "mpilm / independent": (speed_ratios(times, "two independent runs", ours), ">= 0.90" if small else ">= 0.97"),
                "mpilm / DDP": (speed_ratios(times, "torch DDP, gloo", ours), ">= 1.30" if small else ">= 1.00"),
                "mpilm / Accelerate": (speed_ratios(times, "Accelerate, gloo", ours), ">= 1.30" if small else ">= 1.00"),
                "mpilm ZeRO-3 / FSDP2": (speed_ratios(times, "torch FSDP2, gloo", "mpilm, ZeRO-3"), ">= 1.00"),
                "reproducible / not": (speed_ratios(times, "mpilm, MPI's Allreduce", ours), ">= 0.97"),
            }, void)  # fmt: skip
    dist.destroy_process_group()


def data_parallel(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, BENCH, "data-parallel-worker", *words], check=True)


def guards_worker(args: argparse.Namespace) -> None:
    from unittest import mock

    from mpilm.comm.mpi import mpi_world
    from mpilm.engine.recheck import Recheck
    from mpilm.engine.state_check import check_state
    from mpilm.engine.step import train_step
    from mpilm.launch.watchdog import Watchdog
    from mpilm.parallel.digests import StateDigests
    from mpilm.trainer import build

    comm = mpi_world()
    run = build.build_run(make_config(f"{args.folder}/guarded", args.preset, train__threads=1), comm)
    watchdog = Watchdog(run.mesh.recorder, comm)

    def guarded(step: int) -> None:
        checks = step % STEPS == 0  # ten times as often as by default (--fault.check-every)
        run.mesh.recorder.enter("step", step)
        run.mesh.check_calls(checks)
        train_step(run.model, run.batches, step)
        run.mesh.check_calls(False)
        if checks:
            check_state(run.model, step + 1)

    bare = mpilm_side(make_config(f"{args.folder}/bare", args.preset, train__threads=1), comm)

    def without(step: int) -> None:
        with (
            mock.patch("mpilm.engine.step.state_mismatch", return_value=0.0),
            mock.patch.object(StateDigests, "recording", return_value=contextlib.nullcontext()),
        ):
            bare(step)

    recheck = Recheck(run.model, every=1)

    def rechecked(step: int) -> None:
        train_step(run.model, run.batches, step, recheck=recheck)

    def certified(step: int) -> None:
        train_step(run.model, run.batches, step)
        run.model.digest_state()

    def plain(step: int) -> None:
        train_step(run.model, run.batches, step)

    sides = {"guarded": guarded, "without": without, "step": plain, "rechecked step": rechecked, "certified step": certified}
    times, void = time_sides(sides, args.rounds, comm)
    watchdog.close()
    defaults = {"rechecked step": run.config.fault.recheck_every, "certified step": run.config.run.certify_every}
    costs = {  # as a share of the time of all steps
        side: [(1 / ratio - 1) / every for ratio in speed_ratios(times, "step", side)] for side, every in defaults.items()
    }
    if comm.rank == 0:
        print_report(f"guards ({args.preset})", times, {
            "guarded / without": (speed_ratios(times, "without", "guarded"), ">= 0.99"),
            **{f"cost of a {side} in {every}": (costs[side], "<= 0.005") for side, every in defaults.items()},
        }, void)  # fmt: skip


def guards(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, BENCH, "guards-worker", *words], check=True)


def training_run(ranks: int, steps: int, *words: str, every: int = 1) -> tuple[list[dict], float, str]:  # type: ignore[type-arg]
    """Train, logging each `every` steps; return the metrics rows, the seconds from the launcher's call to the first step, and
    the output."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *mpirun(ranks),
            sys.executable,
            "-m",
            "mpilm.train",
            "--run.dir",
            f"{folder}/run",
            "--train.steps",
            str(steps),
        ]
        command += ["--run.eval-every", "0", "--generate.max-tokens", "0", "--run.log-every", str(every), *words]
        began, first, printed = time.monotonic(), 0.0, []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if "  step " in line and not first:
                    first = time.monotonic() - began
        if process.returncode:
            raise SystemExit("".join(printed))
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        return rows, first, "".join(printed)


SMALL = ["--model.d-model", "128", "--model.n-layers", "4", "--model.n-heads", "4", "--model.context-length", "128"]
SMALL += ["--train.global-batch", "8", "--train.micro-batch", "1"]  # 1,024 tokens a step


def oversubscribed(args: argparse.Namespace) -> None:
    """Log every tenth step, as by default: ranks exchange what a row holds."""
    _compare_crowded(args, args.preset, [], 40, 0.9)
    _compare_crowded(args, "4 blocks of width 128", SMALL, 100, 0.75)


def _compare_crowded(args: argparse.Namespace, what: str, words: list[str], steps: int, goal: float) -> None:
    times, void = {"8 ranks": [], "2 ranks": []}, 0  # type: ignore[var-annotated]
    while len(times["2 ranks"]) < args.rounds and void < MAX_ROUNDS:
        load, took = Load(), {}
        for name, ranks in (("8 ranks", 8), ("2 ranks", 2)):
            rows, _, _ = training_run(ranks, steps, "--preset", args.preset, *words, every=10)
            ends = {row["step"]: row["time"] for row in rows if "step_s" in row}  # a rank also waits between its steps
            took[name] = (ends[steps] - ends[10]) / (steps - 10)
        if load.other_cores() > MAX_OTHER_CORES:
            void += 1
            continue
        for name, seconds in took.items():
            times[name].append(seconds)
    ratios = {"8 ranks / 2 ranks": (speed_ratios(times, "2 ranks", "8 ranks"), f">= {goal:.2f}")}
    print_report(f"crowded ({what})", times, ratios, void, steps)


def start(args: argparse.Namespace) -> None:
    imports = "import torch; from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"
    beyond = []
    for _ in range(args.rounds + 1):
        began = time.monotonic()
        subprocess.run([*mpirun(2), sys.executable, "-c", imports], check=True)
        floor = time.monotonic() - began
        _, first, _ = training_run(2, 2, "--preset", args.preset)
        beyond.append((first, floor))
    beyond = beyond[1:]  # the first one filled the caches
    rows = [("", "median s", "lowest .. highest")]
    named = {"mpirun to the first step": [f for f, _ in beyond], "importing torch and mpi4py": [f for _, f in beyond]}
    named["difference (goal: at most 3 s)"] = [a - b for a, b in beyond]
    rows += [(n, f"{statistics.median(t):.2f}", f"{min(t):.2f} .. {max(t):.2f}") for n, t in named.items()]
    print_table(f"start ({args.preset}): {args.rounds} rounds", rows)


def memory(args: argparse.Namespace) -> None:
    wide = "--model.d-model 512 --model.n-layers 8 --model.n-heads 8"
    shapes = {
        "tiny": "",
        "tiny, 16 sequences per microbatch": "--train.micro-batch 16 --train.global-batch 32",
        "26M parameters": f"{wide} --train.global-batch 4",
        "the same in bfloat16": f"{wide} --train.dtype bfloat16 --train.global-batch 8 --train.micro-batch 4",
        "87M parameters": "--preset llama-100m --train.dtype float32 --train.global-batch 2 --data.tokenizer auto",
    }
    rows = [("model, 2 ranks", "predicted MiB", "measured MiB", "measured / predicted (goal: 0.90 .. 1.10)")]
    for name, words in shapes.items():
        _, _, printed = training_run(2, 3, *words.split())
        measured, predicted = (
            float(x.replace(",", "")) for x in re.findall(r"peak memory ([\d,]+) MiB, ([\d,]+) MiB", printed)[0]
        )
        rows.append((name, f"{predicted:.0f}", f"{measured:.0f}", f"{measured / predicted:.3f}"))
    print_table("memory of a rank", rows)
