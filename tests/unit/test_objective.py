"""What is to be predicted, and how documents share a context."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text import corpus_of

from mpilm.data.batch import Batches
from mpilm.data.objective import Masked
from mpilm.data.samples import CorpusSamples
from mpilm.data.stream import TextStream, documents_of
from mpilm.data.tokenizer import bytes_tokenizer, train_bpe
from mpilm.model.loss import IGNORE_INDEX

WORDS = "the (quick) brown-fox_jumps over 13 lazy dogs; thé élan naïve.\n"


def masking(tokenizer=None, fraction=0.15, whole=False):
    return Masked((tokenizer or bytes_tokenizer()).with_mask(), fraction, whole)


def rows_of(text, length, batch=1):
    tokens = bytes_tokenizer().encode(text * (1 + batch * length // len(text)))
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(batch)]).astype(np.int64)


def test_a_mask_token_is_added_once_and_after_all_others():
    plain = bytes_tokenizer()
    masked = plain.with_mask()
    assert plain.mask is None
    assert masked.mask == plain.vocab_size == masked.vocab_size - 1
    assert masked.with_mask() is masked
    assert masked.decode([65, masked.mask]) == "A[MASK]"
    assert np.array_equal(masked.encode(WORDS), plain.encode(WORDS))
    assert masked.encode("[MASK]").tolist() == list(b"[MASK]")  # text is only ever text
    assert masked.eos == plain.eos


@pytest.mark.parametrize("length", [1, 3, 100])
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.9])
def test_a_fixed_part_is_to_be_predicted(length, fraction):
    objective = masking(fraction=fraction)
    rows = rows_of(WORDS, length, batch=4)
    read, targets = objective(rows, [1, 2, 3, 4])
    chosen = targets != IGNORE_INDEX
    assert read.shape == targets.shape == (4, length)
    assert (chosen.sum(axis=1) == objective.targets(length)).all()
    assert objective.targets(length) == max(1, round(fraction * length))
    assert np.array_equal(targets[chosen], rows[:, :-1][chosen])
    assert np.array_equal(read[~chosen], rows[:, :-1][~chosen])


def test_of_the_chosen_most_are_masked_some_replaced_some_left():
    objective = masking(fraction=0.5)
    rows = rows_of(WORDS, 1000, batch=20)
    read, targets = objective(rows, list(range(20)))
    chosen, was = targets != IGNORE_INDEX, rows[:, :-1]
    masked, same = read[chosen] == objective.tokenizer.mask, read[chosen] == was[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.016)  # 10,000 draws: 4 sigma
    assert same.mean() == pytest.approx(0.1, abs=0.012 + 1 / 258)
    others = read[chosen][~masked & ~same]
    assert len(np.unique(others)) > 200  # from all of the vocabulary


def test_it_depends_on_the_key_alone():
    objective, rows = masking(), rows_of(WORDS, 64, batch=3)
    read, targets = objective(rows, [5, 6, 7])
    alone = objective(rows[1:2], [6])
    assert np.array_equal(alone[0], read[1:2])
    assert np.array_equal(alone[1], targets[1:2])
    assert not np.array_equal(objective(rows, [8, 6, 7])[1][0], targets[0])


def test_words_of_bytes_are_runs_of_letters_and_digits():
    tokens = bytes_tokenizer().encode(WORDS).astype(np.int64)
    starts = bytes_tokenizer().word_starts(tokens)
    parts = [bytes(part.tolist()).decode() for part in np.split(tokens, np.flatnonzero(starts)[1:])]
    assert parts == [
        "the", " ", "(", "quick", ")", " ", "brown", "-", "fox", "_", "jumps", " ", "over", " ", "13", " ", "lazy", " ", "dogs",
        ";", " ", "thé", " ", "élan", " ", "naïve", ".", "\n",
    ]  # fmt: skip


def test_words_of_a_bpe_are_put_together():
    tokenizer = train_bpe([WORDS * 3], 300)
    tokens = tokenizer.encode(WORDS).astype(np.int64)
    parts = [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokenizer.word_starts(tokens))[1:])]
    assert "".join(parts) == WORDS
    assert {"over", "thé", "lazy", "dogs", "quick", "naïve"} <= {part.strip() for part in parts}


def test_words_of_a_wordpiece_go_on_with_hashes():
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    from mpilm.data.tokenizer import Tokenizer

    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "##s": 3, "chess": 4, "[SEP]": 5, "[MASK]": 6}
    library = Library(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer = Tokenizer(library.to_str(), 5, "x")
    assert tokenizer.mask == 6
    assert tokenizer.word_starts(np.array([1, 2, 3, 4, 3, 5])).tolist() == [True, False, False, True, False, True]


@settings(max_examples=40, deadline=None)
@given(fraction=st.sampled_from([0.05, 0.15, 0.4]), length=st.integers(1, 80), key=st.integers(0, 2**64 - 1))
def test_whole_words_are_whole_and_not_too_many(fraction, length, key):
    objective, rows = masking(fraction=fraction, whole=True), rows_of(WORDS, length)
    _, targets = objective(rows, [key])
    chosen, tokens = np.flatnonzero(targets[0] != IGNORE_INDEX), rows[0, :-1]
    words = np.cumsum(objective.tokenizer.word_starts(tokens))
    assert 1 <= len(chosen) <= objective.targets(length)
    cut = [word for word in set(words[chosen]) if np.count_nonzero(words[chosen] == word) < np.count_nonzero(words == word)]
    assert len(cut) <= 1  # the first, if it alone was too long
    assert not cut or len(set(words[chosen])) == 1


# Documents in a context.


def test_documents_end_with_their_last_token():
    rows = np.array([[1, 2, 256, 3, 256, 256, 4]])
    documents, positions = documents_of(rows, 256)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    documents, positions = documents_of(np.array([[1, 2, 3], [256, 4, 5]]), 256)
    assert documents.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 1]]


def stream():
    generator = np.random.default_rng(0)
    return corpus_of(np.where(generator.random(2000) < 0.1, 256, generator.integers(0, 200, 2000)).astype(np.uint16))


def batches(packing, objective=None):
    more = {} if objective is None else {"objective": objective}
    return Batches(TextStream(CorpusSamples(stream(), 20, 0.2), packing=packing, eos=256, **more), 0, 4, 2)


def test_no_token_is_predicted_from_another_document_and_all_others_are():
    concat, documents = batches("concat"), batches("documents")
    for step in range(20):
        for m in range(2):
            one, other = concat.train(step, m), documents.train(step, m)
            assert torch.equal(one.tokens, other.tokens)
            ends = one.tokens == 256
            assert torch.equal(other.targets, torch.where(ends, IGNORE_INDEX, one.targets))
            assert other.target_tokens == int((~ends).sum())
        assert documents.target_tokens(step) == sum(documents.train(step, m).target_tokens for m in range(2))
        assert concat.target_tokens(step) == 80 >= documents.target_tokens(step)
    assert documents.eval_targets() == sum(documents.evaluation(i).target_tokens for i in range(documents.eval_microbatches()))
    assert concat.eval_targets(1) == 80


def test_a_masked_token_is_predicted_from_its_own_document():
    plain, apart = (batches(packing, masking(fraction=0.3)) for packing in ("concat", "documents"))
    one, other = plain.train(3, 1), apart.train(3, 1)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.targets, other.targets)
    assert one.documents is None
    assert other.documents.max() > 0
    assert plain.target_tokens(0) == apart.target_tokens(0) == 4 * 6


def test_masks_change_with_the_step_and_not_with_the_seed_where_text_is_held_out():
    objective = masking()
    one = Batches(TextStream(CorpusSamples(stream(), 20, 0.2), objective), 0, 4, 2)
    other = Batches(TextStream(CorpusSamples(stream(), 20, 0.2), objective), 1, 4, 2)
    epoch = one.stream.samples.train_samples // 4 * 4
    assert torch.equal(one.evaluation(1).tokens, other.evaluation(1).tokens)
    assert not torch.equal(one.train(0, 0).targets, one.train(epoch, 0).targets)
    words = Batches(TextStream(CorpusSamples(stream(), 20, 0.2), masking(whole=True)), 0, 4, 2)
    assert words.target_tokens(2) == sum(words.train(2, m).target_tokens for m in range(2)) <= 12
