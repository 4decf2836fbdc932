"""Recursive halving: the plan by itself, and the exchange on thread ranks, with a communicator that counts messages."""

import math

import pytest
import torch
from thread_ranks import run_ranks

from mpilm.comm.instrumented import InstrumentedComm
from mpilm.ops.halving import count_message_rounds, plan_halving
from mpilm.ops.recursive_halving import RecursiveHalvingReduceScatter
from mpilm.ops.tree import block_of_rank, plan_block_accumulation
from mpilm.ops.tree_reduce import GradientEncoding, TreeOrderReduceScatter

CPU = torch.device("cpu")


class Slices:
    """A bucket of 7 elements a rank, but for the last, which has none."""

    def __init__(self, ranks):
        self.ranks, self.longest_slice, self.numel = ranks, 7, 7 * (ranks - 1)

    def slices(self, bucket):
        return [7] * (self.ranks - 1) + [0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 100, 256])
def test_plan_reduces_every_slice_once_on_its_rank(size):
    plans = [plan_halving(rank, size) for rank in range(size)]
    held = [{part: {rank} for part in range(size)} for rank in range(size)]  # the ranks whose contribution a slice has
    depth = max(map(len, plans))
    for turn in range(depth):
        rounds = {rank: plan[turn - depth + len(plan)] for rank, plan in enumerate(plans) if turn >= depth - len(plan)}
        arrived = {(to, rank): slices for rank, each in rounds.items() for to, slices in each.sends}
        assert set(arrived) == {(rank, each.source) for rank, each in rounds.items()}
        before = [dict(each) for each in held]
        for (rank, source), slices in arrived.items():
            assert slices == rounds[rank].own_slices
            held[rank] = {part: before[rank][part] | before[source][part] for part in slices}
            assert all(len(held[rank][part]) == len(before[rank][part]) + len(before[source][part]) for part in slices)
    assert held == [{rank: set(range(size))} for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 7, 64, 100, 1000, 4096, pytest.param(100_000, marks=pytest.mark.slow)])
def test_messages_of_a_rank_grow_with_the_logarithm(size):
    rounds = math.ceil(math.log2(size))
    assert count_message_rounds(size) in (rounds, size - 1)
    for rank in {0, 1, size // 2, size - 1}:
        plan = plan_halving(rank, size)
        assert len(plan) <= rounds
        assert sum(len(each.sends) for each in plan) <= (rounds if size == 2**rounds else 2 * rounds)


def leaf(number, size):
    return torch.randn(7 * (size - 1), generator=torch.Generator().manual_seed(number)) * 10.0 ** (number % 5)


def exchange(size, microbatches, halving):
    """Return on each rank the nodes that remain, the gathered sum, and the messages that it has sent."""
    plans = [plan_block_accumulation(*block_of_rank(rank, size, microbatches), microbatches) for rank in range(size)]
    nodes = [list(held.values()) for _, held in plans]

    def body(comm):
        counting = InstrumentedComm(comm)
        arguments = counting, Slices(size), nodes, CPU
        each = RecursiveHalvingReduceScatter(*arguments) if halving else TreeOrderReduceScatter(*arguments, GradientEncoding())
        buffers = {}
        for number, op in zip(range(*block_of_rank(comm.rank, size, microbatches)), plans[comm.rank][0]):
            buffers[op.buffer] = leaf(number, size) if op.overwrite else buffers[op.buffer] + leaf(number, size)
            for into, other in op.merges:
                buffers[into] = buffers[into] + buffers.pop(other)
        sums = torch.empty(7 * (size - 1))
        each.start(each.plan(nodes, microbatches), [buffers[b] for b in plans[comm.rank][1]], (0, sums.numel()))
        (total,) = each.finish()
        each.gather(total, sums, (0, sums.numel())).wait()
        return total.clone(), sums, counting.calls["send"], counting.sent_bytes["send"]

    return run_ranks(size, body)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_exchange_has_the_bits_of_the_tree(size, each):
    microbatches = each * size + (each > 1)
    expected, found = exchange(size, microbatches, halving=False), exchange(size, microbatches, halving=True)
    for (slice_a, sums_a, *_), (slice_b, sums_b, *_) in zip(expected, found):
        assert torch.equal(slice_a, slice_b)
        assert torch.equal(sums_a, sums_b)


@pytest.mark.parametrize(("size", "most"), [(16, 8), (100, 14), pytest.param(256, 16, marks=pytest.mark.slow)])
def test_counted_messages_of_a_rank(size, most):
    """For a bucket that is reduced and gathered again; all at once they would be size - 1, and as many in the gather."""
    outcomes = exchange(size, size, halving=True)
    assert max(sent for _, _, sent, _ in outcomes) == most
    if size & (size - 1) == 0:  # as many bytes as an exchange with all ranks at once
        assert max(sent_bytes for *_, sent_bytes in outcomes) <= 2 * 4 * 7 * (size - 1)
    assert all(torch.equal(outcomes[0][1], sums) for _, sums, *_ in outcomes)
