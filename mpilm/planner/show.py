"""Plans as text, and as a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpilm.config import microbatches
from mpilm.errors import ConfigError, FileError
from mpilm.model.flops import parameter_count
from mpilm.planner.growth import growth
from mpilm.planner.scaling import Point, in_words
from mpilm.planner.search import Candidate, Job, Rejected, flags, search

REFUSALS = 6  # shown
MANY = 1000  # ranks, from which on it is said what grows with them


def ranking(job: Job, ranks: int, top: int, tokens: float) -> list[str]:
    """The layouts of so many ranks, best first, and why the others cannot be; raises ConfigError where there is none."""
    found, rejected = search(job, ranks)
    lines = _head(job, ranks)
    if not found:
        reasons = "\n".join(_refusals(rejected))
        raise ConfigError(f"no layout of {ranks} rank{'s' * (ranks > 1)} works:\n{reasons}")
    best = found[0]
    lines += _table([_columns(), *(_row(str(i), each) for i, each in enumerate(found[:top], 1))])
    if len(found) > top:
        lines.append(f"  and {len(found) - top} more (--top)")
    lines += ["", f"best: {flags(best)}", f"  {_duration(job, best, tokens)}", f"  memory of the fullest rank: {_parts(best)}"]
    if rejected:
        lines += ["", f"{len(rejected)} layouts cannot be:", *_refusals(rejected)]
    if ranks >= MANY:
        lines += ["", f"what {ranks:,} ranks cost each of them:", *_table(growth(best.setting))]
    return lines


def scaling(job: Job, points: Sequence[Point], tokens: float) -> list[str]:
    """The best layout for each number of ranks, and where more of them stop helping."""
    working = [point for point in points if point.candidate is not None]
    rows: list[tuple[str, ...]] = [("ranks", *_columns()[1:], "of a rank's speed")]
    for point in points:
        if point.candidate is None:
            continue
        efficiency = f"{100 * point.efficiency(working[0]):.0f}%"
        rows.append((*_row(f"{point.ranks:,}", point.candidate), efficiency))
    lines = [*_head(job, None), *_table(rows)]
    for point in points:
        if point.candidate is None:
            lines.append(f"  {point.ranks:,} ranks: {point.refusal}")
    if not working:
        raise ConfigError("\n".join(f"{point.ranks} ranks: {point.refusal}" for point in points))
    lines += ["", *in_words(points)]
    return [*lines, f"with {working[-1].ranks:,} ranks: {_duration(job, working[-1].candidate, tokens)}"]  # type: ignore[arg-type]


def _head(job: Job, ranks: int | None) -> list[str]:
    config, machine = job.config, job.machine
    million = parameter_count(config.model, job.vocab_size) / 1e6
    lines = [
        f"{million:,.0f} million parameters, {config.train.global_batch} sequences of {config.model.context_length} tokens a "
        f"step ({microbatches(config)} microbatches), {config.train.dtype}",
        f"{machine.source}: {machine.processor}, {machine.device}, {machine.cores} cores and "
        f"{machine.memory_bytes / 2**30:.0f} GiB; measured {machine.made} with {machine.ranks_per_node} ranks a node"
        + (f" on {machine.nodes} nodes" if machine.nodes > 1 else ""),
    ]
    on_a_node = job.on_a_node(ranks or 1 << 30)
    if (ranks is None or ranks > on_a_node) and machine.across is None:
        lines.append(
            f"mind: more than {on_a_node} ranks are on several nodes, and one was measured; messages between nodes are taken "
            "to be as fast as those within. Calibrate on two nodes to know"
        )
    if config.train.compile:
        lines.append("mind: what --train.compile saves was not measured")
    return [*lines, ""]


def _columns() -> tuple[str, ...]:
    return "", "layout", "step s", "tokens/s", "compute", "bubble", "talk", "update", "MiB a rank"


def _row(first: str, candidate: Candidate) -> tuple[str, ...]:
    time = candidate.time
    shares = [f"{100 * part / time.total_s:.1f}%" for part in
              (time.compute_s, time.bubble_s, time.communication_s, time.update_s + time.fixed_s)]  # fmt: skip
    return (
        first, candidate.words, f"{time.total_s:.3g}", f"{candidate.tokens_per_s:,.0f}", *shares,
        f"{candidate.memory_bytes / 2**20:,.0f}",
    )  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _duration(job: Job, candidate: Candidate, tokens: float) -> str:
    steps = tokens / job.step_tokens if tokens else job.config.train.steps
    seconds = steps * candidate.time.total_s
    return f"{steps:,.0f} steps, {steps * job.step_tokens:.3g} tokens, take {_long(seconds)}"


def _long(seconds: float) -> str:
    """Seconds as 12 s, 3 min, 5.2 h or 9.1 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _parts(candidate: Candidate) -> str:
    return ", ".join(f"{name} {count / 2**20:,.0f} MiB" for name, count in candidate.memory.items() if count >= 2**19)


def _refusals(rejected: Sequence[Rejected]) -> list[str]:
    """One layout of each reason."""
    by_reason: dict[str, list[Rejected]] = {}
    for each in rejected:
        by_reason.setdefault(each.reason, []).append(each)
    lines = [
        f"  {same[0].words}{f' (and {len(same) - 1} more)' * (len(same) > 1)}: {reason}" for reason, same in by_reason.items()
    ]
    return lines[:REFUSALS] + [f"  and {len(lines) - REFUSALS} more reasons"] * (len(lines) > REFUSALS)


def plot(job: Job, points: Sequence[Point], path: str) -> None:
    """The speed over ranks, beside what it would be if every rank were worth as much as the first; raises FileError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'mpilm[report]'") from None
    working = [point for point in points if point.candidate is not None]
    if not working:
        raise ConfigError(f"--plot: no number of ranks works: {points[0].refusal}")
    ranks = [point.ranks for point in working]
    speeds = [point.candidate.tokens_per_s for point in working]  # type: ignore[union-attr]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(
        ranks, [speeds[0] * count / ranks[0] for count in ranks], linestyle="--", color="0.6", label="every rank as the first"
    )
    axes.plot(ranks, speeds, marker="o", color="C0", label="predicted, best layout")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("ranks")
    axes.set_ylabel("tokens a second")
    million = parameter_count(job.config.model, job.vocab_size) / 1e6
    axes.set_title(f"{million:,.0f} million parameters on {job.machine.processor}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FileError(f"--plot {path}: cannot be written: {error}") from None
