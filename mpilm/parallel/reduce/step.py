"""Gradient reduction once a step, over the microbatches and the ranks of the reduce axes (ZeRO 0 and 1).

Reproducible: additions follow the fixed tree of ops/tree.py. Each rank accumulates its contiguous block of microbatches; the
ranks complete the tree from all their nodes. Otherwise the MPI library's all-reduce adds in an order of its own.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.ops.tree import AccumulateOp, block_of_rank, plan_block_accumulation
from mpilm.ops.tree_reduce import make_encoding
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.pipeline.stage import GradientReducer
from mpilm.parallel.reduce.messages import (
    BUCKETS_IN_FLIGHT,
    AllReduceBucketReducer,
    CrossRankReducer,
    MessageReducer,
    tree_message_reducer,
)
from mpilm.parallel.reduce.powersgd import PowerSGDReducer
from mpilm.parallel.reduce.shared_memory import SharedMemoryReducer, detect_topology

ReducerFactory = Callable[[FlatVector], CrossRankReducer]


class StepReducer(GradientReducer):
    """Collects the gradients of this rank's block of microbatches and reduces them once .

    `overlap`: start a bucket as soon as the last backward has completed it. `shared`: reduce in shared memory where a node has
    some. `custom`: makes another reducer for the sum of this rank's block, as a single tensor. Collective over `comm`, the
    reduce axes.
    """

    def __init__(
        self,
        flat: FlatParameters,
        model: nn.Module,
        comm: Comm,
        microbatches: int,
        reproducible: bool = True,
        overlap: bool = False,
        shared: bool = True,
        wire_dtype: str = "float32",
        custom: ReducerFactory | None = None,
    ):
        self.flat, self.overlap, self.encoding = flat, overlap, make_encoding(wire_dtype)
        start, stop = block_of_rank(comm.rank, comm.size, microbatches)
        self.microbatch_ids = range(start, stop)
        self.ops = [AccumulateOp(0, i == 0, ()) for i in range(stop - start)]
        self.node_buffers = [0]  # the buffers that hold a tree node after the last microbatch
        if custom is not None:
            self.ops, _ = plan_block_accumulation(0, stop - start, stop - start)
        elif reproducible:
            self.ops, nodes = plan_block_accumulation(start, stop, microbatches)
            self.node_buffers = list(nodes)
        self.buffer_count = 1 + max(op.buffer for op in self.ops)
        self.buckets = flat.layout.buckets
        may_share = shared and reproducible and custom is None and comm.size > 1 and flat.device.type == "cpu"
        reducer: CrossRankReducer | None = self._make_shared_reducer(comm, microbatches) if may_share else None
        self.is_shared = reducer is not None
        if reducer is None:
            self.buffers = [FlatVector.zeros([(0, flat.layout.numel)], flat.device) for _ in range(self.buffer_count)]
            if custom is not None:
                reducer = custom(self.buffers[0])
            elif comm.size > 1:
                reducer = self._make_message_reducer(comm, microbatches, reproducible)
            else:
                reducer = CrossRankReducer()
        self.reducer: CrossRankReducer = reducer
        self.views = [{name: flat.parameter(name, buffer) for name in flat.layout.spans} for buffer in self.buffers]
        self.sums = self.buffers[0]
        self.parts = {bucket: [self.buffers[b].view(*bucket) for b in self.node_buffers] for bucket in self.buckets}
        self.parameters = {name: model.get_parameter(name) for name in flat.layout.spans}
        self.started = len(self.buckets)
        self.overwrite, self.pending = False, dict[str, Tensor]()  # parameters whose first gradient overwrites a buffer
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
        self._register_overlap_hooks()

    def _make_shared_reducer(self, comm: Comm, microbatches: int) -> SharedMemoryReducer | None:
        """Allocate the buffers in shared memory; return None if a node has none. Collective."""
        topology, numel = detect_topology(comm), self.flat.layout.numel
        if topology is None:
            return None
        blocks = [plan_block_accumulation(*block_of_rank(r, comm.size, microbatches), microbatches) for r in range(comm.size)]
        counts = [1 + max(op.buffer for op in ops) for ops, _ in blocks]
        parts = topology.intra_node.allocate_shared(self.buffer_count * numel)
        if not all(comm.all_gather_json(parts is not None)) or parts is None:
            return None
        local_counts = [counts[rank] for rank in topology.ranks(topology.inter_node.rank)]
        buffers = [[part[i * numel : (i + 1) * numel] for i in range(count)] for part, count in zip(parts, local_counts)]
        self.buffers = [FlatVector([(0, numel)], buffer) for buffer in buffers[topology.intra_node.rank]]
        nodes_held = [nodes for _, nodes in blocks]
        return SharedMemoryReducer(
            topology, self.flat.layout, buffers, nodes_held, microbatches, self.flat.zero == 0, self.encoding
        )

    def _make_message_reducer(self, comm: Comm, microbatches: int, reproducible: bool) -> MessageReducer:
        depth = len(self.buckets) if self.overlap else min(BUCKETS_IN_FLIGHT, len(self.buckets))
        if not reproducible:
            return MessageReducer([AllReduceBucketReducer(comm) for _ in range(depth)])
        blocks = [block_of_rank(r, comm.size, microbatches) for r in range(comm.size)]
        nodes = [list(plan_block_accumulation(*block, microbatches)[1].values()) for block in blocks]
        return tree_message_reducer(
            comm, self.flat.layout, nodes, microbatches, self.flat.device, self.flat.zero == 0, depth, self.encoding
        )

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Memory of the partial sums and of their reduction."""
        exchange = self.reducer.memory_bytes + self.encoding.residual_bytes(self._sent_numel())
        return {"gradients": 4 * sum(b.tensor.numel() for b in self.buffers), "exchange": exchange}

    @property
    def shared_bytes(self) -> int:
        """Bytes of gradients in memory that other ranks of the node map too."""
        return self.memory_bytes["gradients"] if self.is_shared else 0

    def _sent_numel(self) -> int:
        """Return the elements that this rank sends in a step."""
        if isinstance(self.reducer, SharedMemoryReducer):
            return self.reducer.sent_numel
        return len(self.node_buffers) * self.flat.layout.numel if isinstance(self.reducer, MessageReducer) else 0

    def reset_residuals(self) -> None:
        self.encoding.reset_residuals()
        if isinstance(self.reducer, PowerSGDReducer):
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
        self.params_per_bucket = [0] * len(self.buckets)
        self.remaining = list(self.params_per_bucket)
        for name, (at, layout) in self.flat.layout.spans.items() if self.overlap else ():
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
