#!/usr/bin/env python3
"""Measure mpilm against what else one would use, on this machine.

    python scripts/bench.py overhead          one rank against a plain torch loop
    python scripts/bench.py data-parallel     2 ranks against two independent runs, and against torch DDP with gloo
    python scripts/bench.py crowded           8 ranks against 2 on the same cores
    python scripts/bench.py start             mpirun to the first step, against importing the libraries
    python scripts/bench.py memory            memory of a rank against what the header predicts
    python scripts/bench.py shards            memory of a rank under ZeRO and pipeline against the formula
    python scripts/bench.py pipeline          2 ranks: a pipeline's step against what the simulator makes of its own actions

The sides of a comparison take turns within one call. A round during which other programs used the machine is void and is
made again. Printed: medians over the rounds and the ratio of each round to its neighbours, as median and spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

OTHERS_ALLOWED = 0.2  # cores that other programs may use during a round
STEPS = 5  # steps of one side in one round
TURNS = 40  # the most rounds tried


# What else runs on the machine.


def busy_s() -> float:
    """Seconds all cores together have been busy since the machine started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Seconds of processor time this process and its ended children have used."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


class Load:
    """How many cores others used between two moments; `everyone` adds up what the ranks used themselves."""

    def __init__(self, everyone: Callable[[float], float] = lambda mine: mine):
        self.everyone = everyone
        self.began = (time.monotonic(), busy_s(), everyone(own_s()))

    def others(self) -> float:
        wall, busy, own = time.monotonic() - self.began[0], busy_s() - self.began[1], self.everyone(own_s()) - self.began[2]
        return max(0.0, busy - own) / wall


# Tables.


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def ratio_row(name: str, ratios: list[float], goal: str) -> tuple[str, ...]:
    return name, f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} .. {max(ratios):.3f}", goal


def report(
    title: str, times_s: dict[str, list[float]], ratios: dict[str, tuple[list[float], str]], void: int, steps: int = STEPS
) -> None:
    rows: list[tuple[str, ...]] = [("side", "median s a step", "lowest .. highest")]
    rows += [(name, f"{statistics.median(t):.4f}", f"{min(t):.4f} .. {max(t):.4f}") for name, t in times_s.items()]
    table(f"{title}: {len(next(iter(times_s.values())))} rounds of {steps} steps, {void} void", rows)
    table(
        "speed ratios, round by round",
        [("ratio", "median", "lowest .. highest", "goal")] + [ratio_row(n, *r) for n, r in ratios.items()],
    )
    print(
        "JSON " + json.dumps({"what": title, "times_s": times_s, "ratios": {n: r[0] for n, r in ratios.items()}, "void": void})
    )


# The sides.


def configured(folder: str, preset: str, **changes: object):  # type: ignore[no-untyped-def]
    from mpilm.config import replaced, resolve
    from mpilm.presets import PRESETS

    return resolve(replaced(PRESETS[preset](), run__dir=folder, run__eval_every=0, checkpoint__resume="auto", **changes))


def mpilm_side(config, comm) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """One step of mpilm, as the training loop makes it."""
    from mpilm.trainer.build import build
    from mpilm.trainer.step import train_step

    run = build(config, comm)
    run.mesh.trust()
    return lambda step: train_step(run.model, run.batches, step) and None


def torch_side(config, wrap: Callable = lambda model: model, rank: int = 0, ranks: int = 1) -> Callable[[int], None]:  # type: ignore[no-untyped-def, type-arg]
    """One step of a plain torch loop written out: the same model and batches, torch's own AdamW and clipping.

    `wrap` may be DistributedDataParallel; then each rank takes its share of the microbatches, and gradients are averaged.
    """
    from contextlib import nullcontext

    import torch

    from mpilm.comm.base import SelfComm
    from mpilm.data.batch import Batches
    from mpilm.data.corpus import open_corpus
    from mpilm.model.init import initial_value
    from mpilm.model.llama import Llama, initial_std
    from mpilm.model.loss import loss_sum
    from mpilm.optim.rate import learning_rate

    train, shape = config.train, config.model
    corpus = open_corpus(config.data, SelfComm())
    batches = Batches(
        corpus, shape.context_length, config.data.eval_fraction, train.seed, train.global_batch, train.micro_batch
    )
    model = Llama(shape, corpus.tokenizer.vocab_size)
    for name, p in model.named_parameters():
        p.data = initial_value(train.seed, name, tuple(p.shape), initial_std(name, shape))
    if shape.tie_embeddings:
        model.head.weight = model.embed.weight
    wrapped = wrap(model)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)
    mine = range(train.global_batch // train.micro_batch)[rank::ranks]

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        for m in mine:
            batch = batches.train(number, m)
            quiet = m != mine[-1] and ranks > 1
            with wrapped.no_sync() if quiet else nullcontext():
                loss = loss_sum(wrapped(batch.tokens, batch.positions), batch.targets) / batches.target_tokens(number) * ranks
                loss.backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, number)
        optimizer.step()

    return step


