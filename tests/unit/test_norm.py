"""The gradient norm: as exact as float64, and the same bits however the gradient is divided."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import run_ranks

import mpilm.optim.norm as norm_module
from mpilm.comm.base import SelfComm
from mpilm.optim.norm import global_norm


def noise(count, seed=0, spread=3.0):
    random = np.random.default_rng(seed)
    return torch.from_numpy((random.standard_normal(count) * 10.0 ** random.uniform(-spread, spread, count)).astype(np.float32))


def norm(x):
    return global_norm([x], SelfComm())


def exact(x):
    """Return the norm by float64 squares, which are exact, and Python's exact sum."""
    return math.sqrt(math.fsum((x.double() ** 2).tolist()))


@pytest.mark.parametrize("spread", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("count", [1, 2, 17, 1000, 200_000])
def test_norm_equals_float64_for_any_count_and_spread(count, spread):
    x = noise(count, spread=spread)
    assert norm(x) == pytest.approx(exact(x), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1.0, 1e30, 3e38 / 4])
def test_norm_equals_float64_at_any_scale(scale):
    x = (torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, 5000)) * scale).float()
    assert norm(x) == pytest.approx(exact(x), rel=1e-9)


@pytest.mark.parametrize("outlier", [1e3, 1e10, 1e30])
def test_norm_with_one_outlier_equals_float64(outlier):
    x = noise(10_000)
    x[77] = outlier
    assert norm(x) == pytest.approx(exact(x), rel=1e-9)


def test_norm_of_largest_numbers_does_not_overflow():
    x = torch.full((100_000,), torch.finfo(torch.float32).max)
    assert norm(x) == pytest.approx(exact(x), rel=1e-12)


def test_norm_of_billions_of_elements_does_not_overflow():
    x = torch.full((4096,), 1.99999)
    assert global_norm([x] * 2000, SelfComm()) == pytest.approx(exact(x) * math.sqrt(2000), rel=1e-12)
    total = 2**33 * 2 ** (norm_module.MANTISSA - 1)  # the sum of 2^33 largest squares
    assert total >> norm_module.LOW_BITS < 2**63


def test_norm_counts_small_elements_beside_a_large_one():
    """The largest is 50,000 times the others' deviation: as 8 billion elements they would weigh more than it."""
    x = noise(100_000, spread=0.0) / 50_000
    assert global_norm([x, torch.ones(1)], SelfComm()) ** 2 - 1 == pytest.approx(exact(x) ** 2, rel=1e-6)


def test_norm_of_zeros_and_of_nothing_is_zero():
    assert norm(torch.zeros(100)) == 0.0
    assert global_norm([], SelfComm()) == 0.0
    assert global_norm([torch.empty(0), torch.tensor([3.0, 4.0])], SelfComm()) == 5.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 500, 999])
def test_norm_with_a_nonfinite_element_is_not_finite_on_any_rank(bad, at):
    x = noise(1000)
    x[at] = bad
    pieces = x.split([0, 500, 300, 200])
    results = run_ranks(4, lambda comm: global_norm([pieces[comm.rank]], comm))
    assert len({str(result) for result in results}) == 1
    assert not math.isfinite(results[0])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 700), max_size=9), st.integers(1, 4), st.randoms(use_true_random=False), st.integers(0, 9))
def test_norm_has_the_same_bits_for_any_slices_ranks_and_order(ends, ranks, random, seed):
    x = noise(700, seed, spread=6.0)
    pieces = [x[a:b].clone() for a, b in itertools.pairwise([0, *sorted(ends), 700])]
    random.shuffle(pieces)
    owners = [random.randrange(ranks) for _ in pieces]

    def body(comm):
        return global_norm([piece for piece, owner in zip(pieces, owners) if owner == comm.rank], comm)

    assert run_ranks(ranks, body) == [norm(x)] * ranks


def test_norm_has_the_same_bits_for_any_order_of_elements():
    x = noise(5000, spread=6.0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(5000))
    assert norm(x) == norm(x[order]) == norm(x.flip(0))
    reordered = math.sqrt(float((x[order].double() ** 2).cumsum(0)[-1]))
    assert reordered != math.sqrt(float((x.double() ** 2).cumsum(0)[-1]))  # adding one by one can tell the orders apart


def test_norm_has_the_same_bits_for_any_chunk(monkeypatch):
    x = noise(50_000)
    expected = norm(x)
    for rows in (1, 5, 64):
        monkeypatch.setattr(norm_module, "CHUNK_ROWS", {"cpu": rows})
        assert norm(x) == expected


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 2047, 2048, 5000, 200_000])
def test_row_sum_compiled_or_not_gives_the_same_bits(count, compiled):
    x = noise(count)
    row_sum = norm_module.compile_row_sum() if compiled else norm_module._row_sum
    assert global_norm([x, x[:7]], SelfComm(), row_sum) == global_norm([x, x[:7]], SelfComm())
