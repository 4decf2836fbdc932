"""Gradient reduction once a step, over the microbatches and the ranks of the reduce axes (ZeRO 0 and 1).

Reproducible: additions follow the fixed tree of ops/tree.py. Each rank accumulates its contiguous block of microbatches; the
ranks complete the tree from all their nodes. Otherwise the MPI library's all-reduce adds in an order of its own.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.kernels.base import TORCH_KERNELS, Kernels
from mpilm.ops.tree import AccumulationPlan, Interval
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import intersect_intervals
from mpilm.parallel.pipeline.stage import GradientReducer
from mpilm.parallel.reduce.record import GradientRecord


class CrossRankReducer:
    """Reduces the tree nodes that ranks have accumulated to one sum. This one does nothing: a single rank's sum is complete."""

    uses_shared_buffers = False  # True: other ranks of the node map the buffers too
    adds_in_stages = False  # as in GradientReducer
    can_overlap = False  # True: `start` does something, so it may be called before all buckets are complete
    memory_bytes = 0  # used beside the gradients

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        """Start to reduce a bucket: this rank's nodes (`parts`) are complete; the sum goes to the first of them."""

    def finish(self) -> None:
        """Return when this rank has all the sums it needs."""

    def reset_residuals(self) -> None:
        """Discard the errors of earlier messages: they belong to a state that has been replaced."""


class StepReducer(GradientReducer):
    """Collects the gradients of this rank's block of microbatches in `buffers` and lets `across_ranks` sum them. `overlap`:
    start a bucket as soon as the last backward has completed it; may change between steps, on all ranks alike. Collective over
    the communicator of `across_ranks`."""

    def __init__(
        self,
        flat: FlatParameters,
        model: nn.Module,
        plan: AccumulationPlan,
        buffers: Sequence[FlatVector],
        across_ranks: CrossRankReducer,
        overlap: bool,
        kernels: Kernels = TORCH_KERNELS,
    ):
        self.kernels = kernels
        self.flat, self.buffers, self.across_ranks, self.overlap = flat, buffers, across_ranks, overlap
        self.ops, self.nodes_held = plan
        self.first_leaf = min(start for start, _ in self.nodes_held.values())
        self.record: GradientRecord | None = None  # of this step
        self.adds_in_stages = across_ranks.adds_in_stages
        self.sums, self.buckets = buffers[0], flat.layout.buckets
        self.views = [{name: flat.parameter(name, buffer) for name in flat.layout.spans} for buffer in buffers]
        self.parts = {bucket: [buffers[b].view(*bucket) for b in self.nodes_held] for bucket in self.buckets}
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.spans}
        self.names = [
            {name for name in group.names if intersect_intervals([flat.layout.padded_span(name)], [bucket])}
            for group in flat.layout.groups
            for bucket in group.buckets
        ]  # the parameters that each bucket waits for
        self.started = len(self.buckets)
        self.is_collecting = False  # within a microbatch
        self.overwrite, self.pending = False, dict[str, Tensor]()  # parameters whose first gradient overwrites a buffer
        gradient_bytes = sum(buffer.tensor.nbytes for buffer in buffers)
        self.memory_bytes = {"gradients": gradient_bytes, "exchange": across_ranks.memory_bytes}
        self.shared_bytes = gradient_bytes if across_ranks.uses_shared_buffers else 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
            for name, parameter in self.parameters.items()
        ]

    def close(self) -> None:
        """Stop collecting gradients, so that another reducer can."""
        for hook, parameter in zip(self._hooks, self.parameters.values()):
            hook.remove()
            parameter.grad = None

    def reset_residuals(self) -> None:
        self.across_ranks.reset_residuals()

    def begin_microbatch(self, i: int) -> None:
        """Direct the gradients of this rank's i-th microbatch to the buffer that the plan assigns. Gradients are copied into a
        fresh buffer as they come, which reads and writes half of what adding to zeros would."""
        op, self.is_collecting, self.leaf = self.ops[i], True, (self.first_leaf + i, self.first_leaf + i + 1)
        self.overwrite, self.into = op.overwrite, self.views[op.buffer]
        self.pending = dict(self.into) if op.overwrite else {}
        for name, parameter in self.parameters.items():
            parameter.grad = None if op.overwrite or self._is_moved(parameter) else self.into[name]
        if self.record is not None:
            self.record.note_leaf(self.leaf)
        if i == len(self.ops) - 1:
            self.started, self.complete = 0, set[str]()  # buckets started, and parameters whose gradient has arrived

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add a gradient computed outside backward, between `begin_microbatch` and `end_microbatch`."""
        if self.record is not None:
            self.record.note_leaf(self.leaf, self.flat.layout.spans[name][0], gradient)
        if (place := self.pending.pop(name, None)) is None:
            self.kernels.accumulate_(self.into[name], gradient)
        else:
            self.kernels.store_(place, gradient)

    def _is_moved(self, parameter: Tensor) -> bool:
        """Return whether each gradient is moved into its buffer, rather than added to it in backward. The bits are the same."""
        return self.record is not None or parameter.dtype != torch.float32

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        """Move a gradient that backward has completed into a buffer. Start the buckets that waited for it."""
        is_moved = self.overwrite or (self.is_collecting and self._is_moved(parameter))
        if is_moved and parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            self.accumulate(name, gradient.to_dense())
        if self.overlap and self.started < len(self.buckets):  # the last microbatch
            self.complete.add(name)
            while self.started < len(self.buckets) and self.names[self.started] <= self.complete:
                self._start_next_bucket()

    def end_microbatch(self, i: int) -> None:
        """Merge the gradient into the tree; `reduce` merges that of the last microbatch bucket by bucket."""
        for place in self.pending.values():  # parameters that this microbatch did not use
            place.zero_()
        self.overwrite, self.pending, self.is_collecting = False, {}, False
        if i < len(self.ops) - 1:
            self._merge_buffers(i, 0, self.flat.layout.numel)

    def reduce(self) -> None:
        """Leave the sum over all microbatches of all ranks in `sums`, in the intervals `flat.reduced`."""
        while self.started < len(self.buckets):
            self._start_next_bucket()
        self.across_ranks.finish()
        if self.record is not None:
            self.record.note_sum(self.sums)

    def _merge_buffers(self, i: int, start: int, stop: int) -> None:
        for into, other in self.ops[i].merges:
            self.buffers[into].view(start, stop).add_(self.buffers[other].view(start, stop))

    def _start_next_bucket(self) -> None:
        bucket = self.buckets[self.started]
        self.started += 1
        self._merge_buffers(len(self.ops) - 1, *bucket)
        if self.record is not None:
            for buffer, node in self.nodes_held.items():
                self.record.note_node(node, bucket[0], self.buffers[buffer].view(*bucket))
        self.across_ranks.start(self.parts[bucket], bucket)
