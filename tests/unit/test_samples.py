"""Several corpora in stated parts: how often each is read, that nothing is left out, and that no number is needed but one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text import corpus_of

from mpilm.config.schema import DataConfig
from mpilm.data.samples import PERIOD, CorpusSamples, Mixture, shares
from mpilm.errors import ConfigError

T = 4


def numbered(first, count):
    """A corpus of samples that say which they are: sample i is T times the token first + i."""
    return CorpusSamples(corpus_of(np.repeat(np.arange(first, first + count + 1), T)), T, 0.0)


def mixture(parts=(0.5, 0.3, 0.2), sizes=(40, 7, 150)):
    firsts = np.cumsum([0, *[size + 1 for size in sizes]])
    return Mixture([numbered(first, size) for first, size in zip(firsts.tolist(), sizes)], parts), firsts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_parts_are_met_to_the_nearest_slot_and_nobody_has_none(parts):
    sizes = np.diff([0, *shares(parts)])
    assert sizes.sum() == PERIOD
    assert (sizes >= 1).all()
    assert (np.abs(sizes - np.array(parts) / sum(parts) * PERIOD) <= len(parts)).all()


@pytest.mark.parametrize("seed", [0, 5])
def test_each_corpus_comes_as_often_as_it_should(seed):
    mixed, _ = mixture()
    which, _ = mixed.place(np.arange(2 * PERIOD), seed)
    assert np.bincount(which[:PERIOD]).tolist() == np.bincount(which[PERIOD:]).tolist() == [32768, 19661, 13107]
    few = np.bincount(which[:1000], minlength=3) / 1000
    assert few == pytest.approx([0.5, 0.3, 0.2], abs=0.07)  # 4 sigma: they are spread


def test_of_each_corpus_every_sample_comes_once_an_epoch():
    mixed, firsts = mixture()
    stream = np.arange(PERIOD)
    which, places = mixed.place(stream, 1)
    for i, size in enumerate((40, 7, 150)):
        mine = places[which == i]
        assert sorted(mine.tolist()) == list(range(len(mine)))  # no sample is left out between two others
        order = stream[which == i][np.argsort(mine)][:size]
        assert sorted(mixed.train(order, 1)[:, 0].tolist()) == list(range(firsts[i], firsts[i] + size))


def test_places_go_on_in_the_next_period():
    mixed, _ = mixture()
    which, places = mixed.place(np.arange(3 * PERIOD), 2)
    for i in range(3):
        assert sorted(places[which == i].tolist()) == list(range(np.count_nonzero(which == i)))


def test_any_sample_can_be_made_by_itself():
    mixed, _ = mixture()
    numbers = np.array([5, 70_000, 3, 200_001])
    rows = mixed.train(numbers, 3)
    assert rows.shape == (4, T + 1)
    for number, row in zip(numbers, rows):
        assert np.array_equal(mixed.train(np.array([number]), 3)[0], row)
    assert not np.array_equal(mixed.train(np.arange(50), 3), mixed.train(np.arange(50), 4))


def test_held_out_is_the_end_of_each():
    corpora = [CorpusSamples(corpus_of(np.repeat(np.arange(first, first + 51), T)), T, 0.2) for first in (0, 100)]
    mixed = Mixture(corpora, (0.9, 0.1))
    assert mixed.eval_samples == sum(corpus.eval_samples for corpus in corpora)
    firsts = mixed.held_out(np.arange(mixed.eval_samples))[:, 0].tolist()
    assert sorted(firsts) == sorted(
        int(corpus.corpus.tokens[corpus.boundary + i * T]) for corpus in corpora for i in range(corpus.eval_samples)
    )
    assert firsts != sorted(firsts)


def test_a_list_of_paths_and_parts():
    found = DataConfig(path=("a.txt", "3", "b.txt", "1")).corpora()
    assert [(data.source, part) for data, part in found] == [("a.txt", 0.75), ("b.txt", 0.25)]
    assert DataConfig(path=("a.txt",)).corpora() == [(DataConfig(path=("a.txt",)), 1.0)]
    assert DataConfig().corpora() == [(DataConfig(), 1.0)]
    assert DataConfig().source == ""


@pytest.mark.parametrize(
    "path", [("a", "b"), ("a", "1", "b"), ("a", "0", "b", "1"), ("a", "-1", "b", "1"), ("a", "inf", "b", "1")]
)
def test_parts_that_are_none(path):
    with pytest.raises(ConfigError, match=r"to mix corpora, write each path and its share: a\.txt 0\.7 b\.txt 0\.3"):
        DataConfig(path=path).corpora()


def test_one_path_where_only_one_can_be():
    with pytest.raises(ConfigError, match="only training can mix several corpora; name one"):
        assert DataConfig(path=("a", "1", "b", "1")).source
