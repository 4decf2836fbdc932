"""The tree of additions: the same bits however the microbatches are dealt to ranks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.ops.tree import (
    are_siblings,
    block_of_rank,
    plan_accumulation,
    plan_block_accumulation,
    plan_merges,
    strided_assignment,
    utilization,
)

SIZES = st.integers(1, 40).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total)))
TOTALS = range(1, 33)


def gradients(total, seed=0):
    """Numbers of very different size, so that another order of additions gives other bits."""
    random = np.random.default_rng((total, seed))
    return (random.standard_normal((total, 8)) * 10.0 ** random.integers(-4, 4, (total, 8))).astype(np.float32)


def tree(leaves):
    """The definition: pairs from the left, a last one without a partner as it is, and so on upward."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


def carried_out(folds, nodes, values):
    """What a rank does with values as they come; the nodes in order with what has become of them, and its buffers."""
    buffers = {}
    for value, step in zip(values, folds, strict=True):
        buffers[step.buffer] = value if step.overwrite else buffers[step.buffer] + value
        for into, other in step.merges:
            buffers[into] = buffers[into] + buffers[other]
    return [(node, buffers[buffer]) for buffer, node in nodes.items()], len(buffers)


def folded(leaves, start, stop, total):
    return carried_out(*plan_block_accumulation(start, stop, total), leaves[start:stop])


def shared(leaves, ranks):
    total = len(leaves)
    found = [pair for r in range(ranks) for pair in folded(leaves, *block_of_rank(r, ranks, total), total)[0]]
    nodes, values = [node for node, _ in found], [value for _, value in found]
    merges, remaining = plan_merges(nodes, total)
    assert remaining == [((0, total), 0)]
    for into, other in merges:
        values[into] = values[into] + values[other]
    return values[0]


@settings(deadline=None)
@given(SIZES, st.integers(0, 99))
def test_any_number_of_ranks_gives_the_bits_of_the_tree(sizes, seed):
    ranks, total = sizes
    leaves = gradients(total, seed)
    assert shared(leaves, ranks).tobytes() == tree(list(leaves)).tobytes()


def in_rounds(leaves, ranks):
    """Microbatches dealt like cards: each round is combined as far as it can be, and what remains is folded. The root's value,
    and the number of buffers."""
    total = len(leaves)
    nodes, values = [], []
    for at in range(0, total, ranks):
        here = [(leaf, leaf + 1) for leaf in range(at, min(at + ranks, total))]
        sums = list(leaves[at : at + ranks])
        adds, remaining = plan_merges(here, total)
        for into, other in adds:
            sums[into] = sums[into] + sums[other]
        nodes += [node for node, _ in remaining]
        values += [sums[position] for _, position in remaining]
    found, buffers = carried_out(*plan_accumulation(nodes, total), values)
    ((root, value),) = found
    assert root == (0, total)
    return value, buffers


@settings(deadline=None)
@given(SIZES, st.integers(0, 99))
def test_rounds_of_microbatches_give_the_bits_of_the_tree(sizes, seed):
    ranks, total = sizes
    leaves = gradients(total, seed)
    assert in_rounds(leaves, ranks)[0].tobytes() == tree(list(leaves)).tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_rounds_of_powers_of_two_need_few_buffers(ranks, rounds):
    assert in_rounds(gradients(ranks * rounds), ranks)[1] == max(1, math.log2(rounds))


@pytest.mark.parametrize("total", TOTALS)
def test_dealt_microbatches_are_a_round_robin(total):
    for ranks in range(1, total + 1):
        hands = [strided_assignment(rank, ranks, total) for rank in range(ranks)]
        assert sorted(m for hand in hands for m in hand) == list(range(total))
        rounds = [[hand[i] for hand in hands if i < len(hand)] for i in range(len(hands[0]))]
        assert [m for each in rounds for m in each] == list(range(total))  # every round in rank order
        assert all(len(each) == ranks for each in rounds[:-1])


@pytest.mark.parametrize(
    ("nodes", "total", "adds", "remaining"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 4)], 8, [(0, 1), (2, 3), (0, 2)], [((0, 4), 0)]),
        ([(2, 3), (3, 4), (4, 5)], 8, [(0, 1)], [((2, 4), 0), ((4, 5), 2)]),
        ([(1, 2), (2, 3)], 8, [], [((1, 2), 0), ((2, 3), 1)]),
        ([(4, 5), (5, 6), (6, 7)], 7, [(0, 1), (0, 2)], [((4, 7), 0)]),
        ([(0, 3), (3, 4)], 8, [], [((0, 3), 0), ((3, 4), 1)]),
        ([], 8, [], []),
    ],
)
def test_adjacent_nodes_are_combined_as_far_as_they_are_siblings(nodes, total, adds, remaining):
    assert plan_merges(nodes, total) == (adds, remaining)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8])
def test_eight_microbatches(ranks):
    leaves = gradients(8)
    a, b, c, d, e, f, g, h = leaves
    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert shared(leaves, ranks).tobytes() == expected.tobytes()
    assert expected.tobytes() != (a + b + c + d + e + f + g + h).tobytes()  # the comparison above can tell orders apart


def test_three_ranks_send_canonical_partial_sums():
    nodes = [list(plan_block_accumulation(*block_of_rank(r, 3, 8), 8)[1].values()) for r in range(3)]
    assert nodes == [[(0, 2), (2, 3)], [(3, 4), (4, 6)], [(6, 8)]]


@pytest.mark.parametrize("total", TOTALS)
def test_blocks_are_even_contiguous_and_in_order(total):
    for ranks in range(1, total + 1):
        blocks = [block_of_rank(r, ranks, total) for r in range(ranks)]
        lengths = [stop - start for start, stop in blocks]
        assert [leaf for start, stop in blocks for leaf in range(start, stop)] == list(range(total))
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1
        assert utilization(ranks, total) == sum(lengths) / (ranks * lengths[0])


@pytest.mark.parametrize("total", TOTALS)
def test_few_buffers_and_few_nodes(total):
    leaves = gradients(total)
    for ranks in range(1, total + 1):
        for start, stop in (block_of_rank(r, ranks, total) for r in range(ranks)):
            nodes, buffers = folded(leaves, start, stop, total)
            assert len(nodes) <= max(1, 2 * math.log2(total))
            if len(nodes) == 1:  # the block is a subtree
                assert buffers <= 1 + math.ceil(math.log2(stop - start))
            for (first, last), _ in nodes:  # each is a node of the tree: aligned, and a power of two or up to the end
                size = 2 ** math.ceil(math.log2(last - first))
                assert first % size == 0
                assert last == min(first + size, total)


@pytest.mark.parametrize(
    ("left", "right", "total", "expected"),
    [
        ((0, 1), (1, 2), 8, True),
        ((1, 2), (2, 3), 8, False),  # adjacent, but of two parents
        ((0, 2), (2, 4), 8, True),
        ((0, 2), (2, 3), 8, False),  # half a sibling
        ((0, 2), (2, 3), 3, True),  # the last one has no partner
        ((4, 6), (6, 7), 7, True),
        ((2, 4), (4, 6), 8, False),
        ((0, 4), (4, 6), 6, True),
    ],
)
def test_siblings(left, right, total, expected):
    assert are_siblings(left, right, total) is expected
