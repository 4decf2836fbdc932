"""The plan command: its settings, and the plan as text, as a plot, or as a drawing of the pipeline."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import ceil, inf, log2, nan
from pathlib import Path
from typing import Any

from mpilm.config import schema
from mpilm.config.check import check_config
from mpilm.config.presets import PRESETS, VOCABULARIES
from mpilm.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig, microbatch_count, resolve_config
from mpilm.config.settings import override
from mpilm.data.files import file_errors
from mpilm.errors import ConfigError, FileError
from mpilm.formatting import command_text, count_noun, format_bytes, format_duration, format_mebibytes
from mpilm.model.flops import flops_by_part, parameter_count
from mpilm.ops.halving import count_message_rounds
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.layout_check import partition_by_cost, replica_microbatch_count, resolve_mesh_shape
from mpilm.parallel.pipeline.schedules import analytic_bubble, lower, schedule
from mpilm.planner.draw import draw_svg, draw_text
from mpilm.planner.guess import ASSUMPTION, guess_profile
from mpilm.planner.layout import PlacedLayout
from mpilm.planner.profile import MachineProfile, read_profile
from mpilm.planner.search import Candidate, PlannedJob, search, summarize, to_flags
from mpilm.planner.simulate import simulate

MACHINE_FILE = "machine.json"
MANY_RANKS = 1000  # from which on the plan lists the costs that grow with the ranks
WORTHWHILE = 1.4  # speedup for twice the ranks
COLUMNS = ("layout", "step s", "tokens/s", "compute", "bubble", "comm", "update", "MiB a rank")
LIMITS = {
    "bubble": "the pipeline idles for",
    "communication": "ranks communicate for",
    "update": "the optimizer takes",
    "fixed": "costs that ranks cannot share take",
}
START_BYTES, LOG_BYTES, NUMBER_BYTES = 400, 24, 8  # a rank: gathered at the start, in each row of the log; of one number


@dataclass(frozen=True)
class PlanConfig:
    """The model and the layout to plan for, and what to show."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ranks: schema.RankCounts = ()  # Ranks of the job, or several numbers to compare: 1,2,4,8; empty: a replica's.
    machine: str = ""  # Machine file that doctor --calibrate has written; empty: machine.json if it exists, else a guess.
    ranks_per_node: schema.NonNegativeInt = 0  # Ranks on a node; 0: as many as were measured.
    tokens: schema.NonNegativeFloat = 0.0  # Tokens to train on, such as 2e9, to predict how long that takes; 0: train.steps.
    top: schema.PositiveInt = 8  # Layouts to show.
    plot: str = ""  # A file (.png, .svg, .pdf) for the plot of speed over ranks; empty: none.
    draw: bool = False  # Draw the pipeline schedule instead of ranking layouts.
    vocabulary: schema.PositiveWidth = 2048  # Vocabulary size: the logits make the last stage slower.
    costs: str = "1,2,1,1"  # Time of F, B, I and W: forward, backward, and its two halves (zero-bubble); only ratios matter.
    svg: str = ""  # A file to write the drawing to as an SVG image; empty: none.
    width: schema.Count = 0  # Columns of the drawing; 0: those of the terminal.


def plan_presets() -> dict[str, Callable[[], PlanConfig]]:
    """Return the presets of train, each with its vocabulary size."""

    def preset(name: str) -> PlanConfig:
        config, vocabulary = PRESETS[name](), VOCABULARIES.get(name, PlanConfig.vocabulary)
        return PlanConfig(config.model, config.train, config.parallel, vocabulary=vocabulary)

    return {name: partial(preset, name) for name in PRESETS}


