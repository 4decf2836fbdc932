"""The keyed permutation is one, depends on its key, and looks like chance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.order import mix_key, permute, pick_samples


@settings(max_examples=60)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_hits_every_index_once(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [2**32 + 1, 2**40 - 3, 2**61])
def test_permute_large_domain_stays_inside_without_collisions(n):
    index = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    out = permute(index, n, 7)
    assert out.min() >= 0
    assert out.max() < n
    assert len(np.unique(out)) == 2000


@given(index=st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_permute_element_does_not_depend_on_its_neighbours(index):
    assert np.array_equal(permute(np.array(index), 1000, 5), permute(np.arange(1000), 1000, 5)[index])


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_permute_small_domain_is_uniform_over_keys(n):
    """Every element stands equally often at every place, within five standard deviations."""
    keys = 600
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, mix_key(key))] += 1
    assert abs(counts - keys / n).max() < 5 * np.sqrt(keys / n)


def test_permute_neighbours_are_uncorrelated():
    out = permute(np.arange(4096), 4096, 3)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 5 / np.sqrt(4096)
    assert abs(np.corrcoef(np.arange(4096), out)[0, 1]) < 5 / np.sqrt(4096)


def test_pick_samples_takes_each_sample_once_an_epoch_in_another_order():
    n, batch = 37, 8
    stream = np.concatenate([pick_samples(np.arange(step * batch, (step + 1) * batch), 0, n) for step in range(37)])
    for epoch in range(8):
        assert np.array_equal(np.sort(stream[epoch * n : (epoch + 1) * n]), np.arange(n))
    assert not np.array_equal(stream[:n], stream[n : 2 * n])


def test_pick_samples_depends_on_position_and_seed_alone():
    positions = np.arange(80, 96)
    assert np.array_equal(pick_samples(positions[3:9], 1, 100), pick_samples(positions, 1, 100)[3:9])
    assert not np.array_equal(pick_samples(positions, 1, 100), pick_samples(positions, 2, 100))


def test_pick_samples_never_changes():
    """A resumed run reads on where it stopped only if these numbers stay."""
    assert pick_samples(np.arange(8), 0, 1000).tolist() == [295, 15, 329, 781, 696, 280, 445, 220]
    assert pick_samples(np.arange(8), None, 1000).tolist() == permute(np.arange(8), 1000, mix_key(0x6576616C)).tolist()
