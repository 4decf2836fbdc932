"""Which layout to ask the queue for, and what it would do. In one process, without torch and MPI.

python -m mpilm.plan --preset llama-1b --ranks 64 --machine machine.json          # of doctor --calibrate
python -m mpilm.plan --preset llama-1b --ranks 1,2,4,8,16 --plot scaling.png
python -m mpilm.plan --draw --parallel.pipeline 4 --parallel.schedule zero-bubble
python -m mpilm.plan --draw --preset llama-1b --parallel.pipeline 4 --parallel.schedule interleaved --ranks 8 --svg plan.svg
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mpilm.cli import parse, run_alone
from mpilm.config import Config, Model, Parallel, Train, replaced, resolve
from mpilm.errors import ConfigError, FileError
from mpilm.model.flops import flops_by_part
from mpilm.parallel.feasible import cut_by_cost, mesh_shape, replica_microbatches
from mpilm.parallel.pipeline.draw import draw_svg, draw_text
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import analytic_bubble, schedule
from mpilm.parallel.pipeline.simulate import Timeline, simulate
from mpilm.planner.machine import read
from mpilm.planner.scaling import curve
from mpilm.planner.search import Job
from mpilm.planner.show import plot, ranking, scaling
from mpilm.presets import PRESETS, VOCABULARIES
from mpilm.validation import validate

DESCRIPTION = (
    "Rank the layouts of a job by the predicted time of a step, with memory of a rank, bubble, communication and tokens a "
    "second, and say why the others cannot be; for several numbers of ranks, say where more of them stop helping. The "
    "prediction is made from machine.json, which mpirun -n RANKS python -m mpilm.doctor --calibrate measures in a minute or "
    "two. Settings of the layout that are given stay as they are. With --draw instead: draw what each rank of a pipeline does "
    "during one training step: its forwards and backwards on a time axis, how the layers are cut into stages, how long ranks "
    "idle (the bubble) and how many microbatches they keep in memory. For any number of ranks, on this machine alone."
)


@dataclass(frozen=True)
class PlanConfig:
    """The model and the layout to plan for, and what to show."""

    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    ranks: tuple[int, ...] = ()
    """Ranks of the job, or several numbers to compare: 1,2,4,8; empty: one pipeline of parallel.pipeline ranks."""
    machine: str = "machine.json"
    """What doctor --calibrate has measured."""
    ranks_per_node: int = 0
    """Ranks that share a node; 0: as many as were measured."""
    tokens: float = 0.0
    """Tokens to train on, such as 2e9: how long it takes; 0: train.steps."""
    top: int = 8
    """Layouts to show."""
    plot: str = ""
    """A file (.png, .svg, .pdf) for the curve of speed over ranks; empty: none."""
    draw: bool = False
    """Draw the schedule of the pipeline, in place of the ranking."""
    vocabulary: int = 2048
    """Tokens the model knows: they make the last stage heavier, which computes the logits."""
    costs: str = "1,2,1,1"
    """Time of a forward, a backward, and its halves for inputs and for weights (zero-bubble); only the ratios matter."""
    svg: str = ""
    """A file to write the drawing to as an SVG image; empty: none."""
    width: int = 0
    """Columns of the drawing; 0: those of the terminal."""

    @property
    def draws(self) -> bool:
        return self.draw or bool(self.svg)


@dataclass(frozen=True)
class Plan:
    """A pipeline as it would run: the layers and the share of the work of each stage, and the step of one replica."""

    parallel: Parallel
    microbatches: int
    replicas: int
    cut: tuple[int, ...]
    work: tuple[float, ...]
    costs: tuple[float, float, float, float]
    timeline: Timeline


def presets() -> dict[str, Callable[[], PlanConfig]]:
    """The presets of train, each with the vocabulary it is meant for."""

    def of(name: str) -> PlanConfig:
        config = PRESETS[name]()
        vocabulary = VOCABULARIES.get(name, PlanConfig.vocabulary)
        return PlanConfig(config.model, config.train, config.parallel, vocabulary=vocabulary)

    return {name: lambda name=name: of(name) for name in PRESETS}  # type: ignore[misc]


def configure(argv: Sequence[str]) -> PlanConfig:
    """The config of a command line; raises ConfigError for what cannot work."""
    config = parse(argv, PlanConfig(), "plan", DESCRIPTION, presets())
    validate(_whole(config))
    for flag, value, least in (
        *(("ranks", ranks, 1) for ranks in config.ranks), ("ranks-per-node", config.ranks_per_node, 0),
        ("tokens", config.tokens, 0), ("top", config.top, 1), ("vocabulary", config.vocabulary, 1), ("width", config.width, 0),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"--{flag} must be at least {least}, not {value}")
    if config.draws and len(config.ranks) > 1:
        raise ConfigError(f"--draw is of one number of ranks, not of {len(config.ranks)}; write --ranks {config.ranks[0]}")
    if config.plot and config.draws:
        raise ConfigError("--plot draws speed over ranks and --draw a pipeline: write one of them")
    if config.model.lora_rank and not config.draws:
        raise ConfigError("--model.lora-rank: the predictions are of training whole models; leave it out")
    whole = resolve(_whole(config))
    return replace(config, model=whole.model, parallel=whole.parallel, ranks=config.ranks or (whole.parallel.pipeline,))


def _whole(config: PlanConfig) -> Config:
    """The training run that is planned for."""
    whole = Config(model=config.model, train=config.train, parallel=config.parallel)
    return replaced(whole, checkpoint__every=0, run__eval_every=0)  # when that is done is not planned


def make(config: PlanConfig) -> Plan:
    """Cut the layers, make the schedule of the replica with the most microbatches and simulate it."""
    whole, parallel = _whole(config), config.parallel
    shape = mesh_shape(whole, config.ranks[0])
    count, stages = replica_microbatches(whole, shape), parallel.pipeline * parallel.chunks
    cut = cut_by_cost(whole, config.vocabulary)
    parts = flops_by_part(config.model, config.vocabulary)
    flops = [parts["block"] * n for n in cut]
    flops[0] += parts["embed"]
    flops[-1] += parts["head"]
    work = tuple(parallel.pipeline * each / sum(flops) for each in flops)
    costs = _costs(config.costs)
    seconds = dict(zip("FBIW", costs))
    compute = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, count)
    programs = [lower(actions, stages) for actions in compute]
    timeline = simulate(programs, lambda kind, stage: seconds.get(kind, 0.0) * work[stage])
    return Plan(parallel, count, shape.data, cut, work, costs, timeline)


def _costs(words: str) -> tuple[float, float, float, float]:
    """Those of F, B, I and W, such that F is 1."""
    try:
        forward, backward, half, weight = (float(word) for word in words.split(","))
    except ValueError:
        raise ConfigError(f"--costs {words}: write four numbers, of F, B, I and W: 1,2,1,1") from None
    if not all(0 < cost < float("inf") for cost in (forward, backward, half, weight)):
        raise ConfigError(f"--costs {words}: each must be above zero and finite, as in 1,2,1,1")
    return 1.0, backward / forward, half / forward, weight / forward


def describe(plan: Plan, width: int) -> str:
    """The plan as text: what is drawn, the cut, the drawing, the bubble."""
    parallel = plan.parallel
    share, heaviest = max((work * parallel.chunks, -stage) for stage, work in enumerate(plan.work))
    even = analytic_bubble(parallel.schedule, parallel.pipeline, parallel.chunks, plan.microbatches, plan.costs)
    by_formula = "" if even is None else f"; by formula, were all stages alike: {100 * even:.2f}%"
    fullest = f" on the fullest of {plan.replicas} replicas" if plan.replicas > 1 else ""
    balanced = "as stated" if parallel.cut else "balanced by cost"
    lines = [
        f"schedule {parallel.schedule}; ranks of a pipeline: {parallel.pipeline}, chunks a rank: {parallel.chunks}, "
        f"microbatches{fullest}: {plan.microbatches}",
        f"layers of each stage, {balanced}: {' '.join(map(str, plan.cut))}; the heaviest, stage {-heaviest}, has {share:.2f} "
        "times an even share of the work",
        f"time: 1 is the forward of a microbatch through 1/{parallel.pipeline} of the model",
        "",
        draw_text(plan.timeline, width, unit=""),
        f"bubble, simulated: {100 * plan.timeline.bubble:.2f}%{by_formula}",
    ]
    return "\n".join(lines)


def rank(config: PlanConfig) -> list[str]:
    """The ranking, or the curve, as text; writes the plot."""
    job = Job(_whole(config), config.vocabulary, read(config.machine), config.ranks_per_node)
    if len(config.ranks) == 1 and not config.plot:
        return ranking(job, config.ranks[0], config.top, config.tokens)
    points = curve(job, config.ranks)
    if config.plot:
        plot(job, points, config.plot)
    return [*scaling(job, points, config.tokens), *([f"{config.plot}: the curve"] if config.plot else [])]


def prepare() -> Callable[[], None]:
    config = configure(sys.argv[1:])
    if not config.draws:
        lines = rank(config)
        return lambda: print("\n".join(lines))
    plan = make(config)

    def body() -> None:
        print(describe(plan, config.width or shutil.get_terminal_size((120, 24)).columns))
        if config.svg:
            _write(config.svg, draw_svg(plan.timeline, unit=""))
            print(f"{config.svg}: the drawing as an SVG image")

    return body


def _write(path: str, content: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise FileError(f"--svg {path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_alone(prepare)
