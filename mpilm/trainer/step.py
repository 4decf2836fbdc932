"""One training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError
from mpilm.config import microbatches
from mpilm.data.batch import Batch
from mpilm.errors import NonFiniteError
from mpilm.optim.norm import global_norm
from mpilm.optim.rate import learning_rate
from mpilm.parallel.pipeline.execute import Timed
from mpilm.trainer.sharded import ShardedModel


class Source(Protocol):
    """Where microbatches come from (mpilm/data/batch.py)."""

    def train(self, step: int, m: int) -> Batch: ...
    def target_tokens(self, step: int) -> int: ...


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the target tokens of the global batch, in nats; `grad_norm`: before clipping. Both are the same on all
    ranks. `times`: of this rank's actions."""

    loss: float
    grad_norm: float
    lr: float
    times: list[Timed]


def train_step(model: ShardedModel, source: Source, step: int) -> StepResult:
    """Forward, backward, sum of gradients, clip, update. Collective over the mesh.

    Raises NonFiniteError, agreed by all ranks, before anything is updated.
    """
    loss, norm, times = gradients(model, source, step)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise AgreedError(NonFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; nothing was updated or saved since; "
            "a lower --train.lr or a longer --train.warmup-steps may help"
        ))  # fmt: skip
    lr = update(model, step, norm)
    return StepResult(loss, norm, lr, times)


def gradients(model: ShardedModel, source: Source, step: int) -> tuple[float, float, list[Timed]]:
    """The loss of a step and the norm of its gradient, which lies in `model.sums`. Collective over the mesh."""
    tokens, world = source.target_tokens(step), model.mesh.world
    times = model.compute(step, lambda m: source.train(step, m).to(model.device), max(1, tokens))
    model.ties.add_gradients(model.sums)
    loss = total_loss(model.results(), microbatches(model.config), world) / max(1, tokens)
    return loss, global_norm(model.counted(), world), times


def update(model: ShardedModel, step: int, norm: float) -> float:
    """Clip, and let the optimizer do its step; returns the learning rate. Collective over the mesh."""
    train = model.config.train
    if train.clip_norm and norm > train.clip_norm:
        model.scale(train.clip_norm / norm)
    lr = learning_rate(train, step)
    model.optimizer.step(model.sums, lr)
    model.publish()
    return lr


def total_loss(losses: Mapping[int, Tensor | float], total: int, comm: Comm) -> float:
    """The sum of the losses of all microbatches, each known to one rank, in the order of their numbers. Collective."""
    every = torch.zeros(total, dtype=torch.float64)
    for microbatch, loss in losses.items():
        every[microbatch] = float(loss)
    comm.all_reduce(every)  # adds zeros: exact
    return sum(every.tolist())
