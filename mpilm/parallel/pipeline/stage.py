"""One pipeline stage of the model, as the interpreter runs it. With one stage it is the whole model."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.data.batch import Batch
from mpilm.kernels.base import loss_sum
from mpilm.kernels.linear_cross_entropy import DeferredLogits
from mpilm.model.layers import hash_key
from mpilm.model.sequence_info import KVCache, SequenceInfo
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.parallel.pipeline.actions import Direction
from mpilm.parallel.split_backward import WeightGradQueue, backward_with
from mpilm.parallel.tensor import PartLogits


class GradientReducer:
    """Collects the gradients of this rank's microbatches and reduces them (parallel/reduce): in `reduce`, or in rounds that a
    rank without a microbatch joins. This one, for forward-only runs, does nothing."""

    parameters: Mapping[str, Tensor] = {}
    shared_bytes = 0  # of gradients, in memory that other ranks of the node map too
    unit_names: Sequence[str] = ()  # a parameter of each FSDP unit, in backward order, if parameters are gathered
    adds_in_stages = False  # True: ranks add parts of a sum that another rank then completes

    def begin_microbatch(self, i: int) -> None: ...
    def accumulate(self, name: str, gradient: Tensor) -> None: ...
    def end_microbatch(self, i: int) -> None: ...
    def join_round(self, i: int, begin_backward: Callable[[str], None]) -> None: ...
    def reduce(self) -> None: ...


class DiscardingReducer(GradientReducer):
    """Discards gradients in the place of another reducer, whose gathers of parameters it joins."""

    def __init__(self, reducer: GradientReducer):
        self.parameters, self.unit_names = reducer.parameters, reducer.unit_names

    def begin_microbatch(self, i: int) -> None:
        for parameter in self.parameters.values():
            _free_gradient(parameter)

    def join_round(self, i: int, begin_backward: Callable[[str], None]) -> None:
        for name in self.unit_names:
            begin_backward(name)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class StageParameters:
    """The parameters of a stage that are always full on its ranks. parallel/fsdp.py gathers those that are not."""

    memory_bytes = 0  # of parameters that are full only while they are used

    def refresh(self) -> None:
        """Follow a change of the values."""

    def end_backward(self) -> None: ...
    def join_forward(self) -> None: ...
    def begin_backward(self, name: str) -> None: ...
    def join_backward(self) -> None: ...


Logits = Tensor | PartLogits  # in training, also DeferredLogits
# Labels of what ModelStage.observing shows besides gradients of parameters, in the order of computation.
RECEIVED_ACTIVATION, SENT_ACTIVATION, LOSS = "the activation received", "the activation sent", "the loss"
RECEIVED_GRADIENT, SENT_GRADIENT = "the gradient received", "the gradient sent"


def token_losses(
    logits: Logits | DeferredLogits, batch: Batch, sum_losses: Callable[[Tensor, Tensor], Tensor] = loss_sum
) -> Tensor:
    """Return the sum of the token losses of each sequence part of a microbatch, (S,): zero for parts of other ranks."""
    if isinstance(logits, DeferredLogits):
        return batch.place_parts([logits.loss_sum(batch.targets)])
    if isinstance(logits, PartLogits):
        return batch.place_parts([losses.sum() for losses in batch.split_parts(logits.losses(batch.targets))])
    pairs = zip(batch.split_parts(logits), batch.split_parts(batch.targets))
    return batch.place_parts([sum_losses(*pair) for pair in pairs])


def last_logits(logits: Logits, batch: Batch) -> Tensor:
    """Return the logits of the token after the first sequence, float32, (V,)."""
    return logits.gather_last() if isinstance(logits, PartLogits) else logits[0, -1].float()


@dataclass(frozen=True)
class StepInputs:
    """The microbatches of one program on this replica."""

    fetch: Callable[[int], Batch]  # the batch of a microbatch of the global batch
    microbatch_ids: Sequence[int]  # the global numbers of this replica's microbatches; a program may have more of them
    step: int | None = None  # keys dropout; None: neither dropout nor gradients
    divisor: float = 1  # of the losses, before backward: the target tokens of the step
    output_fn: Callable[[Any, Batch], Tensor] = token_losses  # applied to the logits by the last stage
    kv_caches: Mapping[int, KVCache] | None = None  # by global number, for decoding


@dataclass(eq=False)
class ModelStage:
    """Runs microbatches through one stage; activations are (B, T, `width`), float32. Dropout is keyed by (seed, step, sample),
    so the masks do not depend on the rank. Made by parallelize() (parallel/apply.py)."""

    model: nn.Module
    is_first: bool
    is_last: bool
    reducers: Sequence[GradientReducer]
    parameters: StageParameters
    weight_grads: WeightGradQueue  # used by schedules with W
    tensor: TensorAxis
    autocast: Callable[[], torch.autocast]
    width: int
    seed: int
    device: torch.device
    recorder: FlightRecorder
    fills_rounds: bool = False  # a microbatch that this replica lacks runs without sequences: other ranks need its experts

    def __post_init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)  # buffers, reused: none is new after the first step

    def observe(self, microbatch: int, label: str, x: Tensor) -> None:
        """Receive what `observing` shows."""

    def start(self, inputs: StepInputs) -> None:
        """Set the microbatches of the next program."""
        self.inputs = inputs
        self.results: dict[int, Tensor] = {}  # outputs of the last stage, by global number of the microbatch
        self._batches: dict[int, tuple[Batch, bool]] = {}  # with whether its tokens are sliced
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        # Messages: activations (direction F) and their gradients (B), by direction and microbatch.
        self._received: dict[tuple[Direction, int], Tensor] = {}
        self._outgoing: dict[tuple[Direction, int], Tensor] = {}

    def receive_buffer(self, direction: Direction, microbatch: int) -> Tensor:
        """Return the buffer that receives the input of a microbatch, or the gradient of its output."""
        self._set_slicing(microbatch)
        sequences, tokens = self._batch(microbatch).tokens.shape
        shape = (sequences, self.tensor.count_own(tokens), self.width)
        buffer = self._free[shape].pop() if self._free[shape] else torch.empty(shape, device=self.device)
        self._received[direction, microbatch] = buffer
        return buffer

    def pop_outgoing(self, direction: Direction, microbatch: int) -> Tensor:
        """Return the output of a microbatch, or the gradient of its input, to be sent."""
        return self._outgoing.pop((direction, microbatch))

    def forward(self, microbatch: int) -> None:
        if not self._exists(microbatch):
            return self.parameters.join_forward()
        self.forward_microbatch = microbatch
        self._set_slicing(microbatch)
        training, batch = self.inputs.step is not None, self._batch(microbatch)
        x = batch.tokens if self.is_first else self._received["F", microbatch].detach().requires_grad_(training)
        with torch.set_grad_enabled(training), self.autocast():
            y = self.model(x.view_as(x), self._sequence_info(microbatch))  # a view: autocast caches copies of leaves
            if self.is_last:
                y = self.inputs.output_fn(y, batch)
        if self.is_last:
            if microbatch < len(self.inputs.microbatch_ids):
                self.results[self.inputs.microbatch_ids[microbatch]] = y.detach()  # not .item(): that would synchronize a GPU
        else:
            self._outgoing["F", microbatch] = y.detach()
        if training:
            if not self.is_first:
                self.observe(microbatch, RECEIVED_ACTIVATION, x.detach())
            self.observe(microbatch, LOSS if self.is_last else SENT_ACTIVATION, y.detach())
            self._graphs[microbatch] = x, y
        else:
            self._release_buffers(microbatch)

    def backward(self, microbatch: int) -> None:
        if not self._exists(microbatch):
            for reducer in self.reducers:
                reducer.join_round(microbatch, self.parameters.begin_backward)
            return self.parameters.end_backward()
        self._begin_microbatch(microbatch)
        self._backward(microbatch)
        self._end_microbatch(microbatch)

    def backward_input(self, microbatch: int) -> None:
        """Compute the gradient of the input, for which the previous stage waits; queue what the weight gradients need."""
        if not self._exists(microbatch):
            return self.parameters.join_backward()
        self.weight_grads.microbatch = microbatch
        for parameter in self.model.parameters():
            parameter.grad = None
        self._backward(microbatch)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.weight_grads.push_completed(name, parameter.grad)
                parameter.grad = None

    def backward_weight(self, microbatch: int) -> None:
        if not self._exists(microbatch):
            for reducer in self.reducers:
                reducer.join_round(microbatch, lambda name: None)
            return
        self.backward_microbatch = microbatch
        self._begin_microbatch(microbatch)
        for name, gradient in self.weight_grads.pop_gradients(microbatch):
            next(reducer for reducer in self.reducers if name in reducer.parameters).accumulate(name, gradient)
        self._end_microbatch(microbatch)  # not earlier: a queued product may use a received buffer

    def reduce(self) -> None:
        for reducer in self.reducers:
            reducer.reduce()

    @contextlib.contextmanager
    def observing(self, observe: Callable[[int, str, Tensor], None]) -> Iterator[None]:
        """Call observe(microbatch, label, x) in training for each message of this stage (ACTIVATION, ...), its LOSS, and the
        gradient of each parameter, labelled with its name, before it is added to others. Microbatches by global number."""

        def observe_own(microbatch: int, label: str, x: Tensor) -> None:
            if microbatch < len(self.inputs.microbatch_ids):
                observe(self.inputs.microbatch_ids[microbatch], label, x)

        def observe_backward(name: str, gradient: Tensor) -> None:
            if not self.weight_grads.is_used:  # else they come from there, too
                observe_own(self.backward_microbatch, name, gradient.float())

        def observe_pending(microbatch: int) -> Iterator[tuple[str, Tensor]]:
            for name, gradient in pop_gradients(microbatch):
                observe_own(microbatch, name, gradient.float())
                yield name, gradient

        pop_gradients = self.weight_grads.pop_gradients
        with contextlib.ExitStack() as stack:
            self.observe = observe_own  # type: ignore[method-assign]
            stack.callback(delattr, self, "observe")
            self.weight_grads.pop_gradients = observe_pending  # type: ignore[method-assign]
            stack.callback(delattr, self.weight_grads, "pop_gradients")
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_hook(partial(observe_backward, name)).remove)
            yield

    @contextlib.contextmanager
    def discarding_gradients(self) -> Iterator[None]:
        """Compute gradients without reducing them: each is freed at once. Gradients reduced before stay as they are."""
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "reducers", self.reducers)
            self.reducers = [DiscardingReducer(reducer) for reducer in self.reducers]
            for parameter in self.model.parameters():
                if parameter.requires_grad and not self.weight_grads.is_used:  # which frees them itself
                    stack.callback(parameter.register_post_accumulate_grad_hook(_free_gradient).remove)
            yield

    def _begin_microbatch(self, microbatch: int) -> None:
        for reducer in self.reducers:
            reducer.begin_microbatch(microbatch)

    def _end_microbatch(self, microbatch: int) -> None:
        self._release_buffers(microbatch)
        for reducer in self.reducers:
            reducer.end_microbatch(microbatch)

    def _backward(self, microbatch: int) -> None:
        self.backward_microbatch = microbatch
        self._set_slicing(microbatch)
        x, y = self._graphs.pop(microbatch)
        if self.is_last:
            (y.sum() / self.inputs.divisor).backward()
        else:
            self.observe(microbatch, RECEIVED_GRADIENT, self._received["B", microbatch])
            backward_with(y, self._received["B", microbatch])
        self.parameters.end_backward()
        if not self.is_first:
            assert x.grad is not None
            self.observe(microbatch, SENT_GRADIENT, x.grad)
            self._outgoing["B", microbatch] = x.grad

    def _release_buffers(self, microbatch: int) -> None:
        del self._batches[microbatch]
        for key in [key for key in self._received if key[1] == microbatch]:
            buffer = self._received.pop(key)
            self._free[tuple(buffer.shape)].append(buffer)

    def _exists(self, microbatch: int) -> bool:
        return self.fills_rounds or microbatch < len(self.inputs.microbatch_ids)

    def _batch(self, microbatch: int) -> Batch:
        """Return the tokens of a microbatch that this rank reads: those of its sequence parts, if the tokens are sliced."""
        sequence = self.tensor.sequence
        if microbatch not in self._batches:
            is_own = microbatch < len(self.inputs.microbatch_ids)
            batch = self.fetch_batch(self.inputs.microbatch_ids[microbatch] if is_own else 0)
            batch = batch if is_own else batch.select_none()
            sequence.sliced = self.inputs.kv_caches is None and batch.tokens.shape[1] % self.tensor.slice_count == 0
            if sequence.parts > 1:  # without slices, each rank of the context axis computes the same, and the first reports it
                parts = sequence.local_parts if sequence.sliced else range(sequence.comm.rank == 0)
                batch = batch.select_parts(sequence.select_own, parts, sequence.parts)
            self._batches[microbatch] = batch, sequence.sliced
        return self._batches[microbatch][0]

    def _set_slicing(self, microbatch: int) -> None:
        """Let the ranks of the tensor and context axes divide the tokens, if the tokens divide and none is generated."""
        self._batch(microbatch)
        self.tensor.sequence.sliced = self._batches[microbatch][1]

    def fetch_batch(self, number: int) -> Batch:
        """Read a microbatch of the global batch."""
        with self.recorder.span("data"):
            return self.inputs.fetch(number).to(self.device)

    def _sequence_info(self, microbatch: int) -> SequenceInfo:
        batch, inputs = self._batch(microbatch), self.inputs
        if inputs.step is None:
            cache = None if inputs.kv_caches is None else inputs.kv_caches[inputs.microbatch_ids[microbatch]]
            return SequenceInfo(batch.positions, documents=batch.documents, cache=cache)
        keys = [hash_key("dropout", self.seed, inputs.step, sample) for sample in batch.samples.tolist()]
        return SequenceInfo(batch.positions, keys, batch.documents, loss_weight=batch.target_tokens / inputs.divisor)
