"""The fixed binary tree in whose order the M microbatch gradients of a step are added. Pure arithmetic.

Floating-point sums depend on their order, so the order must not depend on the ranks that add. Node (level k, index j) covers
the microbatches [j 2^k, min((j+1) 2^k, M)); its value is left + right, or left alone if it has no right child. A TreeNode below
is always such a range. A rank folds its contiguous block of microbatches into as few nodes as possible; the ranks then complete
the tree from all their nodes, which gives the same bits for any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

TreeNode = tuple[int, int]  # first microbatch, and the one after the last
Interval = tuple[int, int]  # elements of a flat vector: the first, and the one after the last


def block_of_rank(rank: int, ranks: int, total: int) -> TreeNode:
    """Return the contiguous range of microbatches of one rank; the first ranks get one more if the total does not divide."""
    each, remainder = divmod(total, ranks)
    start = rank * each + min(rank, remainder)
    return start, start + each + (rank < remainder)


def even_blocks(ranks: int, total: int) -> list[TreeNode]:
    """Return the blocks of all ranks (see block_of_rank)."""
    return [block_of_rank(rank, ranks, total) for rank in range(ranks)]


def balance_blocks(seconds: Sequence[float], total: int) -> list[TreeNode]:
    """Return contiguous blocks of microbatches, at least one for each rank, with which the slowest rank is done earliest.
    `seconds`: of each rank for a microbatch."""
    counts = [1] * len(seconds)
    for _ in range(total - len(seconds)):  # each to the rank that would be done with it first
        counts[min(range(len(seconds)), key=lambda rank: ((counts[rank] + 1) * seconds[rank], rank))] += 1
    stops = list(accumulate(counts))
    return list(zip([0, *stops], stops))


def are_siblings(left: TreeNode, right: TreeNode, total: int) -> bool:
    """Return whether two nodes are the two children of one node."""
    size = left[1] - left[0]
    power_of_two = size & (size - 1) == 0
    return left[1] == right[0] and power_of_two and left[0] % (2 * size) == 0 and right[1] == min(left[0] + 2 * size, total)


def leaf_slots(count: int) -> list[TreeNode]:
    """Return the node of each of `count` leaves in a complete tree, in which they are added in the same order: a tree of such
    trees has the same sums as one tree, whatever the count."""
    if count == 1:
        return [(0, 1)]
    size = 1 << (count - 1).bit_length()
    half = size // 2
    right = leaf_slots(count - half)
    scale = half // right[-1][1]  # a right child with fewer leaves takes the place of its missing siblings
    return [(leaf, leaf + 1) for leaf in range(half)] + [(half + a * scale, half + b * scale) for a, b in right]


@dataclass(frozen=True)
class AccumulateOp:
    """The accumulation of one more node."""

    buffer: int  # the buffer that receives it
    overwrite: bool  # the buffer holds nothing yet: copy instead of adding
    merges: tuple[tuple[int, int], ...]  # additions of buffers (to, from) that follow


AccumulationPlan = tuple[list[AccumulateOp], dict[int, TreeNode]]  # and the node that each buffer holds after the last one


def count_buffers(ops: Sequence[AccumulateOp]) -> int:
    """Return the number of buffers that a plan needs."""
    return 1 + max(op.buffer for op in ops)


def plan_accumulation(nodes: Sequence[TreeNode], total: int) -> AccumulationPlan:
    """Return how to accumulate adjacent nodes in order, and the node that each buffer holds in the end. A right node is added
    straight into its sibling's buffer. Buffers are numbered from 0 and reused: at most 1 + log2(len(nodes)) if the nodes have
    one size and together form a subtree."""
    stack: list[tuple[TreeNode, int]] = []
    ops: list[AccumulateOp] = []
    for node in nodes:
        into_sibling = bool(stack) and are_siblings(stack[-1][0], node, total)
        if into_sibling:
            (first, _), _ = stack.pop()
            node = (first, node[1])
        buffer = len(stack)  # a merge frees the buffer at the top, so those in use are always the first
        ops.append(AccumulateOp(buffer, not into_sibling, tuple(_push_node(stack, node, buffer, total))))
    return ops, {buffer: node for node, buffer in stack}


def plan_block_accumulation(start: int, stop: int, total: int) -> AccumulationPlan:
    """Return how a rank accumulates its block of microbatches in order."""
    return plan_accumulation([(leaf, leaf + 1) for leaf in range(start, stop)], total)


def plan_merges(nodes: Sequence[TreeNode], total: int) -> tuple[list[tuple[int, int]], list[tuple[TreeNode, int]]]:
    """Return the possible additions (to, from) of adjacent nodes, by position in `nodes`, and what remains, with positions."""
    stack: list[tuple[TreeNode, int]] = []
    return [merge for position, node in enumerate(nodes) for merge in _push_node(stack, node, position, total)], stack


def _push_node(stack: list[tuple[TreeNode, int]], node: TreeNode, place: int, total: int) -> list[tuple[int, int]]:
    """Put a node and the place of its value on the stack; merge siblings at its top and return their additions (to, from)."""
    merges: list[tuple[int, int]] = []
    while stack and are_siblings(stack[-1][0], node, total):
        (first, _), into = stack.pop()
        merges.append((into, place))
        node, place = (first, node[1]), into
    stack.append((node, place))
    return merges


def utilization(ranks: int, total: int) -> float:
    """Return the fraction of the ranks' time in use when blocks of microbatches are uneven: 1.0 if the total divides."""
    return total / (ranks * -(-total // ranks))
