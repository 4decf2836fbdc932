"""One training step, and the validation loss."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.data.batch import Batch, Batches
from mpilm.engine.pipelined import PipelinedModel
from mpilm.engine.recheck import Recheck
from mpilm.engine.state_check import check_state, state_mismatch
from mpilm.engine.train_model import TrainModel
from mpilm.optim.optimizer import learning_rate

STOP_REASON_COUNT = 8  # length of the one-hot stop reason in gather_losses_and_flags


class MicrobatchSource(Protocol):
    """The training data by step and microbatch (data/batch.py)."""

    def training_batch(self, step: int, m: int) -> Batch: ...
    def target_tokens(self, step: int) -> int: ...


class StepFlags(NamedTuple):
    """Flags that ranks agree on each step, sent along with the losses."""

    stop_reason: int = 0  # agreed: the highest (launch/stop_request.py; 0: none), below STOP_REASON_COUNT
    checkpoint_pending: bool = False  # agreed: whether any rank is still writing a checkpoint
    state_mismatch: float = 0.0  # agreed: the sum; 0 unless bits are wrong (engine/state_check.py)


NO_FLAGS = StepFlags()


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all ranks."""

    loss: float  # mean over the target tokens of the global batch, in nats
    grad_norm: float  # before clipping
    lr: float
    updated: bool  # loss and gradient were finite and the loss was not a spike
    flags: StepFlags
    losses: tuple[float, ...]  # sums over the target tokens of each sequence part of each microbatch


class StepGradient(NamedTuple):
    """The numbers that forward and backward of a step leave, the same on all ranks; as in StepResult."""

    loss: float
    norm: float
    losses: tuple[float, ...]
    flags: StepFlags


def train_step(
    model: TrainModel,
    source: MicrobatchSource,
    step: int,
    flags: StepFlags = NO_FLAGS,
    max_loss: float = math.inf,
    recheck: Recheck | None = None,
) -> StepResult:
    """Forward, backward, reduce gradients, clip; update if all is finite and the loss at most `max_loss`. Collective."""
    with recheck.recording(step) if recheck else contextlib.nullcontext():
        loss, norm, losses, flags = forward_backward(model, source, step, flags)
    if recheck:
        recheck.verify(step, partial(source.training_batch, step), max(1, source.target_tokens(step)))
    updated = math.isfinite(loss) and math.isfinite(norm) and loss <= max_loss
    lr = optimizer_step(model, step, norm, recheck) if updated else learning_rate(model.config.train, step)
    if model.are_replicas_in_sync(step + 1):
        model.sync_replicas()
    return StepResult(loss, norm, lr, updated, flags, losses)


def forward_backward(model: TrainModel, source: MicrobatchSource, step: int, flags: StepFlags = NO_FLAGS) -> StepGradient:
    """Return loss and gradient norm of a step, and the agreed flags. The gradient is left in `model.sums`. Collective."""
    tokens, recorder = max(1, source.target_tokens(step)), model.mesh.recorder
    model.forward_backward(step, partial(source.training_batch, step), tokens)
    with recorder.span("compute"):  # waits for a GPU
        own_losses = {m: loss.cpu() for m, loss in model.results().items()}
    with recorder.span("optimizer"):
        flags = flags._replace(state_mismatch=state_mismatch(model, step))
    losses, flags = gather_losses_and_flags(own_losses, model.microbatch_count, model.mesh.world, flags, model.sequence.parts)
    if flags.state_mismatch:  # before wrong weights are updated
        check_state(model, step)
    with recorder.span("optimizer"):
        return StepGradient(sum(losses) / tokens, model.gradient_norm(), losses, flags)


def optimizer_step(model: TrainModel, step: int, norm: float, recheck: Recheck | None = None) -> float:
    """Clip the gradient, update the parameters, and return the learning rate. Collective over the mesh."""
    train, lr = model.config.train, learning_rate(model.config.train, step)
    with model.mesh.recorder.span("optimizer"):
        if train.clip_norm and norm > train.clip_norm:
            model.scale_gradients(train.clip_norm / norm)
        with recheck.verifying_update(step, lr) if recheck else contextlib.nullcontext():
            model.optimizer.step(model.sums, lr)
        model.all_gather_parameters()
    return lr


def validation_loss(model: PipelinedModel, batches: Batches, eval_batches: int) -> float:
    """Return the mean loss per token, in nats, over so many global batches of held-out text (0: all). Collective."""
    total = batches.eval_microbatches(eval_batches)
    losses = model.forward(total, batches.evaluation_batch)
    return total_loss(losses, total, model.mesh.world, model.sequence.parts) / max(1, batches.eval_targets(eval_batches))


def total_loss(losses: Mapping[int, Tensor | float], total: int, comm: Comm, parts: int = 1) -> float:
    """Return the sum of the losses of all microbatches and their sequence `parts`, each computed on one rank, in their order.
    Collective."""
    return sum(gather_losses_and_flags(losses, total, comm, NO_FLAGS, parts)[0])


def gather_losses_and_flags(
    losses: Mapping[int, Tensor | float], total: int, comm: Comm, flags: StepFlags, parts: int = 1
) -> tuple[tuple[float, ...], StepFlags]:
    """Return all losses and the agreed flags, in one all-reduce of the losses of each microbatch, one for each of its sequence
    `parts`, a one-hot stop reason, and the other flags. Each loss comes from one rank and meets only zeros, so the result is
    exact. Collective."""
    count = total * parts
    packed = torch.zeros(count + STOP_REASON_COUNT + 2, dtype=torch.float64, device="cpu")
    for microbatch, loss in losses.items():
        packed[microbatch * parts : (microbatch + 1) * parts] = loss
    packed[count + flags.stop_reason] = 1.0
    packed[-2], packed[-1] = flags.checkpoint_pending, flags.state_mismatch
    comm.all_reduce(packed)
    agreed = StepFlags(int(packed[count:-2].nonzero().max()), bool(packed[-2]), float(packed[-1]))
    return tuple(packed[:count].tolist()), agreed
