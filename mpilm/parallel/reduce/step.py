"""Gradient reduction once a step, over the microbatches and the ranks of the reduce axes (ZeRO 0 and 1).

Reproducible: additions follow the fixed tree of ops/tree.py. Each rank accumulates its contiguous block of microbatches; the
ranks complete the tree from all their nodes. Otherwise the MPI library's all-reduce adds in an order of its own.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.ops.tree import AccumulateOp, Interval
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.pipeline.stage import GradientReducer


class CrossRankReducer:
    """Reduces the tree nodes that ranks have accumulated to one sum. This one does nothing: a single rank's sum is complete."""

    uses_shared_buffers = False  # True: other ranks of the node map the buffers too

    def start(self, parts: Sequence[Tensor], bucket: Interval) -> None:
        """Begin with a bucket: this rank's nodes (`parts`) are complete; the sum goes to the first of them."""

    def finish(self) -> None:
        """Return when this rank has all the sums it needs."""

    def reset_residuals(self) -> None:
        """Discard the errors of earlier messages: they belong to a state that has been replaced."""

    @property
    def memory_bytes(self) -> int:
        """Memory used beside the gradients."""
        return 0


class StepReducer(GradientReducer):
    """Collects the gradients of this rank's block of microbatches in `buffers` and lets `reducer` sum them over the ranks.

    `ops`: the accumulation of each microbatch. `node_buffers`: the buffers that hold a tree node after the last one.
    `overlap`: start a bucket as soon as the last backward has completed it. Collective over the communicators of `reducer`.
    """

    def __init__(
        self,
        flat: FlatParameters,
        model: nn.Module,
        ops: Sequence[AccumulateOp],
        buffers: Sequence[FlatVector],
        node_buffers: Sequence[int],
        reducer: CrossRankReducer,
        overlap: bool = False,
    ):
        self.flat, self.ops, self.buffers, self.reducer = flat, ops, buffers, reducer
        self.sums, self.buckets = buffers[0], flat.layout.buckets
        self.views = [{name: flat.parameter(name, buffer) for name in flat.layout.spans} for buffer in buffers]
        self.parts = {bucket: [buffers[b].view(*bucket) for b in node_buffers] for bucket in self.buckets}
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.spans}
        self.started = len(self.buckets)
        self.overwrite, self.pending = False, dict[str, Tensor]()  # parameters whose first gradient overwrites a buffer
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
        self.params_per_bucket = [0] * len(self.buckets)
        if overlap:
            self._register_overlap_hooks()

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Memory of the partial sums and of their reduction."""
        return {"gradients": 4 * sum(b.tensor.numel() for b in self.buffers), "exchange": self.reducer.memory_bytes}

    @property
    def shared_bytes(self) -> int:
        return self.memory_bytes["gradients"] if self.reducer.uses_shared_buffers else 0

    def reset_residuals(self) -> None:
        self.reducer.reset_residuals()

    def begin_microbatch(self, i: int) -> None:
        """Direct the gradients of this rank's i-th microbatch to the buffer that the tree wants.

        Gradients are copied into a fresh buffer as they come, which reads and writes half of what adding to zeros would.
        """
        op = self.ops[i]
        self.overwrite, self.into = op.overwrite, self.views[op.buffer]
        self.pending = dict(self.into) if op.overwrite else {}
        for name, parameter in self.parameters.items():
            parameter.grad = None if op.overwrite else self.into[name]
        if i == len(self.ops) - 1:
            self.started = 0
            self.remaining = list(self.params_per_bucket)

    def accumulate(self, name: str, gradient: Tensor) -> None:
        """Add a gradient computed outside backward, between `begin_microbatch` and `end_microbatch`."""
        place = self.pending.pop(name, None)
        if place is None:
            self.into[name].add_(gradient)
        else:
            torch.add(gradient, 0.0, out=place)  # -0.0 becomes 0.0, as it does when it is added to something

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        """Move a gradient that backward has completed into a fresh buffer."""
        if self.overwrite and parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            self.accumulate(name, gradient.to_dense())

    def end_microbatch(self, i: int) -> None:
        """Merge the gradient into the tree; `reduce` merges that of the last microbatch bucket by bucket."""
        for place in self.pending.values():  # parameters that this microbatch did not use
            place.zero_()
        self.overwrite, self.pending = False, {}
        if i < len(self.ops) - 1:
            self._merge_buffers(i, 0, self.flat.layout.numel)

    def join_round(self, i: int, begin_backward: Callable[[str], None]) -> None:
        """Do nothing: a rank without a microbatch exchanges nothing before `reduce`."""

    def reduce(self) -> None:
        """Leave the sum over all microbatches of all ranks in `sums`, in the intervals `flat.reduced`."""
        while self.started < len(self.buckets):
            self._start_next_bucket()
        self.reducer.finish()

    def _merge_buffers(self, i: int, start: int, stop: int) -> None:
        for into, other in self.ops[i].merges:
            self.buffers[into].view(start, stop).add_(self.buffers[other].view(start, stop))

    def _start_next_bucket(self) -> None:
        bucket = self.buckets[self.started]
        self.started += 1
        self._merge_buffers(len(self.ops) - 1, *bucket)
        self.reducer.start(self.parts[bucket], bucket)

    def _register_overlap_hooks(self) -> None:
        """Count, for each bucket, the parameters whose gradients it waits for."""
        for name, (at, layout) in self.flat.layout.spans.items():
            touched = [b for b, (start, stop) in enumerate(self.buckets) if at < stop and at + layout.numel > start]
            for b in touched:
                self.params_per_bucket[b] += 1
            self.parameters[name].register_post_accumulate_grad_hook(lambda _, touched=touched: self._on_ready(touched))

    def _on_ready(self, touched: Sequence[int]) -> None:
        if self.started == len(self.buckets):
            return  # not the last microbatch
        for b in touched:
            self.remaining[b] -= 1
        while self.started < len(self.buckets) and self.remaining[self.started] == 0:
            self._start_next_bucket()
