"""One training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError
from mpilm.config import microbatches
from mpilm.data.batch import Batch
from mpilm.errors import NonFiniteError
from mpilm.optim.norm import global_norm
from mpilm.optim.rate import learning_rate
from mpilm.optim.reduce import slice_counts
from mpilm.parallel.pipeline.execute import execute
from mpilm.trainer.build import Training


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the target tokens of the global batch, in nats; the same on every rank."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int


def train_step(run: Training, step: int) -> StepResult:
    """Forward, backward, sum of gradients, clip, update. Collective over the mesh."""
    train, data = run.config.train, run.mesh.comm("data")
    tokens = run.batches.target_tokens(step)
    run.stage.start_step(step, partial(_batch, run, step), tokens)
    execute(run.program, {0: run.stage})
    loss = total_loss(run.stage.losses, microbatches(run.config), data) / tokens
    gradient = run.stage.gradient
    mine = gradient.split(slice_counts(gradient.numel(), data.size))[data.rank]
    norm = global_norm([mine], data)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise AgreedError(NonFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; nothing was updated. Checkpoints in "
            f"{run.folder.checkpoints} are from before; a lower --train.lr or a longer --train.warmup-steps may help"
        ))  # fmt: skip
    if train.clip_norm and norm > train.clip_norm:
        gradient.mul_(train.clip_norm / norm)
    lr = learning_rate(train, step)
    run.optimizer.step(run.flat.owned.views(gradient), lr)
    return StepResult(loss, norm, lr, tokens)


def _batch(run: Training, step: int, microbatch: int) -> Batch:
    return run.batches.train(step, microbatch).to(run.machine.device)


def total_loss(losses: Mapping[int, Tensor | float], total: int, comm: Comm) -> float:
    """The sum of the losses of all microbatches, each known to one rank, in the order of their numbers. Collective."""
    every = torch.zeros(total, dtype=torch.float64)
    for microbatch, loss in losses.items():
        every[microbatch] = float(loss)
    comm.all_reduce(every)  # adds zeros: exact
    return sum(every.tolist())
