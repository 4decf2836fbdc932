"""Samples, microbatches and the held-out end."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text import corpus_of

from mpilm.data.batch import Batches
from mpilm.data.corpus import unigram_loss
from mpilm.data.samples import CorpusSamples
from mpilm.data.stream import TextStream
from mpilm.errors import ConfigError, DataError


def counting(n):
    """Tokens that say where they stand, modulo 251."""
    return corpus_of((np.arange(n) % 251).astype(np.uint16))


def make(n=1000, context=8, eval_fraction=0.1, seed=0, global_batch=8, micro_batch=2):
    return Batches(TextStream(CorpusSamples(counting(n), context, eval_fraction)), seed, global_batch, micro_batch)


def starts(batches, found):
    """Where in the corpus of distinct tokens each row begins."""
    return [int(np.flatnonzero(batches.stream.samples.corpus.tokens == row[0])[0]) for row in found.tokens.numpy()]


def test_a_batch_holds_a_sample_and_what_comes_next():
    batches = make(n=240, context=8)
    batch = batches.train(3, 1)
    assert batch.tokens.shape == batch.targets.shape == (2, 8)
    assert batch.tokens.dtype == torch.int64
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert torch.equal(batch.targets[:, -1], batch.tokens[:, -1] + 1)
    assert torch.equal(batch.positions, torch.arange(8))
    assert batch.samples.tolist() == [3 * 8 + 2, 3 * 8 + 3]
    assert batch.to("cpu").tokens is batch.tokens


@settings(max_examples=50, deadline=None)
@given(n=st.integers(60, 250), context=st.integers(1, 9), eval_fraction=st.sampled_from([0.0, 0.2, 0.5]))
def test_train_and_held_out_do_not_overlap_and_nothing_is_left_out(n, context, eval_fraction):
    batches = make(n, context, eval_fraction, global_batch=1, micro_batch=1)
    rows = [starts(batches, batches.train(step, 0))[0] for step in range(batches.stream.samples.train_samples)]
    assert sorted(rows) == [i * context for i in range(batches.stream.samples.train_samples)]
    assert (
        batches.stream.samples.boundary - context - 1
        < batches.stream.samples.train_samples * context
        <= batches.stream.samples.boundary - 1
    )
    held_out = [starts(batches, batches.evaluation(i))[0] for i in range(batches.eval_microbatches())]
    assert sorted(held_out) == [batches.stream.samples.boundary + i * context for i in range(batches.eval_samples)]
    assert bool(batches.eval_samples) == bool(eval_fraction)


def test_microbatches_of_any_size_make_the_same_step():
    whole = make(global_batch=8, micro_batch=8).train(5, 0)
    for size in (1, 2, 4):
        parts = [make(global_batch=8, micro_batch=size).train(5, m) for m in range(8 // size)]
        for name in ("tokens", "targets", "samples"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_evaluation_has_a_short_last_batch_and_a_limit():
    batches = make(n=1000, context=8, eval_fraction=0.1, global_batch=8, micro_batch=5)  # 100 held out: 12 samples
    assert batches.eval_samples == 12
    assert batches.eval_microbatches(0) == 3
    assert [len(batches.evaluation(i).samples) for i in range(3)] == [5, 5, 2]
    assert make(micro_batch=4).eval_microbatches(1) == 2
    assert make(micro_batch=4).eval_microbatches(9) == 3
    assert make(seed=1).evaluation(0).tokens.equal(make(seed=2).evaluation(0).tokens)
    assert not make(seed=1).train(0, 0).tokens.equal(make(seed=2).train(0, 0).tokens)


def test_target_tokens():
    assert make(context=8, global_batch=6, micro_batch=3).target_tokens(2) == 48


@pytest.mark.parametrize(("n", "eval_fraction", "largest"), [(1000, 0.1, 99), (1000, 0.0, 999), (1000, 0.9, 99)])
def test_a_context_that_does_not_fit_names_the_largest_that_does(n, eval_fraction, largest):
    with pytest.raises(ConfigError, match=rf"--model.context-length {largest + 1}: .* largest value that works is {largest},"):
        make(n, largest + 1, eval_fraction)
    make(n, largest, eval_fraction)


def test_a_corpus_of_next_to_nothing_is_refused():
    with pytest.raises(DataError, match="too few for one sample"):
        make(n=10, context=1, eval_fraction=0.1)


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read():
    tokens = np.arange(200).astype(np.int32)
    tokens[77] = 257
    batches = Batches(TextStream(CorpusSamples(corpus_of(tokens), 10, 0.0)), 0, 1, 1)
    with pytest.raises(DataError, match=r"x\.bin: token 77 is 257, .* end at 256"):
        [batches.train(step, 0) for step in range(batches.stream.samples.train_samples)]


def test_unigram_loss_of_known_frequencies():
    even = corpus_of(np.tile(np.arange(256), 400).astype(np.uint16))
    assert unigram_loss([(even, 256 * 390)]) == pytest.approx(np.log(256), rel=1e-3)
    one = corpus_of(np.array([5] * 743 + [5, 6], dtype=np.uint16))
    assert unigram_loss([(one, 743)]) == pytest.approx(-(np.log(744 / 1000) + np.log(1 / 1000)) / 2)
