"""A part of the model as the interpreter sees it. With one stage the part is the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mpilm.data.batch import Batch
from mpilm.model.cache import Cache
from mpilm.model.init import key_of
from mpilm.model.loss import loss_sum
from mpilm.model.rows import Rows
from mpilm.parallel.deferred import Store
from mpilm.parallel.given import backward_from


class Gradients(Protocol):
    """What collects the gradients of this rank's microbatches and sums them (mpilm/optim)."""

    def begin(self, i: int) -> None: ...
    def deliver(self, name: str, gradient: Tensor) -> None: ...
    def end(self, i: int) -> None: ...
    def join(self, i: int, begin_backward: Callable[[str], None]) -> None: ...
    def reduce(self) -> None: ...


class Presence(Protocol):
    """What brings the parameters where they are needed, for ranks that have a microbatch and for those that have none."""

    @property
    def held_bytes(self) -> int: ...

    def end_backward(self) -> None: ...
    def join_forward(self) -> None: ...
    def begin_backward(self, name: str) -> None: ...
    def join_backward(self) -> None: ...


class NoGradients:
    """In the place of Gradients where nothing goes backward."""

    def begin(self, i: int) -> None: ...
    def deliver(self, name: str, gradient: Tensor) -> None: ...
    def end(self, i: int) -> None: ...
    def join(self, i: int, begin_backward: Callable[[str], None]) -> None: ...
    def reduce(self) -> None: ...


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The sum of the token losses of a microbatch."""
    return loss_sum(logits, batch.targets)


@dataclass(frozen=True)
class Feed:
    """What the microbatches 0, 1, ... of a program are on this replica.

    `numbers`: their numbers in the global batch; a program may have more microbatches than this replica. `step`: what dropout
    is keyed by; None: no dropout and no gradients. `target_tokens`: what losses are divided by before backward.
    `result`: what the last stage makes of its logits. `caches`: by number, of microbatches that go on where they stopped.
    """

    batch_of: Callable[[int], Batch]
    numbers: Sequence[int]
    step: int | None = None
    target_tokens: int = 1
    result: Callable[[Tensor, Batch], Tensor] = token_losses
    caches: Mapping[int, Cache] | None = None


class Pool:
    """Buffers that are used again: after the first step nothing is allocated."""

    def __init__(self, device: torch.device):
        self.device = device
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        free = self._free[shape]
        return free.pop() if free else torch.empty(shape, device=self.device)

    def give(self, buffer: Tensor) -> None:
        self._free[tuple(buffer.shape)].append(buffer)


class ModelStage:
    """Runs microbatches through `model`, one stage of a pipeline; activations are (B, T, `width`), float32.

    `store`: where the model's weight gradients are deferred to, with a schedule that has W. Dropout is keyed by (seed, step,
    sample), so the masks do not depend on who computes.
    """

    def __init__(
        self,
        model: nn.Module,
        ends: tuple[bool, bool],
        gradients: Gradients,
        presence: Presence,
        store: Store,
        width: int,
        seed: int,
        autocast: Callable[[], AbstractContextManager[object]],
        device: torch.device,
    ):
        self.model, self.gradients, self.presence, self.store = model, gradients, presence, store
        self.first, self.last = ends
        self.width, self.seed, self.autocast, self.pool = width, seed, autocast, Pool(device)

    def start(self, feed: Feed) -> None:
        """Say what the microbatches of the next program are."""
        self.feed = feed
        self.results: dict[int, Tensor] = {}
        """What the last stage has made of each microbatch, by its number in the global batch."""
        self._batches: dict[int, Batch] = {}
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self._output_gradients: dict[int, Tensor] = {}
        self._input_gradients: dict[int, Tensor] = {}

    # Memory of what is received and sent.

    def input(self, microbatch: int) -> Tensor:
        """Where the input of a microbatch is to be received."""
        self._inputs[microbatch] = self.pool.take(self._shape(microbatch))
        return self._inputs[microbatch]

    def output(self, microbatch: int) -> Tensor:
        return self._outputs.pop(microbatch)

    def output_gradient(self, microbatch: int) -> Tensor:
        """Where the gradient of the output is to be received."""
        self._output_gradients[microbatch] = self.pool.take(self._shape(microbatch))
        return self._output_gradients[microbatch]

    def input_gradient(self, microbatch: int) -> Tensor:
        return self._input_gradients.pop(microbatch)

    # Computation.

    def forward(self, microbatch: int) -> None:
        if not self._present(microbatch):
            return self.presence.join_forward()
        training, batch = self.feed.step is not None, self._batch(microbatch)
        x = batch.tokens if self.first else self._inputs[microbatch].detach().requires_grad_(training)
        with torch.set_grad_enabled(training), self.autocast():
            y = self.model(x.view_as(x), self._rows(microbatch))  # autocast treats a leaf in a way of its own
            if self.last:
                y = self.feed.result(y, batch)
        if self.last:
            self.results[self.feed.numbers[microbatch]] = y.detach()  # not .item(): a GPU would have to finish first
        else:
            self._outputs[microbatch] = y.detach()
        if training:
            self._graphs[microbatch] = x, y
        else:
            self._let_go(microbatch)

    def backward(self, microbatch: int) -> None:
        if not self._present(microbatch):
            self.gradients.join(microbatch, self.presence.begin_backward)
            return self.presence.end_backward()
        self.gradients.begin(microbatch)
        self._backward(microbatch)
        self._let_go(microbatch)
        self.gradients.end(microbatch)

    def backward_input(self, microbatch: int) -> None:
        """The half that the stage before is waiting for; what the other half needs goes to the store."""
        if not self._present(microbatch):
            return self.presence.join_backward()
        self.store.current = microbatch
        for parameter in self.model.parameters():
            parameter.grad = None
        self._backward(microbatch)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.store.keep(name, parameter.grad)
                parameter.grad = None

    def backward_weight(self, microbatch: int) -> None:
        if not self._present(microbatch):
            return self.gradients.join(microbatch, lambda name: None)
        self.in_backward = microbatch
        self.gradients.begin(microbatch)
        for name, gradient in self.store.gradients(microbatch):
            self.gradients.deliver(name, gradient)
        self._let_go(microbatch)  # not earlier: what was received may itself be owed
        self.gradients.end(microbatch)

    def reduce(self) -> None:
        self.gradients.reduce()

    def _backward(self, microbatch: int) -> None:
        self.in_backward = microbatch
        x, y = self._graphs.pop(microbatch)
        if self.last:
            (y / self.feed.target_tokens).backward()
        else:
            backward_from(y, self._output_gradients[microbatch])
        self.presence.end_backward()
        if not self.first:
            assert x.grad is not None
            self._input_gradients[microbatch] = x.grad

    def _let_go(self, microbatch: int) -> None:
        del self._batches[microbatch]
        for buffers in (self._inputs, self._output_gradients):
            if microbatch in buffers:
                self.pool.give(buffers.pop(microbatch))

    def _present(self, microbatch: int) -> bool:
        return microbatch < len(self.feed.numbers)

    def _batch(self, microbatch: int) -> Batch:
        if microbatch not in self._batches:
            self._batches[microbatch] = self.feed.batch_of(self.feed.numbers[microbatch])
        return self._batches[microbatch]

    def _shape(self, microbatch: int) -> tuple[int, ...]:
        return (*self._batch(microbatch).tokens.shape, self.width)

    def _rows(self, microbatch: int) -> Rows:
        batch = self._batch(microbatch)
        if self.feed.step is None:
            cache = None if self.feed.caches is None else self.feed.caches[self.feed.numbers[microbatch]]
            return Rows(batch.positions, documents=batch.documents, cache=cache)
        keys = [key_of("dropout", self.seed, self.feed.step, sample) for sample in batch.samples.tolist()]
        return Rows(batch.positions, keys, batch.documents, share=batch.target_tokens / self.feed.target_tokens)
