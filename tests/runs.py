"""Short runs on any layout, on threads or MPI, and the state they end with, assembled by parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from text import TINY
from thread_ranks import run_ranks
from torch import Tensor, nn

from mpilm.checkpoint.format import list_checkpoints
from mpilm.comm.base import Comm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.config.check import check_config
from mpilm.config.schema import Config, ModelConfig, microbatch_count, resolve_config
from mpilm.config.settings import override
from mpilm.engine.pipelined import meta_model, resolve_model_layouts
from mpilm.engine.step import MicrobatchSource, StepResult, total_loss, train_step
from mpilm.engine.train_model import TrainModel
from mpilm.mesh.mesh import Mesh
from mpilm.parallel import flat_layout
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import ALIGNMENT, ParamSlice
from mpilm.parallel.layout_check import partition_by_cost, resolve_mesh_shape
from mpilm.trainer import loop
from mpilm.verification.layouts import VOCAB_SIZE, RandomTokens

CPU = torch.device("cpu")
State = Mapping[str, Mapping[ParamSlice, Tensor]]  # what a rank updates: "value", and moments by name

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
    "mixtral": {"model__arch": "mixtral", "model__n_experts": 6, "model__d_ff": 32},
    "qwen3-moe": {"model__arch": "qwen-moe", "model__n_experts": 3, "model__d_ff": 16, "model__head_width": 10},
    "bert": {"model__arch": "bert", "model__n_kv_heads": 0},
}
"""Every architecture, as changes of SMALL."""
SERIAL = {
    "parallel__pipeline": 1,
    "parallel__tensor": 1,
    "parallel__context": 1,
    "parallel__expert": 1,
    "parallel__schedule": "1f1b",
    "parallel__chunks": 0,
    "parallel__zero": 0,
    "parallel__cut": (),
    "parallel__reduce": "auto",
    "train__offload": "none",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a few steps."""

    numbers: list[float]  # losses and gradient norms, the same on all ranks
    state: State  # of this rank


def small_config(**changes: Any) -> Config:
    """Return SMALL with changes written section__key; raise ConfigError if it cannot work."""
    config = resolve_config(override(SMALL, **changes))
    check_config(config)
    return config


def layout(pipeline: int = 1, schedule: str = "1f1b", zero: int = 0, **more: Any) -> dict[str, Any]:
    """Return a layout as changes of a config."""
    return {
        "parallel__pipeline": pipeline, "parallel__schedule": schedule, "parallel__zero": zero,
        **{f"parallel__{key}": value for key, value in more.items()},
    }  # fmt: skip


def serial_config(config: Config) -> Config:
    """Return the config of the same work on one rank."""
    return resolve_config(override(config, **SERIAL, train__recompute="none"))


def place(rank: int, ranks: int) -> Any:
    """Return what pure code reads of a communicator."""
    return SimpleNamespace(rank=rank, size=ranks)


def build_train_model(config: Config, comm: Comm, checks_calls: bool = False, alignment: int = ALIGNMENT) -> TrainModel:
    """Return a model with its initial values. Collective."""
    mesh = Mesh(resolve_mesh_shape(config, comm.size), InstrumentedComm(comm, checks_calls))
    model = TrainModel(config, mesh, partition_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, CPU, alignment)
    model.init_parameters()
    return model


def eval_loss(model: TrainModel, total: int) -> float:
    """Return the loss of `total` microbatches that no step uses. Collective."""
    source = RandomTokens(model.config)
    losses = model.forward(total, lambda m: source.training_batch(1000, m))
    return total_loss(losses, total, model.mesh.world, model.sequence.parts)


def train_steps(config: Config, comm: Comm, steps: int = 2, **options: Any) -> Outcome:
    """Train, and evaluate after the first step over one microbatch more than a step has. Collective."""
    model, source, numbers = build_train_model(config, comm, **options), RandomTokens(config), []
    for step in range(steps):
        if model.can_overlap:
            model.overlap_sums(step % 2 == 1)
        result = train_step(model, source, step)
        numbers += [result.loss, result.grad_norm]
        if step == 0:
            numbers.append(eval_loss(model, microbatch_count(config) + 1))
    return Outcome(numbers, owned_state(model))


