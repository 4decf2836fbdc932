"""The plan of recursive halving: which slices a rank keeps and sends in each round. Pure arithmetic.

Recursive halving and doubling (Thakur, Rabenseifner and Gropp, IJHPCA 19, 2005, section 4) over groups of neighbouring ranks.
Every group consists of a left and a right half, which differ by one rank at most. Each half has reduced all slices among its
ranks. Then a rank of one half and its counterpart in the other exchange what the other keeps. If the left half has one rank
more, the last rank of the right half serves it as well. Groups hold neighbouring ranks, so their partial sums are neighbours in
the tree; and the largest messages travel between neighbours, which often share a node.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from mpilm.ops.tree import TreeNode, plan_merges

MIN_HALVING_RANKS = 4  # fewer ranks send as many messages to all others at once


class HalvingRound(NamedTuple):
    """The part of one rank in one round: the two halves of a group exchange partial sums."""

    left: range  # ranks of the left half
    right: range
    source: int  # the rank from which this one receives partial sums of the slices in `own_slices`
    own_slices: tuple[int, ...]  # the slices that this rank goes on with: the first of those that it held
    sends: tuple[tuple[int, tuple[int, ...]], ...]  # other ranks and the slices that they receive: those behind, in order


def count_message_rounds(ranks: int) -> int:
    """Return the messages that a rank sends, one after the other, to reduce a bucket: to all others or, from MIN_HALVING_RANKS
    on, by recursive halving. Gathering takes as many."""
    return ranks - 1 if ranks < MIN_HALVING_RANKS else (ranks - 1).bit_length()


def count_bucket_copies(nodes: int) -> int:
    """Return how many buckets fill the memory of an exchange by recursive halving to which ranks contribute so many nodes:
    those that are sent, the half that is received, and the sums that are gathered."""
    return nodes + -(-nodes // 2) + 1


def plan_halving(rank: int, size: int) -> list[HalvingRound]:
    """Return the rounds of one rank in order. In the reverse order they gather the sums: a rank receives from those to which it
    has sent."""
    groups = [range(size)]
    while len(groups[-1]) > 1:
        left, right = _halve(groups[-1])
        groups.append(left if rank in left else right)

    def slices_of(member: int, level: int) -> tuple[int, ...]:
        """Return the slices that a rank of a group holds once the group has reduced them, the ones that it keeps first."""
        if level == 0:
            return (member,)
        return tuple(chain.from_iterable(slices_of(each, level - 1) for each in _exchange_partners(groups[level - 1], member)))

    rounds = []
    for level in range(len(groups) - 1, 0, -1):
        left, right = _halve(groups[level - 1])
        index = rank - (left if rank in left else right).start
        source = left[index] if rank in right else right[min(index, len(right) - 1)]
        sends = [(to, slices_of(to, level - 1)) for to in _exchange_partners(groups[level - 1], rank)[1:]]
        rounds.append(HalvingRound(left, right, source, slices_of(rank, level - 1), tuple(sends)))
    return rounds


def _halve(group: range) -> tuple[range, range]:
    middle = (len(group) + 1) // 2
    return group[:middle], group[middle:]


def _exchange_partners(group: range, member: int) -> list[int]:
    """Return a rank, and the ranks of the other half of its group to which it sends."""
    left, right = _halve(group)
    if member in left:
        return [member, *right[member - left.start :][:1]]
    index = member - right.start
    return [member, *left[index : len(left) if index == len(right) - 1 else index + 1]]


class HalvingMerger:
    """The additions of one rank in each round. `nodes`: the tree nodes that each rank contributes."""

    def __init__(self, nodes: Sequence[Sequence[TreeNode]], microbatches: int, rounds: Sequence[HalvingRound], rank: int):
        def reduce(ranks: range) -> list[TreeNode]:
            in_order = sorted(node for each in ranks for node in nodes[each])
            return [node for node, _ in plan_merges(in_order, microbatches)[1]]

        self.own_counts, self.received_counts = [len(nodes[rank])], list[int]()
        # Of each round: positions of own and of received nodes, additions, and positions of the nodes that remain.
        self.steps: list[tuple[list[int], list[int], list[tuple[int, int]], list[int]]] = []
        for each in rounds:
            own, received = (
                reduce(half) for half in ((each.left, each.right) if rank in each.left else (each.right, each.left))
            )
            in_order = sorted([*own, *received])
            merges, remaining = plan_merges(in_order, microbatches)
            places, others = ([in_order.index(node) for node in half] for half in (own, received))
            self.steps.append((places, others, merges, [position for _, position in remaining]))
            self.received_counts.append(len(received))
            self.own_counts.append(len(remaining))