def make_plan(config: PlanConfig) -> str:
    """Return the plan as text; write the plot or the image, if any."""
    run = Config(model=config.model, train=config.train, parallel=config.parallel)
    run = override(run, checkpoint__every=0, run__eval_every=0)  # their seconds are not planned
    check_config(run)
    run = resolve_config(run)
    ranks, draw = config.ranks or (schema.replica_size(run.parallel) * run.parallel.expert,), config.draw or bool(config.svg)
    if draw and len(ranks) > 1:
        raise ConfigError(f"--draw takes a single number of ranks, not {len(ranks)}; write --ranks {ranks[0]}")
    if draw and config.plot:
        raise ConfigError("--plot draws speed over ranks and --draw a pipeline; remove one of them")
    if draw:
        return draw_schedule(config, run, ranks[0])
    if config.model.lora_rank:
        raise ConfigError("--model.lora-rank: predictions are for training all parameters; remove it")
    file = config.machine or (MACHINE_FILE if Path(MACHINE_FILE).exists() else "")
    job = PlannedJob(run, config.vocabulary, read_profile(file) if file else guess_profile(), config.ranks_per_node)
    if len(ranks) == 1 and not config.plot:
        return "\n".join(show_ranking(job, ranks[0], config.top, config.tokens))
    return "\n".join(show_scaling(job, ranks, config.tokens, config.plot))


def draw_schedule(config: PlanConfig, run: Config, ranks: int) -> str:
    """Return the pipeline schedule of the replica with the most microbatches, drawn and described; write the image, if any."""
    parallel, shape, cut = run.parallel, resolve_mesh_shape(run, ranks), partition_by_cost(run, config.vocabulary)
    count, costs = replica_microbatch_count(run, shape), _parse_costs(config.costs)
    parts, by_kind = flops_by_part(run.model, config.vocabulary), dict(zip("FBIW", costs))
    flops = [parts["block"] * layers for layers in cut]
    flops[0] += parts["embed"]
    flops[-1] += parts["head"]
    work = [parallel.pipeline * each / sum(flops) for each in flops]
    sizes = parallel.pipeline, parallel.chunks, count
    programs = [lower(actions, len(cut)) for actions in schedule(parallel.schedule, *sizes)]
    timeline = simulate(programs, lambda kind, stage: by_kind.get(kind, 0.0) * work[stage])
    even, heaviest = analytic_bubble(parallel.schedule, *sizes, costs), work.index(max(work))
    lines = [
        f"schedule {parallel.schedule}; ranks of a pipeline: {parallel.pipeline}, chunks a rank: {parallel.chunks}, "
        f"microbatches{f' on the fullest of {shape.replicas} replicas' * (shape.replicas > 1)}: {count}",
        f"layers of each stage, {'as stated' if parallel.cut else 'balanced by cost'}: {' '.join(map(str, cut))}; the "
        f"heaviest, stage {heaviest}, has {work[heaviest] * parallel.chunks:.2f} times an even share of the work",
        f"time: 1 is the forward of a microbatch through 1/{parallel.pipeline} of the model",
        "",
        draw_text(timeline, config.width or shutil.get_terminal_size((120, 24)).columns),
        f"bubble, simulated: {100 * timeline.bubble:.2f}%"
        + ("" if even is None else f"; by formula, if all stages were equal: {100 * even:.2f}%"),
    ]
    if config.svg:
        with file_errors(f"--svg {config.svg}", "written"):
            Path(config.svg).write_text(draw_svg(timeline), encoding="utf-8")
        lines.append(f"{config.svg}: the drawing as an SVG image")
    return "\n".join(lines)


def _parse_costs(setting: str) -> tuple[float, float, float, float]:
    """Return the costs of F, B, I and W in units of F."""
    try:
        forward, backward, inputs, weights = map(float, setting.split(","))
    except ValueError:
        forward = backward = inputs = weights = nan
    if not all(0 < cost < inf for cost in (forward, backward, inputs, weights)):
        raise ConfigError(f"--costs {setting}: write four finite numbers above zero, for F, B, I and W: 1,2,1,1")
    return 1.0, backward / forward, inputs / forward, weights / forward


def show_ranking(job: PlannedJob, ranks: int, top: int, tokens: float) -> list[str]:
    """Return the layouts of so many ranks, the best first, and the reasons against all others."""
    candidates, rejected = search(job, ranks)
    best, more = candidates[0], len(candidates) - top
    parts = ", ".join(f"{part} {format_mebibytes(nbytes)}" for part, nbytes in best.memory.items() if nbytes >= 2**19)
    lines = _header(job, ranks)
    lines += _table([("", *COLUMNS), *((str(i), *_row(each)) for i, each in enumerate(candidates[:top], 1))])
    lines += [f"  and {more} more (--top)"] * (more > 0)
    lines += ["", f"best: {to_flags(best)}", f"  {_duration(best, tokens)}", f"  memory of the rank that uses most: {parts}"]
    if rejected:
        lines += ["", f"{count_noun(len(rejected), 'layout')} cannot run:", *summarize(rejected)]
    if ranks >= MANY_RANKS:
        lines += ["", f"costs that grow with the job, for {ranks:,} ranks:", *_table(growth_rows(best))]
    return lines


