"""Samples of a corpus or a mixture, microbatches of them, and the validation split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text import corpus_of

from mpilm.config.schema import DataConfig
from mpilm.data.batch import Batches
from mpilm.data.corpus import unigram_loss
from mpilm.data.samples import MIXTURE_PERIOD, CorpusMixture, CorpusSamples, TextExamples, read_samples
from mpilm.errors import ConfigError, DataError


def counting(n):
    """Tokens that are their place, modulo 251."""
    return corpus_of((np.arange(n) % 251).astype(np.uint16))


def make(n=1000, context=8, eval_fraction=0.1, seed=0, global_batch=8, micro_batch=2):
    return Batches(TextExamples(CorpusSamples(counting(n), context, eval_fraction)), seed, global_batch, micro_batch)


def first_row_start(batches, batch):
    """Where in the corpus of distinct tokens the first row begins."""
    return int(np.flatnonzero(batches.examples.samples.corpus.tokens == batch.tokens.numpy()[0, 0])[0])


# Batches.


def test_training_batch_holds_samples_and_their_next_tokens():
    batch = make(n=240, context=8).training_batch(3, 1)
    assert batch.tokens.shape == batch.targets.shape == (2, 8)
    assert batch.tokens.dtype == torch.int64
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert torch.equal(batch.targets[:, -1], batch.tokens[:, -1] + 1)
    assert torch.equal(batch.positions, torch.arange(8))
    assert batch.samples.tolist() == [3 * 8 + 2, 3 * 8 + 3]
    assert batch.target_tokens == 16
    assert batch.to("cpu").tokens is batch.tokens


@settings(max_examples=50)
@given(n=st.integers(60, 250), context=st.integers(1, 9), eval_fraction=st.sampled_from([0.0, 0.2, 0.5]))
def test_batches_splits_do_not_overlap_and_leave_nothing_out(n, context, eval_fraction):
    batches = make(n, context, eval_fraction, global_batch=1, micro_batch=1)
    samples = batches.examples.samples
    rows = [first_row_start(batches, batches.training_batch(step, 0)) for step in range(samples.train_samples)]
    assert sorted(rows) == [i * context for i in range(samples.train_samples)]
    assert samples.boundary - context - 1 < samples.train_samples * context <= samples.boundary - 1
    held_out = [first_row_start(batches, batches.evaluation_batch(i)) for i in range(batches.eval_microbatches())]
    assert sorted(held_out) == [samples.boundary + i * context for i in range(batches.eval_samples)]
    assert bool(batches.eval_samples) == bool(eval_fraction)


def test_training_batch_of_any_size_makes_the_same_step():
    whole = make(global_batch=8, micro_batch=8).training_batch(5, 0)
    for size in (1, 2, 4):
        parts = [make(global_batch=8, micro_batch=size).training_batch(5, m) for m in range(8 // size)]
        for name in ("tokens", "targets", "samples"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_evaluation_batch_last_is_short_and_limit_counts_whole_microbatches():
    batches = make(n=1000, context=8, eval_fraction=0.1, global_batch=8, micro_batch=5)  # 100 held out: 12 samples
    assert batches.eval_samples == 12
    assert batches.eval_microbatches(0) == 3
    assert [len(batches.evaluation_batch(i).samples) for i in range(3)] == [5, 5, 2]
    assert [make(micro_batch=4).eval_microbatches(limit) for limit in (1, 9)] == [2, 3]
    assert [make(micro_batch=5).eval_targets(limit) for limit in (0, 1)] == [12 * 8, 10 * 8]


def test_batches_seed_changes_training_and_not_evaluation():
    assert make(seed=1).evaluation_batch(0).tokens.equal(make(seed=2).evaluation_batch(0).tokens)
    assert not make(seed=1).training_batch(0, 0).tokens.equal(make(seed=2).training_batch(0, 0).tokens)


def test_batches_count_tokens_of_a_step():
    batches = make(context=8, global_batch=6, micro_batch=3)
    assert batches.target_tokens(2) == batches.step_tokens == 48


# One corpus.


@pytest.mark.parametrize(("n", "eval_fraction", "largest"), [(1000, 0.1, 99), (1000, 0.0, 999), (1000, 0.9, 99)])
def test_corpus_samples_long_context_raises_with_largest_value(n, eval_fraction, largest):
    with pytest.raises(ConfigError, match=rf"--model.context-length {largest + 1}: .* largest value that works is {largest},"):
        make(n, largest + 1, eval_fraction)
    make(n, largest, eval_fraction)


def test_corpus_samples_tiny_corpus_raises():
    with pytest.raises(DataError, match="too few for one sample"):
        make(n=10, context=1, eval_fraction=0.1)


@pytest.mark.parametrize(("token", "message"), [(257, "token 77 is 257, .* end at 256"), (-5, "token 77 is -5")])
def test_corpus_read_unknown_token_raises_with_place(token, message):
    tokens = np.arange(200).astype(np.int32)
    tokens[77] = token
    batches = Batches(TextExamples(CorpusSamples(corpus_of(tokens), 10, 0.0)), 0, 1, 1)
    with pytest.raises(DataError, match=rf"x\.bin: {message}"):
        [batches.training_batch(step, 0) for step in range(batches.examples.samples.train_samples)]


def test_unigram_loss_of_known_frequencies():
    even = corpus_of(np.tile(np.arange(256), 400).astype(np.uint16))
    assert unigram_loss([(even, 256 * 390)]) == pytest.approx(np.log(256), rel=1e-3)
    one = corpus_of(np.array([5] * 743 + [5, 6], dtype=np.uint16))
    assert unigram_loss([(one, 743)]) == pytest.approx(-(np.log(744 / 1000) + np.log(1 / 1000)) / 2)


# Mixtures.

T = 4


def numbered(first, count, eval_fraction=0.0):
    """A corpus of samples that tell which they are: sample i is T times the token first + i."""
    return CorpusSamples(corpus_of(np.repeat(np.arange(first, first + count + 1), T)), T, eval_fraction)


def mixture(parts=(0.5, 0.3, 0.2), sizes=(40, 7, 150)):
    firsts = np.cumsum([0, *[size + 1 for size in sizes]])
    return CorpusMixture([numbered(first, size) for first, size in zip(firsts.tolist(), sizes)], parts), firsts


@settings(max_examples=200)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_mixture_slots_are_nearest_to_the_parts_and_never_none(parts):
    sizes = np.diff([0, *CorpusMixture([numbered(0, 1)] * len(parts), parts).slot_ends])
    assert sizes.sum() == MIXTURE_PERIOD
    assert (sizes >= 1).all()
    assert (np.abs(sizes - np.array(parts) / sum(parts) * MIXTURE_PERIOD) <= len(parts)).all()


@pytest.mark.parametrize("seed", [0, 5])
def test_mixture_takes_each_corpus_as_often_as_its_part(seed):
    which, _ = mixture()[0].choose(np.arange(2 * MIXTURE_PERIOD), seed)
    counts = [np.bincount(half).tolist() for half in np.split(which, 2)]
    assert counts == [[32768, 19661, 13107]] * 2
    assert np.bincount(which[:1000], minlength=3) / 1000 == pytest.approx([0.5, 0.3, 0.2], abs=0.07)  # spread: 4 sigma


def test_mixture_takes_each_sample_once_an_epoch_across_periods():
    mixed, firsts = mixture()
    stream = np.arange(3 * MIXTURE_PERIOD)
    which, places = mixed.choose(stream, 1)
    for i, size in enumerate((40, 7, 150)):
        mine = places[which == i]
        assert sorted(mine.tolist()) == list(range(len(mine)))  # no sample is left out between two others
        order = stream[which == i][np.argsort(mine)][:size]
        assert sorted(read_samples(mixed, order, 1)[:, 0].tolist()) == list(range(firsts[i], firsts[i] + size))


def test_mixture_sample_depends_on_its_number_and_seed_alone():
    mixed, _ = mixture()
    numbers = np.array([5, 70_000, 3, 200_001])
    rows = read_samples(mixed, numbers, 3)
    assert rows.shape == (4, T + 1)
    for number, row in zip(numbers, rows):
        assert np.array_equal(read_samples(mixed, np.array([number]), 3)[0], row)
    assert not np.array_equal(read_samples(mixed, np.arange(50), 3), read_samples(mixed, np.arange(50), 4))


def test_mixture_validation_split_is_that_of_each_corpus():
    corpora = [numbered(first, 50, 0.2) for first in (0, 100)]
    mixed = CorpusMixture(corpora, (0.9, 0.1))
    assert mixed.eval_samples == sum(corpus.eval_samples for corpus in corpora)
    firsts = read_samples(mixed, np.arange(mixed.eval_samples), None)[:, 0].tolist()
    assert sorted(firsts) == sorted(
        int(corpus.corpus.tokens[corpus.boundary + i * T]) for corpus in corpora for i in range(corpus.eval_samples)
    )
    assert firsts != sorted(firsts)


def test_data_corpora_reads_paths_and_parts():
    found = DataConfig(path=("a.txt", "3", "b.txt", "1")).corpora()
    assert [(data.source, part) for data, part in found] == [("a.txt", 0.75), ("b.txt", 0.25)]
    assert DataConfig(path=("a.txt",)).corpora() == [(DataConfig(path=("a.txt",)), 1.0)]
    assert DataConfig().corpora() == [(DataConfig(), 1.0)]
    assert DataConfig().source == ""


@pytest.mark.parametrize(
    "path", [("a", "b"), ("a", "1", "b"), ("a", "0", "b", "1"), ("a", "-1", "b", "1"), ("a", "inf", "b", "1")]
)
def test_data_corpora_wrong_parts_raise(path):
    with pytest.raises(ConfigError, match=r"to mix corpora, write each path and its share: a\.txt 0\.7 b\.txt 0\.3"):
        DataConfig(path=path).corpora()


def test_data_source_of_several_paths_raises():
    with pytest.raises(ConfigError, match="only training can mix several corpora; name one"):
        assert DataConfig(path=("a", "1", "b", "1")).source
