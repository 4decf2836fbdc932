"""The search over all layouts of a number of ranks: the best first, and the reason against each that cannot run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from mpilm.config.check import check_config
from mpilm.config.schema import MIXTURES, Config, ParallelConfig, divided_sizes, replica_size, resolve_config
from mpilm.config.settings import flatten, override
from mpilm.errors import ConfigError
from mpilm.formatting import count_noun, format_bytes
from mpilm.parallel.layout_check import can_divide_parts, partition_by_cost, resolve_mesh_shape
from mpilm.planner.cost import StepTime, step_time
from mpilm.planner.layout import PlacedLayout
from mpilm.planner.memory import rank_bytes
from mpilm.planner.profile import MachineProfile

CHUNKS = (2, 4, 8)
MIN_PART_TOKENS = 512  # of a sequence part: shorter ones are not tried unless the axis is stated
SHOWN_REASONS = 6
TIE = 1.01  # times the fastest: closer than predictions are accurate
USABLE_MEMORY = 0.95  # the system needs the rest
LAYOUT_DEFAULTS = {
    "parallel.pipeline": (1,), "parallel.tensor": (1,), "parallel.context": (1,), "parallel.expert": (1,),
    "parallel.schedule": ("1f1b",), "parallel.chunks": (1, 2), "parallel.zero": (0,), "train.recompute": ("none",),
}  # fmt: skip


@dataclass(frozen=True)
class PlannedJob:
    """A training job to plan; layout settings that differ from their defaults are fixed."""

    config: Config
    vocab_size: int
    machine: MachineProfile
    ranks_per_node: int = 0  # 0: as many as were measured

    @cached_property
    def fixed_settings(self) -> Mapping[str, Any]:
        """Layout settings that the user has chosen."""
        default = flatten(resolve_config(Config(parallel=ParallelConfig(schedule=self.config.parallel.schedule))).parallel)
        chosen = flatten(resolve_config(self.config).parallel)
        return {name: value for name, value in chosen.items() if value != (default | {"schedule": "1f1b"})[name]}

    def ranks_on_node(self, ranks: int) -> int:
        return min(ranks, self.ranks_per_node or self.machine.ranks_per_node)


class Candidate(PlacedLayout):
    """A layout that can run, with its predictions."""

    @cached_property
    def time(self) -> StepTime:
        return step_time(self)

    @cached_property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the rank that uses most, part by part: the first ranks keep most microbatches, the last has the logits."""
        ranks = sorted({0, min(1, self.shape.pipeline - 1), self.shape.pipeline - 1})
        return max((rank_bytes(self, rank) for rank in ranks), key=lambda parts: sum(parts.values()))

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def tokens_per_s(self) -> float:
        return self.step_tokens / self.time.total_s

    @property
    def label(self) -> str:
        return layout_label(self.config, self.ranks)