def rounds(sides: dict[str, Callable[[int], None]], wanted: int, comm) -> tuple[dict[str, list[float]], int]:  # type: ignore[no-untyped-def]
    """Seconds a step of each side, a number for each valid round; and the number of void rounds."""
    import torch

    def everyone(value: float, op: str = "sum") -> float:
        x = torch.tensor([value], dtype=torch.float64)
        comm.all_reduce(x, op)
        return float(x)

    times: dict[str, list[float]] = {name: [] for name in sides}
    at, void = 0, 0
    for turn in range(TURNS):
        load, took = Load(everyone), {}
        for name, step in sides.items():
            comm.barrier()
            began = time.perf_counter()
            for number in range(at, at + STEPS):
                step(number)
            took[name] = everyone(time.perf_counter() - began, "max") / STEPS
        at += STEPS
        others = everyone(load.others(), "max")
        if turn == 0:
            continue  # warm-up
        if others > OTHERS_ALLOWED:
            void += 1
            if comm.rank == 0:
                print(f"round void: others used {others:.2f} cores", flush=True)
            continue
        for name, seconds in took.items():
            times[name].append(seconds)
        if len(next(iter(times.values()))) == wanted:
            return times, void
    raise SystemExit(f"not valid: {void} of {TURNS} rounds were void; run this on a quiet machine")


# The comparisons.


def overhead(args: argparse.Namespace) -> None:
    from mpilm.comm.base import SelfComm

    with tempfile.TemporaryDirectory() as folder:
        config = configured(folder, args.preset, train__threads=args.threads)
        comm = SelfComm()
        sides = {"mpilm, one rank": mpilm_side(config, comm), "plain torch loop": torch_side(config)}
        times, void = rounds(sides, args.rounds, comm)
    ratios = pairwise(times, "plain torch loop", "mpilm, one rank")
    report(f"overhead ({args.preset})", times, {"mpilm / plain torch": (ratios, ">= 0.97")}, void)


def pairwise(times: dict[str, list[float]], other: str, ours: str) -> list[float]:
    """How fast `ours` is as a part of `other`'s speed, round by round."""
    return [theirs / mine for theirs, mine in zip(times[other], times[ours])]


def data_parallel_worker(args: argparse.Namespace) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from mpilm.comm.base import SelfComm
    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    half = {"train__threads": 1}
    config = configured(f"{args.folder}/together", args.preset, **half)
    alone = configured(
        f"{args.folder}/alone{comm.rank}", args.preset, train__global_batch=config.train.global_batch // 2, **half
    )
    dist.init_process_group("gloo", init_method=f"file://{args.folder}/gloo", rank=comm.rank, world_size=comm.size)
    sides = {
        "mpilm, 2 ranks": mpilm_side(config, comm),
        "two independent runs": mpilm_side(alone, SelfComm()),
        "torch DDP with gloo": torch_side(config, DistributedDataParallel, comm.rank, comm.size),
        "mpilm, library's Allreduce": mpilm_side(
            configured(f"{args.folder}/library", args.preset, train__reproducible=False, **half), comm
        ),
    }
    times, void = rounds(sides, args.rounds, comm)
    if comm.rank == 0:
        ratios = {
            "mpilm / independent": (pairwise(times, "two independent runs", "mpilm, 2 ranks"), ">= 0.95"),
            "mpilm / DDP gloo": (pairwise(times, "torch DDP with gloo", "mpilm, 2 ranks"), ">= 1.00"),
            "reproducible / not": (pairwise(times, "mpilm, library's Allreduce", "mpilm, 2 ranks"), ">= 0.97"),
        }
        report(f"data-parallel ({args.preset})", times, ratios, void)
    dist.destroy_process_group()