def show_scaling(job: PlannedJob, counts: Sequence[int], tokens: float, plot: str = "") -> list[str]:
    """Return the best layout for each number of ranks, and where more of them stop helping; write the plot, if any."""
    best, refusals = list[Candidate](), list[str]()
    for ranks in sorted(set(counts)):
        try:
            best.append(search(job, ranks)[0][0])
        except ConfigError as error:
            refusals += str(error).splitlines()[:3]  # the first two reasons
    if not best:
        raise ConfigError("\n".join(refusals))
    rows = [(f"{each.ranks:,}", *_row(each), _efficiency(each, best[0])) for each in best]
    lines = [*_header(job, max(counts)), *_table([("ranks", *COLUMNS, "of a rank's speed"), *rows]), *refusals]
    lines += ["", *explain_scaling(best), f"with {count_noun(best[-1].ranks, 'rank')}: {_duration(best[-1], tokens)}"]
    if plot:
        plot_scaling(job, best, plot)
        lines.append(f"{plot}: speed over ranks")
    return lines


def explain_scaling(best: Sequence[Candidate]) -> list[str]:
    """Return where more ranks stop helping, and why; `best` has the layout of each number of ranks."""
    lines = []
    for before, after in pairwise(best):
        speedup = after.tokens_per_s / before.tokens_per_s
        if speedup < WORTHWHILE ** log2(after.ranks / before.ranks):
            limit = _limit(before, after)
            lines.append(f"from {before.ranks} to {after.ranks} ranks the speed grows only {speedup:.2f} times: {limit}")
    fastest, last = max(best, key=lambda each: each.tokens_per_s), best[-1]
    if fastest is not last:
        lines.append(f"more than {fastest.ranks} ranks are slower")
    elif not lines and len(best) > 1:
        speed = _efficiency(last, best[0])
        lines.append(f"every rank up to {last.ranks} is worth having: it is {speed} as fast as with {best[0].ranks}")
    return lines


def _efficiency(candidate: Candidate, first: Candidate) -> str:
    """Return the speed of a rank relative to that in the first candidate."""
    return f"{100 * candidate.tokens_per_s / first.tokens_per_s * first.ranks / candidate.ranks:.0f}%"


def _limit(before: Candidate, after: Candidate) -> str:
    """Return the reason why speed does not grow with the ranks: the part of the step that grew most."""
    shares = [{name: 100 * each.time.parts[name] / each.time.total_s for name in LIMITS} for each in (before, after)]
    name = max(LIMITS, key=lambda name: shares[1][name] - shares[0][name])
    growth, total, replicas = shares[1][name] - shares[0][name], microbatch_count(after.config), after.shape.replicas
    busy = 100 * total / (replicas * ceil(total / replicas))
    if busy < 90 and growth < 100 - busy:
        return f"{total} microbatches do not divide evenly over {replicas} replicas, which work {busy:.0f}% of the time"
    cause = f"{LIMITS[name]} {shares[1][name]:.0f}% of the step ({shares[0][name]:.0f}% before)"
    tokens = f"a rank has {after.step_tokens / after.ranks:,.0f} tokens a step"
    return f"{cause if growth > 2 else 'ranks share the cores of a node'}; {tokens}"


def _header(job: PlannedJob, ranks: int) -> list[str]:
    config, machine, on_node = job.config, job.machine, job.ranks_on_node(ranks)
    lines = [
        f"{_parameters(job)}, {config.train.global_batch} sequences of {config.model.context_length} tokens a step "
        f"({microbatch_count(config)} microbatches), {config.train.dtype}",
        _describe_machine(machine),
    ]
    if ranks > on_node and machine.across is None:
        problem = f"more than {on_node} ranks need several nodes, and one was measured"
        lines.append(f"warning: {problem}: messages between nodes are taken to be as fast as within; calibrate on two nodes")
    if config.train.compile:
        lines.append("warning: the speedup of --train.compile was not measured")
    return [*lines, ""]


