"""The fixed binary tree in whose order the M microbatch gradients of a step are added: pure arithmetic.

Floating-point sums depend on their order, so the order must not depend on who adds. Node (level k, index j) of the tree
covers the microbatches [j 2^k, min((j+1) 2^k, M)); its value is left + right, or left alone where there is no right. A
range below is always such a node. A rank folds its contiguous block into as few nodes as there are; the tree is then
finished from the nodes of all ranks, which gives the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]  # first microbatch, and the one after the last


def block(rank: int, ranks: int, total: int) -> Range:
    """The microbatches of one rank: contiguous, in rank order, the first ranks one more where they do not divide."""
    each, more = divmod(total, ranks)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def dealt(rank: int, ranks: int, total: int) -> range:
    """The microbatches of one rank where they are dealt like cards: each round of them is summed at once."""
    return range(rank, total, ranks)


def siblings(left: Range, right: Range, total: int) -> bool:
    """Whether two nodes are the two children of one node."""
    size = left[1] - left[0]
    power_of_two = size & (size - 1) == 0
    return left[1] == right[0] and power_of_two and left[0] % (2 * size) == 0 and right[1] == min(left[0] + 2 * size, total)


@dataclass(frozen=True)
class Fold:
    """What to do with the gradient of one microbatch: put or add it into a buffer, then add buffers (to, from)."""

    buffer: int
    fresh: bool
    adds: tuple[tuple[int, int], ...]


def fold(nodes: Sequence[Range], total: int) -> tuple[list[Fold], dict[int, Range]]:
    """How adjacent nodes are folded as they come, and which node each buffer holds in the end.

    A right node is added straight into its sibling's buffer. Buffers are numbered from 0 and used again once free:
    1 + log2(len(nodes)) at most where the nodes are of one size and together a subtree.
    """
    stack: list[tuple[Range, int]] = []
    folds: list[Fold] = []
    for node in nodes:
        here = node
        into_sibling = bool(stack) and siblings(stack[-1][0], here, total)
        if into_sibling:
            (first, _), own = stack.pop()
            here = (first, here[1])
        else:
            used = {buffer for _, buffer in stack}
            own = next(b for b in range(len(stack) + 1) if b not in used)
        buffer, adds = own, []
        while stack and siblings(stack[-1][0], here, total):
            (first, _), into = stack.pop()
            adds.append((into, own))
            here, own = (first, here[1]), into
        stack.append((here, own))
        folds.append(Fold(buffer, not into_sibling, tuple(adds)))
    return folds, {buffer: node for node, buffer in stack}


def fold_block(start: int, stop: int, total: int) -> tuple[list[Fold], dict[int, Range]]:
    """How a rank folds its block of microbatches as they come."""
    return fold([(leaf, leaf + 1) for leaf in range(start, stop)], total)


def combine(nodes: Sequence[Range], total: int) -> tuple[list[tuple[int, int]], list[tuple[Range, int]]]:
    """The additions (to, from), as positions in `nodes`, that can be made among adjacent nodes, and what then remains:
    each node with its position."""
    stack: list[tuple[Range, int]] = []
    adds: list[tuple[int, int]] = []
    for position, node in enumerate(nodes):
        here, own = node, position
        while stack and siblings(stack[-1][0], here, total):
            (first, _), into = stack.pop()
            adds.append((into, own))
            here, own = (first, here[1]), into
        stack.append((here, own))
    return adds, stack


def finish(nodes: Sequence[Range], total: int) -> list[tuple[int, int]]:
    """The additions (to, from), as positions in `nodes`, that leave the root of the tree at position 0.

    `nodes` are adjacent nodes in order that cover [0, total).
    """
    adds, remaining = combine(nodes, total)
    if [node for node, _ in remaining] != [(0, total)]:
        raise ValueError(f"nodes {list(nodes)} do not cover 0..{total} as subtrees")
    return adds


def buffers_of(ranks: int, total: int) -> int:
    """The most gradient buffers any rank needs."""
    return max(1 + max(f.buffer for f in fold_block(*block(r, ranks, total), total)[0]) for r in range(ranks))


def balance(ranks: int, total: int) -> float:
    """The part of the ranks' time that is used when the blocks are uneven: 1.0 where they divide."""
    return total / (ranks * -(-total // ranks))