def data_parallel(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, __file__, "data-parallel-worker", *words], check=True)


def mpirun(ranks: int) -> list[str]:
    launcher = Path(sys.executable).parent / "mpirun"
    return [str(launcher) if launcher.exists() else shutil.which("mpirun") or "mpirun", "-n", str(ranks)]


def training_run(ranks: int, steps: int, *words: str) -> tuple[list[dict], float, str]:  # type: ignore[type-arg]
    """Rows of metrics, seconds to the first step as the launcher's caller sees it, and what was printed."""
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
        command += ["--run.eval-every", "0", "--generate.max-tokens", "0", "--run.log-every", "1", *words]
        began, first, printed = time.monotonic(), 0.0, []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if line.startswith("step") and not first:
                    first = time.monotonic() - began
        if process.returncode:
            raise SystemExit("".join(printed))
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        return rows, first, "".join(printed)


def crowded(args: argparse.Namespace) -> None:
    steps, times, void = 12, {"8 ranks": [], "2 ranks": []}, 0  # type: ignore[var-annotated]
    while len(times["2 ranks"]) < args.rounds and void < TURNS:
        load, took = Load(), {}
        for name, ranks in (("8 ranks", 8), ("2 ranks", 2)):
            rows, _, _ = training_run(ranks, steps, "--preset", args.preset)
            took[name] = statistics.median(row["step_s"] for row in rows if row.get("step", 0) > 2)
        if load.others() > OTHERS_ALLOWED:
            void += 1
            continue
        for name, seconds in took.items():
            times[name].append(seconds)
    report(
        f"crowded ({args.preset})",
        times,
        {"8 ranks / 2 ranks": (pairwise(times, "2 ranks", "8 ranks"), ">= 0.80")},
        void,
        steps,
    )


def start(args: argparse.Namespace) -> None:
    imports = "import torch; from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"
    beyond = []
    for _ in range(args.rounds + 1):
        began = time.monotonic()
        subprocess.run([*mpirun(2), sys.executable, "-c", imports], check=True)
        floor = time.monotonic() - began
        _, first, _ = training_run(2, 2, "--preset", args.preset)
        beyond.append((first, floor))
    beyond = beyond[1:]  # the first filled the caches
    rows = [("", "median s", "lowest .. highest")]
    named = {"mpirun to the first step": [f for f, _ in beyond], "importing torch and mpi4py": [f for _, f in beyond]}
    named["beyond importing (goal: 3 s at most)"] = [a - b for a, b in beyond]
    rows += [(n, f"{statistics.median(t):.2f}", f"{min(t):.2f} .. {max(t):.2f}") for n, t in named.items()]
    table(f"start ({args.preset}): {args.rounds} rounds", rows)


def memory(args: argparse.Namespace) -> None:
    wide = "--model.d-model 512 --model.n-layers 8 --model.n-heads 8"
    shapes = {
        "tiny": "",
        "tiny, 16 sequences at once": "--train.micro-batch 16 --train.global-batch 32",
        "26M parameters": f"{wide} --train.global-batch 4",
        "the same in bfloat16": f"{wide} --train.dtype bfloat16 --train.global-batch 8 --train.micro-batch 4",
        "87M parameters": "--preset llama-100m --train.dtype float32 --train.global-batch 2 --data.tokenizer auto",
    }
    rows = [("model, 2 ranks", "predicted MiB", "measured MiB", "measured / predicted (goal: 0.90 .. 1.10)")]
    for name, words in shapes.items():
        _, _, printed = training_run(2, 3, *words.split())
        measured, predicted = (
            float(x.replace(",", "")) for x in re.findall(r"memory ([\d,]+) MiB.*most, ([\d,]+) MiB", printed)[0]
        )
        rows.append((name, f"{predicted:.0f}", f"{measured:.0f}", f"{measured / predicted:.3f}"))
    table("memory of a rank", rows)


