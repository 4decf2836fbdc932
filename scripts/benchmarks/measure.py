"""How sides are compared: in turns, on a quiet machine, as ratios with their spread."""

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
    from mpilm.config.presets import PRESETS
    from mpilm.config.schema import override, resolve_config

    return resolve_config(override(PRESETS[preset](), run__dir=folder, run__eval_every=0, checkpoint__resume="auto", **changes))


def mpilm_side(config, comm) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """One step of mpilm, as the training loop makes it."""
    from mpilm.engine.step import train_step
    from mpilm.trainer.build import build_run

    run = build_run(config, comm)
    run.mesh.check_calls(False)
    return lambda step: train_step(run.model, run.batches, step) and None


def over_all(comm) -> Callable[..., float]:  # type: ignore[no-untyped-def]
    """A number of every rank, added up, or as `op` says."""
    import torch

    def everyone(value: float, op: str = "sum") -> float:
        x = torch.tensor([value], dtype=torch.float64)
        comm.all_reduce(x, op)
        return float(x)

    return everyone


def rounds(sides: dict[str, Callable[[int], None]], wanted: int, comm) -> tuple[dict[str, list[float]], int]:  # type: ignore[no-untyped-def]
    """Seconds a step of each side, a number for each valid round; and the number of void rounds."""
    everyone = over_all(comm)
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


def pairwise(times: dict[str, list[float]], other: str, ours: str) -> list[float]:
    """How fast `ours` is as a part of `other`'s speed, round by round."""
    return [theirs / mine for theirs, mine in zip(times[other], times[ours])]


def mpirun(ranks: int) -> list[str]:
    launcher = Path(sys.executable).parent / "mpirun"
    return [str(launcher) if launcher.exists() else shutil.which("mpirun") or "mpirun", "-n", str(ranks)]