def search(job: PlannedJob, ranks: int) -> tuple[list[Candidate], dict[str, str]]:
    """Return the layouts that can run, the best first, and the reasons against others, by label; ConfigError if none can."""
    candidates, rejected = list[Candidate](), dict[str, str]()
    available = USABLE_MEMORY * job.machine.memory_bytes / -(-job.ranks_on_node(ranks) // job.machine.gpus)
    for config in _enumerate_layouts(job, ranks):
        label, recompute = layout_label(config, ranks), config.train.recompute
        for choice in ("none", "block") if recompute == "none" else (recompute,):  # recompute only what does not fit
            layout = override(config, train__recompute=choice)
            try:
                check_config(layout)
                shape, cut = resolve_mesh_shape(layout, ranks), partition_by_cost(layout, job.vocab_size)
            except ConfigError as error:
                rejected.setdefault(label, str(error))
                break
            candidate = Candidate(layout, job.vocab_size, job.machine, shape, job.ranks_on_node(ranks), cut)
            if candidate.memory_bytes <= available:
                candidates.append(candidate)
                break
            needed = format_bytes(candidate.memory_bytes)
            rejected.setdefault(label, f"a rank needs {needed} and has {format_bytes(available)}")
    if not candidates:
        raise ConfigError("\n".join([f"no layout of {count_noun(ranks, 'rank')} works:", *summarize(rejected)]))
    fastest_s = min(each.time.total_s for each in candidates)

    def preference(each: Candidate) -> tuple[float, ...]:  # of layouts about as fast as the fastest, the simplest
        time_s, parallel = each.time.total_s, each.config.parallel
        simplicity = parallel.expert, parallel.context, parallel.tensor, parallel.pipeline, parallel.zero, parallel.chunks
        return max(time_s, TIE * fastest_s), *simplicity, time_s

    return sorted(candidates, key=preference), rejected


def summarize(rejected: Mapping[str, str]) -> list[str]:
    """Return one line for each of the first few reasons."""
    labels: dict[str, list[str]] = {}
    for label, reason in rejected.items():
        labels.setdefault(reason, []).append(label)
    lines = [f"  {same[0]}{f' (and {len(same) - 1} more)' * (len(same) > 1)}: {reason}" for reason, same in labels.items()]
    more = len(lines) - SHOWN_REASONS
    return lines[:SHOWN_REASONS] + [f"  and {count_noun(more, 'more reason')}"] * (more > 0)


def _enumerate_layouts(job: PlannedJob, ranks: int) -> Iterator[Config]:
    """Yield every layout of these ranks, with one that has too many stages; fixed settings are not varied."""
    layers, fixed = job.config.model.n_layers, {name: [value] for name, value in job.fixed_settings.items()}
    divisors = [p for p in range(1, ranks + 1) if ranks % p == 0]
    too_many, model = [p for p in divisors if p > layers][:1], job.config.model
    divided = [model.tensor_parts] if model.tensor_parts else divided_sizes(model).values()
    within_node = (t for t in divisors if job.ranks_on_node(ranks) % t == 0)
    tensors = [t for t in within_node if all(size % t == 0 for size in divided)]
    pipelines = [p for p in divisors if p <= layers] + too_many
    longest = model.context_length // (2 * MIN_PART_TOKENS)
    contexts = [c for c in divisors if c <= max(1, longest) and can_divide_parts(model.sequence_parts or 2 * c, c)]
    experts = [e for e in divisors if e == 1 or (model.arch in MIXTURES and model.n_experts % e == 0)]
    possible = {"tensor": tensors, "context": contexts, "expert": experts, "pipeline": pipelines}
    for tensor, context, expert, pipeline in product(*(fixed.get(axis, sizes) for axis, sizes in possible.items())):
        size = tensor * context * expert
        if size > 1 and ranks % (size * pipeline) and not {"tensor", "context", "expert"} & fixed.keys():
            continue
        schedules = ["1f1b", "gpipe", "interleaved", "zero-bubble"] if pipeline > 1 else ["1f1b"]
        zeros = [0, 1, 2, 3] if ranks // (pipeline * tensor) > 1 and job.config.train.reproducible else [0]
        for schedule in fixed.get("schedule", schedules):
            chunks = [c for c in CHUNKS if c * pipeline <= layers] or [2] if schedule == "interleaved" else [1]
            for chunk, zero in product(fixed.get("chunks", chunks), fixed.get("zero", zeros)):
                layout = {
                    "tensor": tensor,
                    "context": context,
                    "expert": expert,
                    "pipeline": pipeline,
                    "schedule": schedule,
                    "chunks": chunk,
                    "zero": zero,
                }
                yield resolve_config(replace(job.config, parallel=replace(job.config.parallel, **layout)))


def layout_label(config: Config, ranks: int) -> str:
    """Return a layout in a few words: data 4, pipeline 2, interleaved x2, tensor 2, zero 1, recompute block."""
    parallel, recompute = config.parallel, config.train.recompute
    replicas = max(1, ranks // replica_size(parallel) // parallel.expert)
    schedule = f", {parallel.schedule}{f' x{parallel.chunks}' * (parallel.chunks > 1)}" * (parallel.pipeline > 1)
    axes = "".join(f", {axis} {n}" for axis in ("expert", "context", "tensor") if (n := getattr(parallel, axis)) > 1)
    label = f"data {replicas}, pipeline {parallel.pipeline}{schedule}{axes}, zero {parallel.zero}"
    return label + f", recompute {recompute}" * (recompute != "none")


def to_flags(candidate: Candidate) -> str:
    """Return the settings that make the layout, as a command line has them."""
    settings = flatten(candidate.config)
    flags = [f"--{name} {settings[name]}" for name, defaults in LAYOUT_DEFAULTS.items() if settings[name] not in defaults]
    return " ".join(flags) or "no settings: the default layout"
