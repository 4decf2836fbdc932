"""What a model is to predict, and how documents share a context."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text import corpus_of

from mpilm.data.batch import Batches
from mpilm.data.objective import MaskedObjective
from mpilm.data.samples import CorpusSamples, TextExamples, find_documents
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.kernels.base import IGNORE_INDEX

TEXT = "the (quick) brown-fox_jumps over 13 lazy dogs; thé élan naïve.\n"


def masking(fraction=0.15, whole_words=False):
    return MaskedObjective(bytes_tokenizer().with_mask(), fraction, whole_words)


def rows_of(text, length, batch=1):
    tokens = bytes_tokenizer().encode(text * (1 + batch * length // len(text)))
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(batch)]).astype(np.int64)


@pytest.mark.parametrize("length", [1, 3, 100])
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.9])
def test_masked_objective_predicts_a_fixed_part(length, fraction):
    objective = masking(fraction)
    rows = rows_of(TEXT, length, batch=4)
    inputs, targets = objective(rows, [1, 2, 3, 4])
    chosen = targets != IGNORE_INDEX
    assert inputs.shape == targets.shape == (4, length)
    assert (chosen.sum(axis=1) == objective.target_count(length)).all()
    assert objective.target_count(length) == max(1, round(fraction * length))
    assert np.array_equal(targets[chosen], rows[:, :-1][chosen])
    assert np.array_equal(inputs[~chosen], rows[:, :-1][~chosen])


def test_masked_objective_masks_most_replaces_some_leaves_some():
    objective = masking(0.5)
    rows = rows_of(TEXT, 1000, batch=20)
    inputs, targets = objective(rows, list(range(20)))
    chosen, was = targets != IGNORE_INDEX, rows[:, :-1]
    masked, same = inputs[chosen] == objective.tokenizer.mask, inputs[chosen] == was[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.016)  # 10,000 draws: 4 sigma
    assert same.mean() == pytest.approx(0.1, abs=0.012 + 1 / 258)
    assert len(np.unique(inputs[chosen][~masked & ~same])) > 200  # from all of the vocabulary


def test_masked_objective_depends_on_row_and_key_alone():
    objective, rows = masking(), rows_of(TEXT, 64, batch=3)
    inputs, targets = objective(rows, [5, 6, 7])
    alone = objective(rows[1:2], [6])
    assert np.array_equal(alone[0], inputs[1:2])
    assert np.array_equal(alone[1], targets[1:2])
    assert not np.array_equal(objective(rows, [8, 6, 7])[1][0], targets[0])


@settings(max_examples=40)
@given(fraction=st.sampled_from([0.05, 0.15, 0.4]), length=st.integers(1, 80), key=st.integers(0, 2**64 - 1))
def test_masked_objective_whole_words_are_complete_and_not_too_many(fraction, length, key):
    objective, rows = masking(fraction, whole_words=True), rows_of(TEXT, length)
    _, targets = objective(rows, [key])
    chosen, tokens = np.flatnonzero(targets[0] != IGNORE_INDEX), rows[0, :-1]
    words = np.cumsum(objective.tokenizer.word_starts(tokens))
    assert 1 <= len(chosen) <= objective.target_count(length)
    cut = [word for word in set(words[chosen]) if np.count_nonzero(words[chosen] == word) < np.count_nonzero(words == word)]
    assert not cut or set(words[chosen]) == set(cut[:1])  # one is cut if it alone is too long


# Documents in a context.


def test_find_documents_end_with_eos():
    documents, positions = find_documents(np.array([[1, 2, 256, 3, 256, 256, 4]]), 256)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    documents, positions = find_documents(np.array([[1, 2, 3], [256, 4, 5]]), 256)
    assert documents.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 1]]


def batches(packing, objective=None, seed=0):
    generator = np.random.default_rng(0)
    tokens = np.where(generator.random(2000) < 0.1, 256, generator.integers(0, 200, 2000)).astype(np.uint16)
    examples = TextExamples(CorpusSamples(corpus_of(tokens), 20, 0.2), objective, packing, eos=256)
    return Batches(examples, seed, 4, 2)


def test_text_examples_documents_packing_predicts_all_but_first_tokens():
    concat, documents = batches("concat"), batches("documents")
    for step in range(20):
        for m in range(2):
            one, other = concat.training_batch(step, m), documents.training_batch(step, m)
            assert torch.equal(one.tokens, other.tokens)
            ends = one.tokens == 256
            assert torch.equal(other.targets, torch.where(ends, IGNORE_INDEX, one.targets))
            assert other.target_tokens == int((~ends).sum())
        assert documents.target_tokens(step) == sum(documents.training_batch(step, m).target_tokens for m in range(2))
        assert concat.target_tokens(step) == 80 >= documents.target_tokens(step)
    counts = [documents.evaluation_batch(i).target_tokens for i in range(documents.eval_microbatches())]
    assert documents.eval_targets() == sum(counts)
    assert concat.eval_targets(1) == 80


def test_text_examples_masked_tokens_are_predicted_in_any_packing():
    plain, documents = (batches(packing, masking(0.3)) for packing in ("concat", "documents"))
    one, other = plain.training_batch(3, 1), documents.training_batch(3, 1)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.targets, other.targets)
    assert one.documents is None
    assert other.documents.max() > 0
    assert plain.target_tokens(0) == documents.target_tokens(0) == 4 * 6


def test_text_examples_masks_change_every_epoch_and_never_in_evaluation():
    one, other = batches("concat", masking()), batches("concat", masking(), seed=1)
    epoch = one.examples.samples.train_samples // 4 * 4
    assert torch.equal(one.evaluation_batch(1).tokens, other.evaluation_batch(1).tokens)
    assert not torch.equal(one.training_batch(0, 0).targets, one.training_batch(epoch, 0).targets)
    words = batches("concat", masking(whole_words=True))
    assert words.target_tokens(2) == sum(words.training_batch(2, m).target_tokens for m in range(2)) <= 12
