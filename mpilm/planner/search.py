"""Every layout of so many ranks, the best first; and why the others cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpilm.config import Config, Parallel, flatten, replaced, resolve
from mpilm.errors import ConfigError
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import flops_per_token
from mpilm.parallel.feasible import cut_by_cost, mesh_shape
from mpilm.planner.cost import Setting, StepTime, step_time
from mpilm.planner.machine import Machine
from mpilm.planner.memory import rank_bytes
from mpilm.validation import validate

CHUNKS = (2, 4, 8)
SAME = 1.01  # times the fastest: closer than a prediction is true
USABLE = 0.95  # of the memory: the system wants some


@dataclass(frozen=True)
class Job:
    """What is to be planned: settings that are not the default ones stay as they are."""

    config: Config
    vocab_size: int
    machine: Machine
    ranks_per_node: int = 0
    """0: as many as were measured."""

    @cached_property
    def stated(self) -> Mapping[str, Any]:
        """Settings of the layout that the user has chosen."""
        default = flatten(resolve(Config(parallel=Parallel(schedule=self.config.parallel.schedule))).parallel) | {
            "schedule": "1f1b"
        }
        mine = flatten(resolve(self.config).parallel)
        return {name: value for name, value in mine.items() if value != default[name]}

    def on_a_node(self, ranks: int) -> int:
        return min(ranks, self.ranks_per_node or self.machine.ranks_per_node)

    @property
    def step_tokens(self) -> int:
        return self.config.train.global_batch * self.config.model.context_length


@dataclass(frozen=True)
class Candidate:
    """A layout that works: seconds of a step, and bytes of the fullest rank by part."""

    setting: Setting
    time: StepTime
    memory: Mapping[str, int]

    @property
    def config(self) -> Config:
        return self.setting.config

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def tokens_per_s(self) -> float:
        return self.config.train.global_batch * self.config.model.context_length / self.time.total_s

    @property
    def efficiency(self) -> float:
        """The part of the time in which the average rank computes."""
        return self.time.compute_s / self.time.total_s

    @property
    def words(self) -> str:
        return layout_words(self.config, self.setting.shape)

    @property
    def flops_per_s(self) -> float:
        """Of a rank, model operations only."""
        return self.tokens_per_s * flops_per_token(self.config.model, self.setting.vocab_size) / self.setting.shape.size


@dataclass(frozen=True)
class Rejected:
    words: str
    reason: str


class NoRoomError(ConfigError):
    """There is too little memory."""


def search(job: Job, ranks: int) -> tuple[list[Candidate], list[Rejected]]:
    """Layouts of so many ranks by predicted step, the fastest first (of equals the simpler), and those that cannot be."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: a job has at least one rank")
    found: list[Candidate] = []
    rejected: list[Rejected] = []
    for config in _layouts(job, ranks):
        try:
            found.append(_candidate(job, config, ranks))
            continue
        except NoRoomError as error:
            rejected.append(Rejected(_stated_words(config, ranks), str(error)))
        except ConfigError as error:
            rejected.append(Rejected(_stated_words(config, ranks), str(error)))
            continue
        if job.config.train.recompute == "none":  # computing again is for those that do not fit otherwise
            with contextlib.suppress(ConfigError):
                found.append(_candidate(job, replaced(config, train__recompute="block"), ranks))
    return _ordered(found), rejected


def _ordered(found: Sequence[Candidate]) -> list[Candidate]:
    """The fastest first; among those that are as fast as it, the simplest."""
    fastest_s = min((each.time.total_s for each in found), default=0.0)

    def key(each: Candidate) -> tuple[float, ...]:
        time_s, parallel = each.time.total_s, each.config.parallel
        return max(time_s, SAME * fastest_s), parallel.pipeline, parallel.zero, parallel.chunks, time_s

    return sorted(found, key=key)


def best(job: Job, ranks: int) -> Candidate:
    """The fastest layout; raises ConfigError with the first reasons where there is none."""
    found, rejected = search(job, ranks)
    if not found:
        reasons = "; ".join(f"{each.words}: {each.reason}" for each in rejected[:2])
        raise ConfigError(f"no layout of {ranks} rank{'s' * (ranks > 1)} works: {reasons}")
    return found[0]


