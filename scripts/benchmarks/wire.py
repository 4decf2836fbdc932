"""Sums and gathers of 2 ranks on one node, by size: mpilm's, the MPI library's, gloo's, and a copy in memory."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.measure import BENCH, MAX_OTHER_CORES, Load, make_reduce, mpirun, print_table

SIZES = [4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20]  # bytes of a rank's float32 vector
BYTES_PER_ROUND = 128 << 20  # approximate traffic of a side in a round
MAX_REPETITIONS = 200
MAX_ROUNDS = 30

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
    for name, make in (("all_reduce", sum_sides), ("reduce_scatter", reduce_scatter_sides), ("all_gather", gather_sides)):
        rows, found = [], {}
        for nbytes in SIZES:
            sides = make(nbytes // 4, comm)
            times, void = time_calls(sides, nbytes, args.rounds, comm)
            found[nbytes] = times
            ours, *others = times
            ratios = [statistics.median(b / a for a, b in zip(times[ours], times[side])) for side in others]
            if not rows:
                rows.append(("KiB", *(f"{side} us" for side in times), *(f"{side} / {ours}" for side in others), "void"))
            micro = [f"{1e6 * statistics.median(seconds):,.0f}" for seconds in times.values()]
            rows.append((f"{nbytes >> 10:,}", *micro, *(f"{ratio:.2f}" for ratio in ratios), str(void)))
        if comm.rank == 0:
            print_table(f"{name}, 2 ranks, float32, {args.rounds} rounds; times relative to mpilm's", rows)
            print("JSON " + json.dumps({"what": name, "times_s": found}), flush=True)
    dist.destroy_process_group()


def time_calls(sides: Sides, nbytes: int, wanted: int, comm) -> tuple[dict[str, list[float]], int]:  # type: ignore[no-untyped-def]
    """Return the seconds per call of each side, a number for each valid round, and the number of void rounds."""
    reduce = make_reduce(comm)
    times: dict[str, list[float]] = {name: [] for name in sides}
    count, void = max(2, min(MAX_REPETITIONS, BYTES_PER_ROUND // nbytes)), 0
    for turn in range(MAX_ROUNDS):
        load, took = Load(reduce), {}
        for name, call in sides.items():
            call()
            comm.barrier()
            began = time.perf_counter()
            for _ in range(count):
                call()
            took[name] = reduce(time.perf_counter() - began, "max") / count
        other_cores = reduce(load.other_cores(), "max")
        is_short = count * nbytes < BYTES_PER_ROUND  # too short to measure the load
        if turn and other_cores > MAX_OTHER_CORES and not is_short:
            void += 1
            continue
        for name, seconds in took.items() if turn else ():  # the first round is a warm-up
            times[name].append(seconds)
        if len(next(iter(times.values()))) == wanted:
            return times, void
    raise SystemExit("too many rounds were void; run this on a quiet machine")


def sum_sides(numel: int, comm) -> Sides:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist

    x, y = torch.zeros(numel), torch.zeros(numel)
    return {
        "mpilm": gradient_sum(numel, comm, zero=0, shared=True),
        "mpilm, messages": gradient_sum(numel, comm, zero=0, shared=False),
        "MPI": lambda: comm.all_reduce(x),
        "gloo": lambda: dist.all_reduce(x),
        "copy": lambda: y.copy_(x),
    }


def reduce_scatter_sides(numel: int, comm) -> Sides:  # type: ignore[no-untyped-def]
    import torch
    from mpi4py import MPI

    x, y, own = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel // comm.size)
    return {
        "mpilm": gradient_sum(numel, comm, zero=1, shared=True),
        "mpilm, messages": gradient_sum(numel, comm, zero=1, shared=False),
        "MPI": lambda: comm._comm.Reduce_scatter_block(x.numpy(), own.numpy(), MPI.SUM),
        "copy": lambda: y.copy_(x),
    }


def gather_sides(numel: int, comm) -> Sides:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist

    own, full, other = torch.zeros(numel // comm.size), torch.zeros(numel), torch.zeros(numel)
    return {
        "mpilm": lambda: comm.all_gather(own, full),
        "MPI": lambda: comm._comm.Allgather(own.numpy(), full.numpy()),
        "gloo": lambda: dist.all_gather_into_tensor(full, own),
        "copy": lambda: other.copy_(full),
    }


def gradient_sum(numel: int, comm, zero: int, shared: bool) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    """Return a function that sums the gradients of a step with one microbatch per rank."""
    import torch
    from torch import nn

    from mpilm.parallel.flat import FlatParameters
    from mpilm.parallel.layout import resolve_layouts
    from mpilm.parallel.reduce.build import ReductionMethod, make_step_reducer

    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(0))
    flat = FlatParameters(resolve_layouts({"weight": (numel,)}, {}), torch.device("cpu"), zero, comm)
    flat.install(model)
    reducer = make_step_reducer(flat, model, comm.size, method=ReductionMethod(shared, False))
    reducer.begin_microbatch(0)
    reducer.end_microbatch(0)

    def reduce_again() -> None:
        reducer.started = 0
        reducer.reduce()

    return reduce_again
