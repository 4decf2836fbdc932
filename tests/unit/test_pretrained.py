"""The shape of a run that starts from a folder: the folder's, wherever the settings come from."""

import json
from dataclasses import replace

import pytest

from mpilm.checkpoint.pretrained import shape_of
from mpilm.cli import parse
from mpilm.config import Config, Model, resolve
from mpilm.errors import ConfigError, FileError
from mpilm.model.hf.config import hf_config
from mpilm.presets import PRESETS

SHAPE = resolve(Config(model=Model(arch="gpt2", n_layers=3, n_heads=2, d_model=24, context_length=32))).model
ROTARY = resolve(Config(model=Model(n_layers=3, n_heads=2, d_model=24, context_length=32, tie_embeddings=False))).model


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "model", SHAPE)


def written(path, shape, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(shape, 99, 7) | changes))
    return path


def configured(*words):
    return resolve(parse([str(word) for word in words], Config(), "train", "", PRESETS)).model


def test_the_shape_is_the_folders(folder):
    expected = replace(SHAPE, vocab_size=99, init_from=str(folder))
    assert configured("--model.init-from", folder) == expected
    assert configured(f"--model.init_from={folder}") == expected
    assert configured("--preset", "llama-1b", "--model.init-from", folder) == expected
    assert replace(shape_of(folder), init_from=str(folder)) == expected


def test_a_file_may_name_it_too(folder, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(f'[model]\ninit-from = "{folder}"\ndropout = 0.3\ncontext-length = 16\n')
    expected = replace(SHAPE, vocab_size=99, init_from=str(folder), dropout=0.3, context_length=16)
    assert configured("--config", file) == expected
    assert configured("--config", file, "--model.dropout", 0.5).dropout == 0.5
    other = written(tmp_path / "other", replace(SHAPE, n_layers=5))
    assert configured("--config", file, "--model.init-from", other).n_layers == 5
    assert configured("--config", file, "--model.init-from", "").n_layers == Model().n_layers


def test_what_is_the_users_to_set(folder, tmp_path):
    assert configured("--model.init-from", folder, "--model.dropout", 0.2).dropout == 0.2
    assert configured("--model.init-from", folder, "--model.context-length", 8).context_length == 8
    rotary = written(tmp_path / "rotary", ROTARY)
    assert configured("--model.init-from", rotary, "--model.context-length", 64).context_length == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.d-model", 64), "--model.d-model 64: FOLDER has 24; leave the setting out"),
        (("--model.arch", "llama"), "--model.arch llama: FOLDER has gpt2; leave the setting out"),
        (("--model.tie-embeddings", "false"), "--model.tie-embeddings False: FOLDER has True; leave the setting out"),
        (("--model.vocab-size", 100), "--model.vocab-size 100: FOLDER has 99; leave the setting out"),
        (("--model.context-length", 33), "--model.context-length 33: FOLDER has learned positions for 32 tokens and no more"),
    ],
)
def test_another_shape_is_refused(folder, words, message):
    with pytest.raises(ConfigError) as caught:
        configured("--model.init-from", folder, *words)
    assert str(caught.value) == message.replace("FOLDER", str(folder))


def test_what_is_no_folder_of_a_model(tmp_path):
    with pytest.raises(FileError, match="none is not a folder"):
        configured("--model.init-from", tmp_path / "none")
    with pytest.raises(FileError, match=r"holds no config\.json: it is no Hugging Face folder"):
        configured("--model.init-from", tmp_path)
    with pytest.raises(ConfigError, match=r"model_type 'mamba' is not supported; llama, qwen2, qwen3, mixtral, gpt2, bert are"):
        configured("--model.init-from", written(tmp_path / "m", SHAPE, model_type="mamba"))