def shards(args: argparse.Namespace) -> None:
    layouts = [(2, p, z) for p, z in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0))]
    layouts += [(4, p, z) for p, z in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0))]
    rows = [("ranks", "pipeline", "ZeRO", "by formula MiB", "measured MiB", "measured / formula (goal: 0.95 .. 1.05)")]
    for ranks, pipeline, zero in layouts:
        words = ["--pipeline", str(pipeline), "--zero", str(zero)]
        command = [*mpirun(ranks), sys.executable, __file__, "shards-worker", *words]
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
    from mpilm.config import Parallel, Train, replaced, resolve
    from mpilm.mesh.mesh import Mesh
    from mpilm.parallel.feasible import cut_by_cost, mesh_shape
    from mpilm.presets import PRESETS
    from mpilm.telemetry.memory import proportional_bytes, trim
    from mpilm.trainer.machine import look
    from mpilm.trainer.prove import VOCAB_SIZE, RandomTokens
    from mpilm.trainer.sharded import ShardedModel
    from mpilm.trainer.step import train_step

    comm = mpi_world()
    config = replaced(PRESETS["llama-100m"](), model__context_length=16, model__n_layers=16, model__tie_embeddings=False)
    train = Train(global_batch=8, micro_batch=1, threads=1, device="cpu")
    config = resolve(dataclasses.replace(config, train=train, parallel=Parallel(pipeline=args.pipeline, zero=args.zero)))
    look(config.train, comm)
    mesh = Mesh.build(mesh_shape(config, comm.size), comm)

    def trained(config) -> ShardedModel:  # type: ignore[no-untyped-def]
        model = ShardedModel(config, mesh, cut_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, torch.device("cpu"), 16)
        model.initialise()
        for step in range(2):
            train_step(model, RandomTokens(config), step)
        trim()
        comm.barrier()
        return model

    trained(replaced(config, model__d_model=48, model__d_ff=128))  # so that the program itself is all there
    before = proportional_bytes()
    comm.barrier()
    model = trained(config)
    after = proportional_bytes()
    held = model.held_bytes()
    everyone = comm.all_gather_json([sum(held.values()) - held["passing"], after - before])
    if comm.rank == 0:
        print(json.dumps(everyone), flush=True)


def pipeline(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, __file__, "pipeline-worker", *words], check=True)


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
    from mpilm.parallel.feasible import replica_microbatches
    from mpilm.parallel.pipeline.lower import lower
    from mpilm.parallel.pipeline.schedules import schedule
    from mpilm.parallel.pipeline.simulate import simulate
    from mpilm.trainer.build import build
    from mpilm.trainer.step import train_step

    run = build(config, comm)
    run.mesh.trust()
    parallel, stages = config.parallel, len(run.model.cut)
    actions = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, replica_microbatches(config, run.mesh.shape))
    programs = [lower(theirs, stages) for theirs in actions]

    def measure(number: int) -> tuple[float, float]:
        costs: dict[str, list[float]] = {}
        walls = []
        for step in range(number * STEPS, (number + 1) * STEPS):
            comm.barrier()
            times = train_step(run.model, run.batches, step).times
            walls.append(max(comm.all_gather_json(times[-1].end_s - times[0].start_s)))
            for action, start_s, end_s in times:
                costs.setdefault(f"{action.kind} {action.stage}", []).append(end_s - start_s)
        everyone = comm.all_gather_json({key: statistics.mean(seconds) for key, seconds in costs.items()})
        known = {key: seconds for theirs in everyone for key, seconds in theirs.items()}
        simulated = simulate(programs, lambda kind, stage: known[f"{kind} {stage}"])
        return statistics.mean(walls), simulated.step_s

    return measure


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    commands = {
        "overhead": overhead,
        "data-parallel": data_parallel,
        "data-parallel-worker": data_parallel_worker,
        "crowded": crowded,
        "start": start,
        "memory": memory,
        "shards": shards,
        "shards-worker": shards_worker,
        "pipeline": pipeline,
        "pipeline-worker": pipeline_worker,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands, metavar="WHAT", help="one of those above")
    parser.add_argument("--preset", default="tiny", help="the config to train (default: tiny)")
    parser.add_argument("--rounds", type=int, default=7, help="valid rounds wanted (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the one rank of overhead (default: 1)")
    for name, kind, default in (("--folder", str, ""), ("--pipeline", int, 1), ("--zero", int, 0)):
        parser.add_argument(name, type=kind, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    commands[args.what](args)


if __name__ == "__main__":
    main()