def owned_state(model: TrainModel) -> State:
    """Return the weights and moments that this rank updates."""
    return {"value": model.owned_slices(), **model.optimizer.state_slices()}


def assemble(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the bits of every parameter and moment, flat, from the state of all ranks.

    Replicas must be equal, and nothing may be missing.
    """
    parts: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for state in states:
        for kind, slices in state.items():
            for item, values in slices.items():
                of_parameter = parts.setdefault((kind, item.name), {})
                bits = values.flatten().view(torch.int32)
                assert torch.equal(of_parameter.setdefault((item.start, item.stop), bits), bits), f"replicas differ in {item}"
    return {f"{kind} of {name}": _concatenate(name, found) for (kind, name), found in sorted(parts.items())}


def _concatenate(name: str, found: Mapping[tuple[int, int], Tensor]) -> Tensor:
    ranges = sorted(found)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])], f"{name}: {ranges} have gaps or overlap"
    return torch.cat([found[key] for key in ranges])


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def train_on_threads(size: int, config: Config, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Return the numbers of `train_steps` on thread ranks, on which all agree, and the assembled state."""
    outcomes = run_ranks(size, lambda comm: train_steps(config, comm, **options), timeout_s=30.0)
    assert all(outcome.numbers == outcomes[0].numbers for outcome in outcomes)
    return outcomes[0].numbers, assemble([outcome.state for outcome in outcomes])


@cache
def train_serially(config: Config, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    return train_on_threads(1, config, **options)


def assert_equals_serial(size: int, config: Config, checks_calls: bool = False, **options: Any) -> None:
    """Check that losses, norms, evaluation, weights and moments have the bits of the serial run."""
    numbers, tensors = train_on_threads(size, config, checks_calls=checks_calls, **options)
    expected_numbers, expected_tensors = train_serially(serial_config(config), **options)
    assert numbers == expected_numbers
    assert differing(tensors, expected_tensors) == []


@contextlib.contextmanager
def small_buckets(numel: int) -> Iterator[None]:
    """Use buckets so small that even these models have many."""
    with mock.patch.object(flat_layout, "BUCKET", numel):
        yield


def full_model(shape: ModelConfig, vocab_size: int, device: torch.device) -> tuple[nn.Module, FlatParameters]:
    """Return the full model on one rank, and the flat vector its parameters are views of, all zero."""
    model = meta_model(shape, vocab_size)
    flat = FlatParameters(resolve_model_layouts(shape, vocab_size, (shape.n_layers,)), device)
    flat.install(model)
    return model, flat


def full_batch(source: Any, step: int, total: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets of all microbatches of a step."""
    batches = [source.training_batch(step, m) for m in range(total)]
    return torch.cat([batch.tokens for batch in batches]), torch.cat([batch.targets for batch in batches])


# Runs with a folder.


def train_to_end(config: Config, size: int) -> dict[str, bytes]:
    """Run the training loop on thread ranks; return the tensor files of the newest checkpoint."""
    run_ranks(size, lambda comm: loop.train(config, comm))
    return newest_tensors(config)


def newest_tensors(config: Config) -> dict[str, bytes]:
    """Return the tensor files of a run's newest checkpoint."""
    return read_tensor_files(list_checkpoints(Path(config.run.dir) / "checkpoints")[-1])


def read_tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".safetensors" in path.name}


def train_until_killed(config: Config, size: int, step: int) -> None:
    """Train as if all ranks were killed before step `step` (from 0), after every earlier checkpoint was written."""
    config = override(config, checkpoint__asynchronous=False)

    def step_or_die(model: TrainModel, source: MicrobatchSource, number: int, *more: Any) -> StepResult:
        if number == step:
            raise KeyboardInterrupt
        return train_step(model, source, number, *more)

    with mock.patch.object(loop, "train_step", step_or_die), pytest.raises(KeyboardInterrupt):
        run_ranks(size, lambda comm: loop.train(config, comm))
