"""Sums and gathers of 2 ranks on one node, by size: mpilm's own, the MPI library's, gloo's, and a copy in memory."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.measure import BENCH, OTHERS_ALLOWED, Load, mpirun, over_all, table

SIZES = [4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20]  # bytes of a rank's float32 vector
MOVED = 128 << 20  # bytes in one turn of a side, about
MOST = 200  # repetitions
TRIES = 30

Sides = dict[str, Callable[[], object]]


def collectives(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, BENCH, "collectives-worker", *words], check=True)


def collectives_worker(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from mpilm.comm.mpi import mpi_world

    torch.set_num_threads(1)
    comm = mpi_world()
    dist.init_process_group("gloo", init_method=f"file://{args.folder}/gloo", rank=comm.rank, world_size=comm.size)
    for what, make in (("all_reduce", sums), ("reduce_scatter", scattered_sums), ("all_gather", gathers)):
        rows, found = [], {}
        for nbytes in SIZES:
            sides = make(nbytes // 4, comm)
            times, void = turns(sides, nbytes, args.rounds, comm)
            found[nbytes] = times
            ours, *others = times
            ratios = [statistics.median(b / a for a, b in zip(times[ours], times[name])) for name in others]
            if not rows:
                rows.append(("KiB", *(f"{name} us" for name in times), *(f"{name} / {ours}" for name in others), "void"))
            micro = [f"{1e6 * statistics.median(seconds):,.0f}" for seconds in times.values()]
            rows.append((f"{nbytes >> 10:,}", *micro, *(f"{ratio:.2f}" for ratio in ratios), str(void)))
        if comm.rank == 0:
            table(f"{what}, 2 ranks, float32, {args.rounds} rounds; times of others over mpilm's", rows)
            print("JSON " + json.dumps({"what": what, "times_s": found}), flush=True)
    dist.destroy_process_group()


def turns(sides: Sides, nbytes: int, wanted: int, comm) -> tuple[dict[str, list[float]], int]:  # type: ignore[no-untyped-def]
    """Seconds of one call of each side, a number for each valid round; and the number of void rounds."""
    everyone = over_all(comm)
    times: dict[str, list[float]] = {name: [] for name in sides}
    count, void = max(2, min(MOST, MOVED // nbytes)), 0
    for turn in range(TRIES):
        load, took = Load(everyone), {}
        for name, call in sides.items():
            call()
            comm.barrier()
            began = time.perf_counter()
            for _ in range(count):
                call()
            took[name] = everyone(time.perf_counter() - began, "max") / count
        others = everyone(load.others(), "max")
        if turn and others > OTHERS_ALLOWED and count * nbytes >= MOVED:  # short rounds say nothing about others
            void += 1
            continue
        for name, seconds in took.items() if turn else ():  # the first warms up
            times[name].append(seconds)
        if len(next(iter(times.values()))) == wanted:
            return times, void
    raise SystemExit("not valid: too many rounds were void; run this on a quiet machine")


def sums(numel: int, comm) -> Sides:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist

    x, y = torch.zeros(numel), torch.zeros(numel)
    return {
        "mpilm": gradient_sum(numel, comm, zero=0, shared=True),
        "mpilm, sent": gradient_sum(numel, comm, zero=0, shared=False),
        "MPI": lambda: comm.all_reduce(x),
        "gloo": lambda: dist.all_reduce(x),
        "copy": lambda: y.copy_(x),
    }


def scattered_sums(numel: int, comm) -> Sides:  # type: ignore[no-untyped-def]
    import torch
    from mpi4py import MPI

    x, y, mine = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel // comm.size)
    return {
        "mpilm": gradient_sum(numel, comm, zero=1, shared=True),
        "mpilm, sent": gradient_sum(numel, comm, zero=1, shared=False),
        "MPI": lambda: comm._comm.Reduce_scatter_block(x.numpy(), mine.numpy(), MPI.SUM),
        "copy": lambda: y.copy_(x),
    }


def gathers(numel: int, comm) -> Sides:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist

    mine, whole, other = torch.zeros(numel // comm.size), torch.zeros(numel), torch.zeros(numel)
    return {
        "mpilm": lambda: comm.all_gather(mine, whole),
        "MPI": lambda: comm._comm.Allgather(mine.numpy(), whole.numpy()),
        "gloo": lambda: dist.all_gather_into_tensor(whole, mine),
        "copy": lambda: other.copy_(whole),
    }


def gradient_sum(numel: int, comm, zero: int, shared: bool) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    """The sum of a step's gradients, a microbatch a rank."""
    import torch
    from torch import nn

    from mpilm.parallel.flat import FlatParameters
    from mpilm.parallel.layout import resolve_layouts
    from mpilm.parallel.reduce.build import make_step_reducer

    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(0))
    flat = FlatParameters(resolve_layouts({"weight": (numel,)}, {}), torch.device("cpu"), zero, comm.rank, comm.size)
    flat.install(model)
    total = make_step_reducer(flat, model, comm, comm.size, shared=shared)
    total.begin(0)
    total.end(0)

    def again() -> None:
        total.started = 0
        total.reduce()

    return again