def _describe_machine(machine: MachineProfile) -> str:
    node = f"{machine.cores} cores and {format_bytes(machine.memory_bytes)}"
    if not machine.made:
        guess = f"no {MACHINE_FILE} here: seconds are a guess, from {ASSUMPTION}; measure them with mpirun -n RANKS "
        memory = f"Memory is arithmetic and needs no measurement. A node is taken to have {node}, as this one"
        return f"{guess}{command_text('doctor')} --calibrate.\n{memory}; --ranks-per-node changes its ranks"
    nodes = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    made = f"measured {machine.made} with {machine.ranks_per_node} ranks a node{nodes}"
    return f"{machine.source}: {machine.processor}, {machine.device}, {node}; {made}"


def _parameters(job: PlannedJob) -> str:
    return f"{parameter_count(job.config.model, job.vocab_size) / 1e6:,.0f} million parameters"


def _row(candidate: Candidate) -> tuple[str, ...]:
    time = candidate.time
    parts = time.compute_s, time.bubble_s, time.communication_s, time.update_s + time.fixed_s
    shares = [f"{100 * part / time.total_s:.1f}%" for part in parts]
    memory = f"{candidate.memory_bytes / 2**20:,.0f}"
    return candidate.label, f"{time.total_s:.3g}", f"{candidate.tokens_per_s:,.0f}", *shares, memory


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _duration(best: Candidate, tokens: float) -> str:
    steps = tokens / best.step_tokens if tokens else best.config.train.steps
    return f"{steps:,.0f} steps, {steps * best.step_tokens:.3g} tokens, take {format_duration(steps * best.time.total_s)}"


def growth_rows(layout: PlacedLayout) -> list[tuple[str, str, str]]:
    """Return the costs of a job of many ranks: each with what it grows with, and its size here."""
    ranks, data, total = layout.shape.size, layout.replicas, microbatch_count(layout.config)
    numel = max(sum(map(layout.numel, stages)) for stages in layout.stages_of_rank)
    buckets, on_node = ceil(numel / BUCKET), min(layout.ranks_per_node, ranks, data)
    slices = 4 * NUMBER_BYTES * buckets * data * (layout.config.parallel.zero > 0)
    state = 12 * parameter_count(layout.config.model, layout.vocab_size)
    return [
        ("cost", "grows with", "here"),
        ("gathered at the start", "ranks", format_bytes(START_BYTES * ranks)),
        ("losses of a step", "microbatches", format_bytes(NUMBER_BYTES * total)),
        ("summation tree", "microbatches and ranks", format_bytes(NUMBER_BYTES * (total + 4 * data))),
        ("counts of an exchange", "replicas", format_bytes(4 * NUMBER_BYTES * data)),
        ("messages of a gradient sum", "buckets x log2 of replicas", f"{2 * buckets * count_message_rounds(data):,}"),
        ("hops of a small all-reduce", "log2 of ranks", f"{ceil(log2(max(2, ranks)))}"),
        ("slices in a checkpoint", "replicas x buckets, with ZeRO", format_bytes(slices)),
        ("shared memory mapped", "ranks of a node", format_bytes(4 * numel * on_node)),
        ("checkpoint written", "1 / ranks", format_bytes(state / ranks)),
        ("row of the log", "ranks", format_bytes(LOG_BYTES * ranks)),
    ]


def plot_scaling(job: PlannedJob, best: Sequence[Candidate], path: str) -> None:
    """Plot speed over ranks beside perfect scaling; raises FileError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'mpilm[report]'") from None
    ranks, speeds = [each.ranks for each in best], [each.tokens_per_s for each in best]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    perfect = [speeds[0] * count / ranks[0] for count in ranks]
    axes.loglog(ranks, perfect, "--", base=2, color="0.6", label="perfect scaling")
    axes.loglog(ranks, speeds, "o-", base=2, color="C0", label="predicted, best layout")
    axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="ranks", ylabel="tokens a second", title=f"{_parameters(job)} on {job.machine.processor}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FileError(f"--plot {path} cannot be written: {error}") from None
