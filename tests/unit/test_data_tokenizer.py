"""Tokenizers: the bytes, trained and loaded ones."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.tokenizer import EOS, bpe_size, bytes_tokenizer, load_tokenizer, named_tokenizer, train_bpe
from mpilm.errors import ConfigError, DataError, FileError

TEXTS = ["the cat sat on the mat, the cat sat\n" * 20, "Größe, 猫 and 🐈; def f(x):\n    return x\n" * 10]
AWKWARD = st.text() | st.sampled_from([EOS, f"a{EOS}b", "\r\n\t ", "\ufeff", "\x00\x7f"])


@settings(max_examples=100, deadline=None)
@given(text=AWKWARD)
def test_bytes_are_the_bytes_and_the_library_agrees(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids.tolist()) == text.encode()
    library = tokenizer._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert ids.tolist() == library
    assert tokenizer.decode(ids) == text


def test_bytes_tokenizer_is_a_hugging_face_tokenizer(tmp_path):
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


@settings(max_examples=50, deadline=None)
@given(text=AWKWARD)
def test_bpe_keeps_every_text(trained, text):
    tokenizer = trained
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids


def test_bpe_has_the_size_asked_for_and_shortens_text():
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert tokenizer.encode_batch(TEXTS)[1].dtype == np.int32


def test_bpe_is_the_same_in_every_process_and_with_any_number_of_threads():
    code = f"TEXTS = {TEXTS!r}\nfrom mpilm.data.tokenizer import train_bpe\nprint(train_bpe(TEXTS, 300).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**env(), "RAYON_NUM_THREADS": n}
        ).stdout
        for n in ("1", "3")
    }
    assert digests == {train_bpe(TEXTS, 300).digest + "\n"}


def env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_eos_is_found_by_its_usual_names_or_where_the_config_says(tmp_path):
    values = json.loads(bytes_tokenizer().json)
    values["added_tokens"][0]["content"] = "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert load_tokenizer(tmp_path).eos == 256
    values["added_tokens"][0]["content"] = "<fin>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="no token that ends a document"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<fin>"}}))
    assert load_tokenizer(tmp_path).eos == 256


def test_a_tokenizer_that_cuts_and_adds_tokens_does_neither_here(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    library = Tokenizer.from_str(bytes_tokenizer().json)
    library.enable_truncation(3)
    library.enable_padding(length=64)
    library.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 256)])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abcdef").tolist() == list(b"abcdef")


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FileError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("spec", ["bpe:", "bpe:x", "bpe:12", "bpe:-5", "bpe:99999999", "bpe:²"])
def test_bad_sizes_name_the_setting(spec):
    with pytest.raises(ConfigError, match=r"--data\.tokenizer"):
        bpe_size(spec)


def test_specs():
    assert bpe_size("bpe:300") == 300
    assert bpe_size("bytes") is None
    assert named_tokenizer("bytes") == bytes_tokenizer()
    with pytest.raises(ConfigError, match=r"--data\.tokenizer byte"):
        named_tokenizer("byte")
