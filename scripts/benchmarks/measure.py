"""Comparison of sides: in turns, on a quiet machine, as ratios with their spread."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCH = str(ROOT / "scripts" / "bench.py")
MAX_OTHER_CORES = 0.2  # cores that other programs may use during a round
STEPS = 5  # steps of one side in one round
MAX_ROUNDS = 40


# Load of other programs.


def busy_s() -> float:
    """Return the seconds that all cores together have been busy since the machine started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Return the seconds of processor time that this process and its finished children have used."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


class Load:
    """The load of other programs from construction on; `reduce` adds the processor time of all ranks."""

    def __init__(self, reduce: Callable[[float], float] = lambda own: own):
        self.reduce = reduce
        self.start = (time.monotonic(), busy_s(), reduce(own_s()))

    def other_cores(self) -> float:
        """Return the number of cores that other programs have used. Collective if `reduce` is."""
        wall, busy, own = time.monotonic() - self.start[0], busy_s() - self.start[1], self.reduce(own_s()) - self.start[2]
        return max(0.0, busy - own) / wall


# Tables.


def print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def format_ratio(name: str, ratios: list[float], goal: str) -> tuple[str, ...]:
    return name, f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} .. {max(ratios):.3f}", goal


def print_report(
    title: str, times_s: dict[str, list[float]], ratios: dict[str, tuple[list[float], str]], void: int, steps: int = STEPS
) -> None:
    rows: list[tuple[str, ...]] = [("side", "median s per step", "lowest .. highest")]
    rows += [(name, f"{statistics.median(t):.4f}", f"{min(t):.4f} .. {max(t):.4f}") for name, t in times_s.items()]
    print_table(f"{title}: {len(next(iter(times_s.values())))} rounds of {steps} steps, {void} void", rows)
    print_table(
        "speed ratios, round by round",
        [("ratio", "median", "lowest .. highest", "goal")] + [format_ratio(n, *r) for n, r in ratios.items()],
    )
    print(
        "JSON " + json.dumps({"what": title, "times_s": times_s, "ratios": {n: r[0] for n, r in ratios.items()}, "void": void})
    )


# Sides.


def make_config(folder: str, preset: str, **changes: object):  # type: ignore[no-untyped-def]
    from mpilm.config.presets import PRESETS
    from mpilm.config.schema import resolve_config
    from mpilm.config.settings import override

    return resolve_config(override(PRESETS[preset](), run__dir=folder, run__eval_every=0, checkpoint__resume="auto", **changes))


def mpilm_side(config, comm) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """Return the training step of mpilm, as the training loop runs it."""
    from mpilm.engine.step import train_step
    from mpilm.trainer.build import build_run

    run = build_run(config, comm)
    run.mesh.check_calls(False)
    return lambda step: train_step(run.model, run.batches, step) and None


def make_reduce(comm) -> Callable[..., float]:  # type: ignore[no-untyped-def]
    """Return a function that reduces a number over the ranks: the sum, or another `op`."""
    import torch

    def reduce(value: float, op: str = "sum") -> float:
        x = torch.tensor([value], dtype=torch.float64)
        comm.all_reduce(x, op)
        return float(x)

    return reduce


def time_sides(sides: dict[str, Callable[[int], None]], wanted: int, comm) -> tuple[dict[str, list[float]], int]:  # type: ignore[no-untyped-def]
    """Return the seconds per step of each side, a number for each of `wanted` valid rounds, and the number of void rounds."""
    reduce = make_reduce(comm)
    times: dict[str, list[float]] = {name: [] for name in sides}
    first, void = 0, 0
    for turn in range(MAX_ROUNDS):
        load, took = Load(reduce), {}
        for name, step in sides.items():
            comm.barrier()
            began = time.perf_counter()
            for number in range(first, first + STEPS):
                step(number)
            took[name] = reduce(time.perf_counter() - began, "max") / STEPS
        first += STEPS
        other_cores = reduce(load.other_cores(), "max")
        if turn == 0:
            continue  # warm-up
        if other_cores > MAX_OTHER_CORES:
            void += 1
            if comm.rank == 0:
                print(f"void round: other programs used {other_cores:.2f} cores", flush=True)
            continue
        for name, seconds in took.items():
            times[name].append(seconds)
        if len(next(iter(times.values()))) == wanted:
            return times, void
    raise SystemExit(f"{void} of {MAX_ROUNDS} rounds were void; run this on a quiet machine")


def speed_ratios(times: dict[str, list[float]], reference: str, side: str) -> list[float]:
    """Return the speed of `side` as a part of the speed of `reference`, round by round."""
    return [theirs / own for theirs, own in zip(times[reference], times[side])]


def mpirun(ranks: int) -> list[str]:
    """Return the first words of a command that starts so many ranks."""
    launcher = Path(sys.executable).parent / "mpirun"
    return [str(launcher) if launcher.exists() else shutil.which("mpirun") or "mpirun", "-n", str(ranks)]
