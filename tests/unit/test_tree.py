"""The summation tree: the same bits however the microbatches are assigned to ranks."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.ops.tree import (
    are_siblings,
    block_of_rank,
    leaf_slots,
    plan_accumulation,
    plan_block_accumulation,
    plan_merges,
    utilization,
)

SIZES = st.integers(1, 40).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total)))
UP_TO_32 = [(ranks, total) for total in range(1, 33) for ranks in range(1, total + 1)]


def random_gradients(total, seed=0):
    """Return numbers of very different size, so that another order of additions gives other bits."""
    random = np.random.default_rng((total, seed))
    return (random.standard_normal((total, 8)) * 10.0 ** random.integers(-4, 4, (total, 8))).astype(np.float32)


def tree_sum(leaves):
    """Add as the tree is defined: pairs from the left, a last leaf without a partner unchanged, and so on upward."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


def accumulate(ops, nodes, values):
    """Carry out the operations; return the nodes with their sums, and the number of buffers."""
    buffers = {}
    for value, op in zip(values, ops, strict=True):
        buffers[op.buffer] = value if op.overwrite else buffers[op.buffer] + value
        for into, other in op.merges:
            buffers[into] = buffers[into] + buffers[other]
    return [(node, buffers[buffer]) for buffer, node in nodes.items()], len(buffers)


def accumulate_block(leaves, start, stop, total):
    return accumulate(*plan_block_accumulation(start, stop, total), leaves[start:stop])


def sum_blocks(leaves, ranks):
    """Return the sum of blocks that are accumulated by each rank and then merged."""
    total = len(leaves)
    found = [pair for r in range(ranks) for pair in accumulate_block(leaves, *block_of_rank(r, ranks, total), total)[0]]
    nodes, values = [node for node, _ in found], [value for _, value in found]
    merges, remaining = plan_merges(nodes, total)
    assert remaining == [((0, total), 0)]
    for into, other in merges:
        values[into] = values[into] + values[other]
    return values[0]


def sum_rounds(leaves, ranks):
    """Return the sum of rounds that are merged at once and then accumulated, and the number of buffers."""
    total = len(leaves)
    nodes, values = [], []
    for at in range(0, total, ranks):
        sums = list(leaves[at : at + ranks])
        merges, remaining = plan_merges([(leaf, leaf + 1) for leaf in range(at, min(at + ranks, total))], total)
        for into, other in merges:
            sums[into] = sums[into] + sums[other]
        nodes += [node for node, _ in remaining]
        values += [sums[position] for _, position in remaining]
    ((root, value),), buffers = accumulate(*plan_accumulation(nodes, total), values)
    assert root == (0, total)
    return value, buffers


@given(SIZES, st.integers(0, 99))
def test_sum_on_any_number_of_ranks_has_the_bits_of_the_tree(sizes, seed):
    ranks, total = sizes
    leaves = random_gradients(total, seed)
    expected = tree_sum(list(leaves)).tobytes()
    assert sum_blocks(leaves, ranks).tobytes() == expected
    assert sum_rounds(leaves, ranks)[0].tobytes() == expected


def test_sum_of_eight_microbatches_has_the_bits_of_the_written_sum():
    leaves = random_gradients(8)
    a, b, c, d, e, f, g, h = leaves
    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert {sum_blocks(leaves, ranks).tobytes() for ranks in range(1, 9)} == {expected.tobytes()}
    assert expected.tobytes() != (a + b + c + d + e + f + g + h).tobytes()  # the comparison can tell orders apart


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_rounds_of_powers_of_two_need_log2_buffers(ranks, rounds):
    assert sum_rounds(random_gradients(ranks * rounds), ranks)[1] == max(1, math.log2(rounds))


@pytest.mark.parametrize(
    ("nodes", "total", "merges", "remaining"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 4)], 8, [(0, 1), (2, 3), (0, 2)], [((0, 4), 0)]),
        ([(2, 3), (3, 4), (4, 5)], 8, [(0, 1)], [((2, 4), 0), ((4, 5), 2)]),
        ([(1, 2), (2, 3)], 8, [], [((1, 2), 0), ((2, 3), 1)]),
        ([(4, 5), (5, 6), (6, 7)], 7, [(0, 1), (0, 2)], [((4, 7), 0)]),
        ([(0, 3), (3, 4)], 8, [], [((0, 3), 0), ((3, 4), 1)]),
        ([], 8, [], []),
    ],
)
def test_merges_of_adjacent_nodes_join_siblings_only(nodes, total, merges, remaining):
    assert plan_merges(nodes, total) == (merges, remaining)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 3), st.integers(0, 99))
def test_tree_of_trees_has_the_bits_of_both(microbatches, parts, level, seed):
    """Ranks with 2^level adjacent parts of each microbatch contribute nodes of one tree over (microbatch, part)."""
    each = math.gcd(parts, 2**level)
    leaves = random_gradients(microbatches * parts, seed).reshape(microbatches, parts, -1)
    expected = tree_sum([tree_sum(list(of_parts)) for of_parts in leaves])
    slots = leaf_slots(parts)
    size = slots[-1][1]
    nodes, values = [], []
    for m, at in product(range(microbatches), range(0, parts, each)):
        nodes.append((m * size + slots[at][0], m * size + slots[at + each - 1][1]))
        values.append(tree_sum(list(leaves[m, at : at + each])))
    merges, remaining = plan_merges(nodes, microbatches * size)
    for into, other in merges:
        values[into] = values[into] + values[other]
    assert [node for node, _ in remaining] == [(0, microbatches * size)]
    assert values[0].tobytes() == expected.tobytes()


def test_three_ranks_contribute_canonical_nodes():
    nodes = [list(plan_block_accumulation(*block_of_rank(r, 3, 8), 8)[1].values()) for r in range(3)]
    assert nodes == [[(0, 2), (2, 3)], [(3, 4), (4, 6)], [(6, 8)]]


def test_blocks_are_even_contiguous_and_in_order():
    for ranks, total in UP_TO_32:
        blocks = [block_of_rank(r, ranks, total) for r in range(ranks)]
        lengths = [stop - start for start, stop in blocks]
        assert [leaf for start, stop in blocks for leaf in range(start, stop)] == list(range(total))
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1
        assert utilization(ranks, total) == sum(lengths) / (ranks * lengths[0])


def test_block_accumulation_needs_few_buffers_and_nodes():
    for ranks, total in UP_TO_32:
        leaves = random_gradients(total)
        for start, stop in (block_of_rank(r, ranks, total) for r in range(ranks)):
            nodes, buffers = accumulate_block(leaves, start, stop, total)
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
def test_siblings_are_the_children_of_one_node(left, right, total, expected):
    assert are_siblings(left, right, total) is expected
