"""What a layout would do, before it is queued. In one process, without torch and MPI.

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
from mpilm.config import Config, Model, Parallel, Train, resolve
from mpilm.errors import ConfigError, FileError
from mpilm.model.size import flops_by_part
from mpilm.parallel.feasible import cut_by_cost, mesh_shape, replica_microbatches
from mpilm.parallel.pipeline.draw import svg, text
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import even_bubble, schedule
from mpilm.parallel.pipeline.simulate import Timeline, simulate
from mpilm.presets import PRESETS, VOCABULARIES
from mpilm.validation import validate

DESCRIPTION = (
    "Draw what each rank of a pipeline does during one training step: its forwards and backwards on a time axis, how the "
    "layers are cut into stages, how long ranks idle (the bubble) and how many microbatches they keep in memory. For any "
    "number of ranks, on this machine alone."
)


@dataclass(frozen=True)
class PlanConfig:
    """The model and the layout to plan for, and what to show."""

    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    draw: bool = False
    """Draw the schedule of the pipeline."""
    ranks: int = 0
    """Ranks of the job; 0: one pipeline of parallel.pipeline ranks. More hold replicas, which share the microbatches."""
    vocabulary: int = 2048
    """Tokens the model knows: they make the last stage heavier, which computes the logits."""
    costs: str = "1,2,1,1"
    """Time of a forward, a backward, and its halves for inputs and for weights (zero-bubble); only the ratios matter."""
    svg: str = ""
    """A file to write the drawing to as an SVG image; empty: none."""
    width: int = 0
    """Columns of the drawing; 0: those of the terminal."""


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
    if not (config.draw or config.svg):
        raise ConfigError("say what to show: write --draw, which draws the schedule of the pipeline, or --svg FILE")
    for flag, value, least in (("ranks", config.ranks, 0), ("vocabulary", config.vocabulary, 1), ("width", config.width, 0)):
        if value < least:
            raise ConfigError(f"--{flag} must be at least {least}, not {value}")
    whole = resolve(_whole(config))
    return replace(config, model=whole.model, parallel=whole.parallel, ranks=config.ranks or whole.parallel.pipeline)


def _whole(config: PlanConfig) -> Config:
    """The training run that is planned for."""
    return Config(model=config.model, train=config.train, parallel=config.parallel)


def make(config: PlanConfig) -> Plan:
    """Cut the layers, make the schedule of the replica with the most microbatches and simulate it."""
    whole, parallel = _whole(config), config.parallel
    shape = mesh_shape(whole, config.ranks)
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
    even = even_bubble(parallel.schedule, parallel.pipeline, parallel.chunks, plan.microbatches, plan.costs)
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
        text(plan.timeline, width, unit=""),
        f"bubble, simulated: {100 * plan.timeline.bubble:.2f}%{by_formula}",
    ]
    return "\n".join(lines)


def prepare() -> Callable[[], None]:
    config = configure(sys.argv[1:])
    plan = make(config)

    def body() -> None:
        print(describe(plan, config.width or shutil.get_terminal_size((120, 24)).columns))
        if config.svg:
            _write(config.svg, svg(plan.timeline, unit=""))
            print(f"{config.svg}: the drawing as an SVG image")

    return body


def _write(path: str, content: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise FileError(f"--svg {path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_alone(prepare)
