"""The keyed permutation is one, depends on its key, and looks like chance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.order import key_of, permute, sample_at, sample_indices


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_every_index_is_hit_once(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [2**32 + 1, 2**40 - 3, 2**61])
def test_large_domains_stay_inside_and_do_not_collide(n):
    index = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    out = permute(index, n, 7)
    assert out.min() >= 0
    assert out.max() < n
    assert len(np.unique(out)) == 2000


@given(index=st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_an_element_does_not_depend_on_its_neighbours(index):
    assert np.array_equal(permute(np.array(index), 1000, 5), permute(np.arange(1000), 1000, 5)[index])


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_small_permutations_are_as_frequent_as_each_other(n):
    """Every element stands equally often at every place, within five standard deviations."""
    keys = 600
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key_of(key))] += 1
    assert abs(counts - keys / n).max() < 5 * np.sqrt(keys / n)


def test_neighbours_are_torn_apart():
    out = permute(np.arange(4096), 4096, 3)
    correlation = np.corrcoef(out[:-1], out[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(4096)
    assert abs(np.corrcoef(np.arange(4096), out)[0, 1]) < 5 / np.sqrt(4096)


def test_each_sample_once_an_epoch_also_across_uneven_steps():
    n, batch = 37, 8
    stream = np.concatenate([sample_indices(0, step, batch, n) for step in range(37)])
    for epoch in range(8):
        assert np.array_equal(np.sort(stream[epoch * n : (epoch + 1) * n]), np.arange(n))
    assert not np.array_equal(stream[:n], stream[n : 2 * n])


def test_order_depends_on_the_seed_and_on_nothing_else():
    assert np.array_equal(sample_indices(1, 5, 16, 100), sample_indices(1, 5, 16, 100))
    assert not np.array_equal(sample_indices(1, 5, 16, 100), sample_indices(2, 5, 16, 100))
    positions = np.arange(80, 96)
    assert np.array_equal(sample_at(positions[3:9], 1, 100), sample_indices(1, 5, 16, 100)[3:9])


def test_the_order_of_today_is_the_order_of_tomorrow():
    """A resumed run reads on where it stopped only if these numbers never change."""
    assert sample_indices(0, 0, 8, 1000).tolist() == [295, 15, 329, 781, 696, 280, 445, 220]
