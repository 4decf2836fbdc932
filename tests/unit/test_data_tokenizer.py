"""Tokenizers: bytes, trained and loaded ones, their mask tokens and their words."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.tokenizer import EOS, Tokenizer, bytes_tokenizer, load_tokenizer, parse_bpe_size, tokenizer_from_spec, train_bpe
from mpilm.errors import ConfigError, DataError, FileError

TEXTS = ["the cat sat on the mat, the cat sat\n" * 20, "Größe, 猫 and 🐈; def f(x):\n    return x\n" * 10]
AWKWARD = st.text() | st.sampled_from([EOS, f"a{EOS}b", "\r\n\t ", "\ufeff", "\x00\x7f"])
SENTENCE = "the (quick) brown-fox_jumps over 13 lazy dogs; thé élan naïve.\n"


@settings(max_examples=100)
@given(text=AWKWARD)
def test_bytes_tokenizer_encodes_bytes_as_the_library_does(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids.tolist()) == text.encode()
    assert ids.tolist() == tokenizer._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert tokenizer.decode(ids) == text


def test_bytes_tokenizer_loads_in_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = bytes_tokenizer()
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs("héllo")["input_ids"] == tokenizer.encode("héllo").tolist() == list("héllo".encode())
    assert theirs.convert_tokens_to_ids(EOS) == tokenizer.eos == 256
    assert tokenizer.vocab_size == 257
    assert load_tokenizer(tmp_path) == tokenizer


@pytest.fixture(scope="module")
def trained():
    return train_bpe(TEXTS, 300)


@settings(max_examples=50)
@given(text=AWKWARD)
def test_train_bpe_keeps_every_text(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eos not in ids


def test_train_bpe_has_the_size_asked_for_and_shortens_text(trained):
    assert trained.vocab_size == 300
    assert len(trained.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert trained.encode_batch(TEXTS)[1].dtype == np.int32


def test_train_bpe_is_the_same_in_every_process_and_with_any_threads(trained):
    code = f"TEXTS = {TEXTS!r}\nfrom mpilm.data.tokenizer import train_bpe\nprint(train_bpe(TEXTS, 300).digest)"
    for threads in ("1", "3"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert done.stdout == trained.digest + "\n"


def test_load_tokenizer_finds_eos_by_usual_names_or_config(tmp_path):
    values = json.loads(bytes_tokenizer().json)

    def name_eos(name):
        values["added_tokens"][0]["content"] = name
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))

    name_eos("</s>")
    assert load_tokenizer(tmp_path).eos == 256
    name_eos("<fin>")
    with pytest.raises(DataError, match="no token that ends a document"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<fin>"}}))
    assert load_tokenizer(tmp_path).eos == 256


def test_load_tokenizer_neither_truncates_nor_pads_nor_adds_tokens(tmp_path):
    from tokenizers.processors import TemplateProcessing

    library = tokenizers.Tokenizer.from_str(bytes_tokenizer().json)
    library.enable_truncation(3)
    library.enable_padding(length=64)
    library.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 256)])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abcdef").tolist() == list(b"abcdef")


def test_load_tokenizer_wrong_file_raises(tmp_path):
    with pytest.raises(FileError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": {"a": 2**31}}, "holds an id or number of 2,147,483,648; those below 10,000,000 are supported"),
        ({"vocab": {"a": 0}, "merges": ["a b"]}, "is not a tokenizer.json that the tokenizers library reads: Token `b`"),
        ({"continuing_subword_prefix": "aaaaaaaaa", "merges": ["t h"]}, "is not a tokenizer.json that the tokenizers library"),
        ({"x": ["[" * 9]}, ""),
    ],
)
def test_load_tokenizer_absurd_file_raises(tmp_path, trained, change, message):
    values = json.loads(trained.json)
    values["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    if not message:
        assert load_tokenizer(tmp_path).eos == trained.eos
        return
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("spec", ["bpe:", "bpe:x", "bpe:12", "bpe:-5", "bpe:99999999", "bpe:²"])
def test_parse_bpe_size_wrong_size_raises(spec):
    with pytest.raises(ConfigError, match=r"--data\.tokenizer"):
        parse_bpe_size(spec)


def test_tokenizer_from_spec_reads_bytes_and_refuses_unknown_names():
    assert parse_bpe_size("bpe:300") == 300
    assert parse_bpe_size("bytes") is None
    assert tokenizer_from_spec("bytes") == bytes_tokenizer()
    with pytest.raises(ConfigError, match=r"--data\.tokenizer byte"):
        tokenizer_from_spec("byte")


def test_with_mask_adds_one_token_after_all_others():
    plain = bytes_tokenizer()
    masked = plain.with_mask()
    assert plain.mask is None
    assert masked.mask == plain.vocab_size == masked.vocab_size - 1
    assert masked.with_mask() is masked
    assert masked.decode([65, masked.mask]) == "A[MASK]"
    assert np.array_equal(masked.encode(SENTENCE), plain.encode(SENTENCE))
    assert masked.encode("[MASK]").tolist() == list(b"[MASK]")  # in a text it is text
    assert masked.eos == plain.eos


def split_words(tokenizer):
    tokens = tokenizer.encode(SENTENCE).astype(np.int64)
    return [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokenizer.word_starts(tokens))[1:])]


def test_word_starts_of_bytes_are_runs_of_letters_and_digits():
    words = "the, ,(,quick,), ,brown,-,fox,_,jumps, ,over, ,13, ,lazy, ,dogs,;, ,thé, ,élan, ,naïve,.,\n"
    assert split_words(bytes_tokenizer()) == words.split(",")


def test_word_starts_of_bpe_join_tokens():
    parts = split_words(train_bpe([SENTENCE * 3], 300))
    assert "".join(parts) == SENTENCE
    assert {"over", "thé", "lazy", "dogs", "quick", "naïve"} <= {part.strip() for part in parts}


def test_word_starts_of_wordpiece_continue_with_hashes():
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "##s": 3, "chess": 4, "[SEP]": 5, "[MASK]": 6}
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer = Tokenizer(library.to_str(), 5, "x")
    assert tokenizer.mask == 6
    assert tokenizer.word_starts(np.array([1, 2, 3, 4, 3, 5])).tolist() == [True, False, False, True, False, True]
