"""One training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.config import microbatches
from mpilm.data.batch import Batch
from mpilm.optim.rate import learning_rate
from mpilm.trainer.sharded import ShardedModel

WISHES = 8


class Source(Protocol):
    """Where microbatches come from (mpilm/data/batch.py)."""

    def train(self, step: int, m: int) -> Batch: ...
    def target_tokens(self, step: int) -> int: ...


class Said(NamedTuple):
    """What a rank has to say to the others, with its losses; and of all: the largest wish, and whether any is busy.

    `wish`: a number below WISHES. `busy`: with a checkpoint.
    """

    wish: int = 0
    busy: bool = False


NOTHING = Said()


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the target tokens of the global batch, in nats; `grad_norm`: before clipping. `updated`: whether they
    were finite and the loss no spike. `heard`: what the ranks have said to each other. The same on all ranks."""

    loss: float
    grad_norm: float
    lr: float
    updated: bool
    heard: Said


def train_step(
    model: ShardedModel, source: Source, step: int, say: Said = NOTHING, highest_loss: float = math.inf
) -> StepResult:
    """Forward, backward, sum of gradients, clip, update. Collective over the mesh.

    Where the loss or the gradient is not finite, or the loss above `highest_loss`, nothing is updated, on all ranks alike.
    """
    loss, norm, heard = gradients(model, source, step, say)
    good = math.isfinite(loss) and math.isfinite(norm) and loss <= highest_loss
    lr = update(model, step, norm) if good else learning_rate(model.config.train, step)
    if model.met(step + 1):
        model.meet()
    return StepResult(loss, norm, lr, good, heard)


def gradients(model: ShardedModel, source: Source, step: int, say: Said = NOTHING) -> tuple[float, float, Said]:
    """The loss of a step and the norm of its gradient, which lies in `model.sums`. Collective over the mesh."""
    tokens, world, activity = source.target_tokens(step), model.mesh.world, model.mesh.activity

    def batch_of(m: int) -> Batch:
        activity.at("data.next")
        with activity.span("data"):
            return source.train(step, m).to(model.device)

    model.compute(step, batch_of, max(1, tokens))
    model.ties.add_gradients(model.sums)
    with activity.span("compute"):  # a GPU is waited for
        losses = {m: float(loss) for m, loss in model.results().items()}
    loss, heard = loss_and_said(losses, microbatches(model.config), world, say)
    with activity.span("optimizer"):
        return loss / max(1, tokens), model.norm(), heard


def update(model: ShardedModel, step: int, norm: float) -> float:
    """Clip, and let the optimizer do its step; returns the learning rate. Collective over the mesh."""
    train, lr = model.config.train, learning_rate(model.config.train, step)
    with model.mesh.activity.span("optimizer"):
        if train.clip_norm and norm > train.clip_norm:
            model.scale(train.clip_norm / norm)
        model.mesh.activity.at("optimizer")
        model.optimizer.step(model.sums, lr)
        model.publish()
    return lr


def total_loss(losses: Mapping[int, Tensor | float], total: int, comm: Comm) -> float:
    """The sum of the losses of all microbatches, each known to one rank, in the order of their numbers. Collective."""
    return loss_and_said(losses, total, comm, NOTHING)[0]


def loss_and_said(losses: Mapping[int, Tensor | float], total: int, comm: Comm, say: Said) -> tuple[float, Said]:
    """That sum, and what all ranks have to say: one message for both. Collective."""
    every = torch.zeros(total + WISHES + 1, dtype=torch.float64, device="cpu")
    for microbatch, loss in losses.items():
        every[microbatch] = float(loss)
    every[total + say.wish] = 1.0
    every[-1] = say.busy
    comm.all_reduce(every)  # adds zeros: exact
    return sum(every[:total].tolist()), Said(int(every[total:-1].nonzero().max()), bool(every[-1]))
