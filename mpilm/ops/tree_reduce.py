"""Reduce-scatter of one bucket that adds in tree order.

Ranks exchange slices (all-to-all), and each adds what it received. Followed by an all-gather of the sums this moves
2 (p-1)/p n elements a rank, as many as a ring all-reduce.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.ops.tree import Interval, TreeNode, plan_block_accumulation, plan_merges


class Sliceable(Protocol):
    """A layout that divides buckets into one slice for each rank of a communicator."""

    def slices(self, bucket: Interval) -> list[int]:
        """Return the number of elements of each rank's slice."""

    @property
    def numel(self) -> int: ...

    @property
    def longest_slice(self) -> int: ...


class GradientEncoding:
    """The format in which gradients are sent: here float32, unchanged."""

    dtype = torch.float32

    def residual_bytes(self, numel: int) -> int:
        """Return the memory kept from step to step if so many elements are sent in each."""
        return 0

    def encode(self, key: Hashable, x: Tensor) -> Tensor:
        """Return the tensor to send for x; `key` names its place in the gradient and the message."""
        return x

    def reset_residuals(self) -> None:
        """Discard the residuals: they belong to a state that has been replaced."""


class BFloat16Encoding(GradientEncoding):
    """bfloat16 with error feedback: half the bytes. The rounding error of each message is added to the next one from the same
    place, so that none accumulates (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847)."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.residuals: dict[Hashable, Tensor] = {}

    def residual_bytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, key: Hashable, x: Tensor) -> Tensor:
        exact = x + self.residuals[key] if key in self.residuals else x.clone()
        sent = exact.to(self.dtype)
        self.residuals[key] = exact.sub_(sent).nan_to_num_(0.0, 0.0, 0.0)  # a skipped step must not spoil later ones
        return sent

    def reset_residuals(self) -> None:
        self.residuals.clear()


def make_encoding(dtype: str) -> GradientEncoding:
    """Return the encoding that parallel.wire-dtype names."""
    return BFloat16Encoding() if dtype == "bfloat16" else GradientEncoding()


class TreeMerger:
    """The additions of one exchange: which tree nodes each rank contributes, and which remain."""

    def __init__(self, nodes: Sequence[Sequence[TreeNode]], microbatches: int):
        in_order = sorted(node for contributed in nodes for node in contributed)
        position = {node: i for i, node in enumerate(in_order)}
        self.positions = [[position[node] for node in contributed] for contributed in nodes]
        self.merges, remaining = plan_merges(in_order, microbatches)
        self.remaining = [node for node, _ in remaining]  # after the additions: the root alone if the nodes cover the tree
        self._sums = [position for _, position in remaining]
        self.node_count = len(in_order)

    def merge(self, incoming: Sequence[Tensor]) -> list[Tensor]:
        """Add in tree order, in place; return the tensors of the nodes that remain."""
        for into, other in self.merges:
            incoming[into].add_(incoming[other])
        return [incoming[position] for position in self._sums]

    def merge_into(self, incoming: Sequence[Tensor], out: Tensor) -> None:
        """Do the same if the root alone remains, and write it to `out`: one of `incoming`, or disjoint from all of them."""
        for into, other in self.merges[:-1]:
            incoming[into].add_(incoming[other])
        for into, other in self.merges[-1:]:
            torch.add(incoming[into], incoming[other], out=out)
        if not self.merges:
            out.copy_(incoming[0])


class TreeOrderReduceScatter:
    """Reduce-scatters one bucket at a time: each rank receives its slice from all others at once. `nodes`: the most that ranks
    contribute to an exchange."""

    def __init__(
        self,
        comm: Comm,
        layout: Sliceable,
        nodes: Sequence[Sequence[TreeNode]],
        device: torch.device,
        encoding: GradientEncoding,
    ):
        self.comm, self.layout, self.encoding = comm, layout, encoding
        incoming = sum(map(len, nodes)) * layout.longest_slice
        self.workspace = torch.empty(incoming, dtype=self.encoding.dtype, device=device)
        self.memory_bytes = self.workspace.nbytes
        self.requests: list[Request] = []

    def plan(self, nodes: Sequence[Sequence[TreeNode]], microbatches: int) -> TreeMerger:
        """Return the additions of an exchange in which ranks contribute these nodes."""
        return TreeMerger(nodes, microbatches)

    def start(self, reduction: TreeMerger, parts: Sequence[Tensor], bucket: Interval) -> None:
        """Send the slices of this rank's nodes (`parts`) of a bucket: one all-to-all for the j-th node of all ranks."""
        comm, self.reduction = self.comm, reduction
        slices = self.layout.slices(bucket)
        own_numel, empty, offset = slices[comm.rank], self.workspace[:0], 0
        self.incoming = [empty] * reduction.node_count
        for j in range(max(map(len, reduction.positions))):
            sources = {r: positions[j] for r, positions in enumerate(reduction.positions) if len(positions) > j}
            received = self.workspace[offset : offset + own_numel * len(sources)]
            for position, part in zip(sources.values(), received.view(len(sources), own_numel)):
                self.incoming[position] = part
            offset += received.numel()
            x = self.encoding.encode((bucket, j), parts[j]) if j < len(parts) else empty
            if comm.size == 1:  # nothing travels
                self.incoming[sources[0]] = x
                continue
            sends = slices if j < len(parts) else [0] * comm.size
            receives = [own_numel if r in sources else 0 for r in range(comm.size)]
            self.requests.append(comm.iall_to_all(x, received, sends, receives))

    def finish(self) -> list[Tensor]:
        """Wait and add; return this rank's slice of each node that remains."""
        while self.requests:
            self.requests.pop(0).wait()
        return self.reduction.merge([x.float() for x in self.incoming])

    def gather(self, total: Tensor, sums: Tensor, bucket: Interval) -> Request:
        """Gather the sums of all slices, of which `total` is this rank's; they are in `sums` after the wait."""
        slices = self.layout.slices(bucket)
        sent = self.encoding.encode((bucket, "sum"), total)
        if sent.dtype == sums.dtype:
            return self.comm.iall_gather(sent, sums, slices)
        received = torch.empty_like(sums, dtype=sent.dtype)
        request = self.comm.iall_gather(sent, received, slices)

        def finish() -> None:
            request.wait()
            sums.copy_(received)

        return Request(finish)


def fold_in_tree_order(leaves: Iterable[Tensor], count: int) -> Tensor:
    """Return the sum of `count` leaves, added as soon as their siblings are there. May overwrite them."""
    ops, _ = plan_block_accumulation(0, count, count)
    buffers: dict[int, Tensor] = {}
    for op, leaf in zip(ops, leaves, strict=True):
        buffers[op.buffer] = leaf if op.overwrite else buffers[op.buffer].add_(leaf)
        for into, other in op.merges:
            buffers[into].add_(buffers.pop(other))
    return buffers[0]
