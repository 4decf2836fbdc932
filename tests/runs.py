"""Runs of a few steps on any layout, on threads or MPI, and what the ranks then hold, put together by parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from text import TINY
from torch import Tensor, nn

from mpilm.checkpoint.format import list_checkpoints
from mpilm.comm.base import Comm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.config.check import check_config
from mpilm.config.schema import Config, ModelConfig, microbatch_count, override, resolve_config
from mpilm.engine.pipelined import meta_model, resolve_model_layouts
from mpilm.engine.step import MicrobatchSource, StepResult, total_loss, train_step
from mpilm.engine.train_model import TrainModel
from mpilm.mesh.mesh import Mesh
from mpilm.parallel import flat_layout as shard
from mpilm.parallel import tied
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import ALIGNMENT, ParamSlice
from mpilm.parallel.layout_check import partition_by_cost, resolve_mesh_shape
from mpilm.testing.threads import run_ranks
from mpilm.trainer import loop
from mpilm.verification.layouts import VOCAB_SIZE, RandomTokens

CPU = torch.device("cpu")
Held = Mapping[str, Mapping[ParamSlice, Tensor]]  # kind -> what a rank updates

SMALL = override(
    TINY, model__n_layers=4, model__n_heads=2, model__n_kv_heads=1, model__d_model=16, model__context_length=8,
    train__micro_batch=1, train__global_batch=8, train__clip_norm=0.5, train__warmup_steps=1,
)  # fmt: skip
"""4 blocks and 8 microbatches of one short sequence, dropout on."""
FAMILIES = {
    "llama": {},
    "gpt2": {"model__arch": "gpt2", "model__n_kv_heads": 0},
    "qwen2": {"model__arch": "qwen"},
    "qwen3": {"model__arch": "qwen", "model__qk_norm": True, "model__head_width": 10},
    "mixtral": {"model__arch": "mixtral", "model__n_experts": 3, "model__d_ff": 32},
    "bert": {"model__arch": "bert", "model__n_kv_heads": 0},
}
"""Every architecture, as changes of SMALL."""
SERIAL = {
    "parallel__pipeline": 1,
    "parallel__schedule": "1f1b",
    "parallel__chunks": 0,
    "parallel__zero": 0,
    "parallel__cut": (),
}


@dataclass(frozen=True)
class Left:
    """What a run leaves: its numbers, the same on all ranks, and what this rank holds of weights and moments."""

    numbers: list[float]
    held: Held


def small(**changes: Any) -> Config:
    """SMALL with changes written section__key; refused where it cannot work."""
    config = resolve_config(override(SMALL, **changes))
    check_config(config)
    return config


def on(pipeline: int = 1, schedule: str = "1f1b", zero: int = 0, **more: Any) -> dict[str, Any]:
    """The settings of a layout."""
    return {
        "parallel__pipeline": pipeline, "parallel__schedule": schedule, "parallel__zero": zero,
        **{f"parallel__{key}": value for key, value in more.items()},
    }  # fmt: skip


def serial(config: Config) -> Config:
    """The same work on one rank."""
    return resolve_config(override(config, **SERIAL, train__recompute="none"))


def sharded(config: Config, comm: Comm, check: bool = False, alignment: int = ALIGNMENT) -> TrainModel:
    """A model with its initial values. Collective."""
    mesh = Mesh.build(resolve_mesh_shape(config, comm.size), InstrumentedComm(comm, check))
    model = TrainModel(config, mesh, partition_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, CPU, alignment)
    model.init_parameters()
    return model


def evaluated(model: TrainModel, total: int) -> float:
    """The loss of `total` microbatches that no step sees. Collective."""
    source = RandomTokens(model.config)
    model.forward(total, lambda m: source.training_batch(1000, m))
    return total_loss(model.results(), total, model.mesh.world)


def run(config: Config, comm: Comm, steps: int = 2, **options: Any) -> Left:
    """Some steps, and an evaluation after the first, over one microbatch more than a step has. Collective."""
    model, source, numbers = sharded(config, comm, **options), RandomTokens(config), []
    for step in range(steps):
        result = train_step(model, source, step)
        numbers += [result.loss, result.grad_norm]
        if step == 0:
            numbers.append(evaluated(model, microbatch_count(config) + 1))
    return Left(numbers, held(model))


def held(model: TrainModel) -> Held:
    return {"value": model.owned_slices(), **model.optimizer.state_slices()}


def joined(ranks: Sequence[Held]) -> dict[str, Tensor]:
    """The bits of every parameter and its moments, flat, in the order of the model, from what the ranks hold.

    What several ranks hold must be the same on each, and nothing may be missing.
    """
    parts: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for rank in ranks:
        for kind, pieces in rank.items():
            for piece, values in pieces.items():
                found = parts.setdefault((kind, piece.name), {})
                mine = values.flatten().view(torch.int32)
                assert torch.equal(found.setdefault((piece.start, piece.stop), mine), mine), f"replicas differ in {piece}"
    return {f"{kind} of {name}": _end_to_end(name, found) for (kind, name), found in sorted(parts.items())}


def _end_to_end(name: str, found: Mapping[tuple[int, int], Tensor]) -> Tensor:
    ends = sorted(found)
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])], f"{name}: {ends} leave a gap, or overlap"
    return torch.cat([found[end] for end in ends])


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors whose bits are not the same."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def run_threads(size: int, config: Config, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """`run` on thread ranks: the numbers, on which all agree, and weights and moments."""
    left = run_ranks(size, lambda comm: run(config, comm, **options), timeout_s=30.0)
    assert all(theirs.numbers == left[0].numbers for theirs in left)
    return left[0].numbers, joined([theirs.held for theirs in left])


@contextlib.contextmanager
def small_buckets(numel: int) -> Iterator[None]:
    """Buckets so small that even these models have many."""
    with contextlib.ExitStack() as stack:
        for module in (shard, tied):
            stack.enter_context(mock.patch.object(module, "BUCKET", numel))
        yield


def whole_model(shape: ModelConfig, vocab_size: int, device: torch.device) -> tuple[nn.Module, FlatParameters]:
    """The whole model on one rank, its parameters views of one flat vector, their values still zero."""
    model = meta_model(shape, vocab_size)
    flat = FlatParameters(resolve_model_layouts(shape, vocab_size, (shape.n_layers,)), device)
    flat.install(model)
    return model, flat


# Whole runs, with a folder.


def whole_batch(source: Any, step: int, total: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of all microbatches of a step, in one."""
    batches = [source.training_batch(step, m) for m in range(total)]
    return torch.cat([batch.tokens for batch in batches]), torch.cat([batch.targets for batch in batches])


def trained(config: Config, size: int) -> dict[str, bytes]:
    """Train to the end; the tensors of the newest checkpoint, byte for byte."""
    run_ranks(size, lambda comm: loop.train(config, comm))
    return newest_tensors(config)


def newest_tensors(config: Config) -> dict[str, bytes]:
    return tensors_of(list_checkpoints(Path(config.run.dir) / "checkpoints")[-1])


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".safetensors" in path.name}


def stopped(config: Config, size: int, at: int) -> None:
    """Train as if all ranks had died after step `at`, when all checkpoints before were written."""
    config = override(config, checkpoint__asynchronous=False)

    def step_or_die(model: TrainModel, source: MicrobatchSource, step: int, *more: Any) -> StepResult:
        if step == at:
            raise KeyboardInterrupt
        return train_step(model, source, step, *more)

    with mock.patch.object(loop, "train_step", step_or_die), pytest.raises(KeyboardInterrupt):
        run_ranks(size, lambda comm: loop.train(config, comm))
