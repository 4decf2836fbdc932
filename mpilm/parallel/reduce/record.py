"""A record of what goes into a sum of gradients, so that it can be added once more elsewhere."""

import torch
from torch import Tensor

from mpilm.ops.tree import Interval, TreeNode, plan_accumulation
from mpilm.parallel.flat import FlatVector
from mpilm.parallel.flat_layout import intersect_intervals

Nodes = dict[TreeNode, Tensor]


class GradientRecord:
    """The part of this rank in the sum of one `interval` of a flat vector: the leaves of the gradient tree that it has
    computed, and the nodes into which it has added them before other ranks receive them."""

    def __init__(self, interval: Interval):
        self.interval = interval
        self.leaves, self.nodes = Nodes(), Nodes()
        self.sum = torch.zeros(interval[1] - interval[0])  # over all ranks, as far as this rank has it

    def note_leaf(self, node: TreeNode, start: int = 0, x: Tensor | None = None) -> None:
        """Note the elements of a leaf from `start` of the flat vector on; without `x`, that there is such a leaf. Elements that
        are not noted are 0."""
        self._note(self.leaves, node, start, torch.empty(0) if x is None else x)

    def note_node(self, node: TreeNode, start: int, x: Tensor) -> None:
        """Note elements of a node that this rank contributes."""
        self._note(self.nodes, node, start, x)

    def note_sum(self, sums: FlatVector) -> None:
        """Note the sum over all ranks, as far as this rank has it."""
        for start, stop in intersect_intervals(sums.intervals, [self.interval]):
            self.cut(self.sum, start, stop).copy_(sums.view(start, stop))

    def cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flat vector from `x`, which has those of the interval."""
        return x[start - self.interval[0] : stop - self.interval[0]]

    def _note(self, nodes: Nodes, node: TreeNode, start: int, x: Tensor) -> None:
        first, last = self.interval
        row = nodes.setdefault(node, torch.zeros(last - first))
        begin, end = max(start, first), min(start + x.numel(), last)
        if begin < end:
            # -0 becomes 0, as it does where the first gradient is stored: a sum is never -0.
            torch.add(x.flatten()[begin - start : end - start], 0.0, out=row[begin - first : end - first])


def add_nodes(nodes: Nodes, total: int) -> Tensor:
    """Return the sum of nodes that together form one node, in the order of a tree with `total` leaves."""
    in_order = sorted(nodes)
    ops, _ = plan_accumulation(in_order, total)
    buffers = dict[int, Tensor]()
    for op, node in zip(ops, in_order):
        buffers[op.buffer] = nodes[node].clone() if op.overwrite else buffers[op.buffer] + nodes[node]
        for into, other in op.merges:
            buffers[into] = buffers[into] + buffers[other]
    return buffers[0]
