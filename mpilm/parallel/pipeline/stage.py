"""A part of the model as the interpreter sees it: forward, backward, reduce. Today the part is the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from mpilm.data.batch import Batch
from mpilm.model.init import key_of
from mpilm.model.loss import loss_sum


class Gradients(Protocol):
    """What collects the gradients of this rank's microbatches."""

    def begin(self, i: int) -> None: ...
    def end(self, i: int) -> None: ...
    def reduce(self) -> Tensor: ...


class ModelStage:
    """Runs microbatches of one step through `model`; `first` is the number of this rank's first microbatch.

    `autocast` makes the context in which forward computes. Dropout is keyed by (seed, step, sample).
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: Gradients,
        first: int,
        seed: int,
        autocast: Callable[[], AbstractContextManager[object]],
    ):
        self.model, self.gradients, self.first, self.seed, self.autocast = model, gradients, first, seed, autocast

    def start_step(self, step: int, batch_of: Callable[[int], Batch], target_tokens: int) -> None:
        """Say what the microbatch numbers of the next actions mean; losses are divided by `target_tokens`."""
        self.step, self.batch_of, self.target_tokens = step, batch_of, target_tokens
        self.pending: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}

    def forward(self, microbatch: int) -> None:
        batch = self.batch_of(microbatch)
        keys = [key_of("dropout", self.seed, self.step, sample) for sample in batch.samples.tolist()]
        with self.autocast():
            logits = self.model(batch.tokens, batch.positions, keys)
        self.pending[microbatch] = loss_sum(logits, batch.targets)

    def backward(self, microbatch: int) -> None:
        loss = self.pending.pop(microbatch)
        self.gradients.begin(microbatch - self.first)
        (loss / self.target_tokens).backward()
        self.gradients.end(microbatch - self.first)
        self.losses[microbatch] = loss.detach()  # not .item(): a GPU would have to finish first

    def reduce(self) -> None:
        self.gradient = self.gradients.reduce()


def no_grad_loss(model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """Sum of the token losses of a batch, without dropout."""
    with torch.no_grad(), autocast():
        return loss_sum(model(batch.tokens, batch.positions), batch.targets)