def _layouts(job: Job, ranks: int) -> Iterator[Config]:
    """All there are of these ranks, a layout that cannot be among them too; what the user has stated is not varied."""
    stated, train = job.stated, job.config.train
    pipelines = [p for p in range(1, ranks + 1) if ranks % p == 0 and (p <= job.config.model.n_layers)]
    more = [p for p in range(job.config.model.n_layers + 1, ranks + 1) if ranks % p == 0][:1]
    for pipeline in _choices(stated, "pipeline", [*pipelines, *more]):
        schedules = ["1f1b", "gpipe", "interleaved", "zero-bubble"] if pipeline > 1 else ["1f1b"]
        zeros = [0, 1, 2, 3] if ranks // pipeline > 1 and train.reproducible else [0]
        for schedule in _choices(stated, "schedule", schedules):
            chunks = [c for c in CHUNKS if c * pipeline <= job.config.model.n_layers] or [2]
            for chunk in _choices(stated, "chunks", chunks if schedule == "interleaved" else [1]):
                for zero in _choices(stated, "zero", zeros):
                    changes = {"pipeline": pipeline, "schedule": schedule, "chunks": chunk, "zero": zero}
                    yield resolve(replaced(job.config, **{f"parallel__{name}": value for name, value in changes.items()}))


def _choices(stated: Mapping[str, Any], name: str, choices: Sequence[Any]) -> Sequence[Any]:
    return [stated[name]] if name in stated else choices


def _candidate(job: Job, config: Config, ranks: int) -> Candidate:
    """Raises ConfigError where it cannot be, or has no room."""
    validate(config)
    shape = mesh_shape(config, ranks)
    cut = cut_by_cost(config, job.vocab_size)
    setting = Setting(config, job.vocab_size, job.machine, shape, job.on_a_node(ranks), cut)
    memory = max((_memory(setting, rank) for rank in _fullest(shape)), key=lambda parts: sum(parts.values()))
    room = memory_of_rank(job.machine, setting.ranks_per_node)
    if sum(memory.values()) > room:
        raise NoRoomError(f"needs {sum(memory.values()) / 2**30:.1f} GiB on a rank, and has {room / 2**30:.1f} GiB there")
    return Candidate(setting, step_time(setting), memory)


def memory_of_rank(machine: Machine, ranks_per_node: int) -> float:
    """What a rank may fill: its part of the node, or a GPU."""
    return USABLE * machine.memory_bytes / -(-ranks_per_node // machine.gpus)


def _fullest(shape: MeshShape) -> Sequence[int]:
    """The first ranks of a pipeline keep the most microbatches, the last has the logits."""
    return sorted({0, min(1, shape.pipeline - 1), shape.pipeline - 1})


def _memory(setting: Setting, rank: int) -> dict[str, int]:
    return rank_bytes(
        setting.config, setting.vocab_size, setting.cut, setting.shape, rank, setting.machine.program_bytes,
        setting.machine.device, setting.together,
    )  # fmt: skip


def layout_words(config: Config, shape: MeshShape) -> str:
    """A layout as its settings are written."""
    parallel = config.parallel
    words = [f"data {shape.data}", f"pipeline {shape.pipeline}"]
    if shape.pipeline > 1:
        words.append(parallel.schedule + (f" x{parallel.chunks}" if parallel.chunks > 1 else ""))
    words.append(f"zero {parallel.zero}")
    if config.train.recompute != "none":
        words.append(f"recompute {config.train.recompute}")
    return ", ".join(words)


def _stated_words(config: Config, ranks: int) -> str:
    pipeline = config.parallel.pipeline
    return layout_words(config, MeshShape(pipeline=pipeline, data=max(1, ranks // pipeline)))


def flags(candidate: Candidate) -> str:
    """The settings that make the layout, as a command has them."""
    parallel, recompute = candidate.config.parallel, candidate.config.train.recompute
    words = [f"--parallel.pipeline {parallel.pipeline}"] * (parallel.pipeline > 1)
    words += [f"--parallel.schedule {parallel.schedule}"] * (parallel.schedule != "1f1b")
    words += [f"--parallel.chunks {parallel.chunks}"] * (parallel.chunks > 2)
    words += [f"--parallel.zero {parallel.zero}"] * (parallel.zero > 0)
    words += [f"--train.recompute {recompute}"] * (recompute != "none")
    return " ".join(words) or "no settings: it is the default"


def adopted(config: Config, candidate: Candidate) -> Config:
    """The config in that layout."""
    parallel = candidate.config.parallel
    return replaced(
        config, parallel__auto="", parallel__pipeline=parallel.pipeline, parallel__schedule=parallel.schedule,
        parallel__chunks=parallel.chunks, parallel__zero=parallel.zero, train__recompute=candidate.config.train.recompute,
    )  # fmt: skip
