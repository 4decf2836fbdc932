"""A run that starts from a folder has the folder's shape, wherever its settings come from."""

import json
from dataclasses import replace

import pytest

from mpilm.checkpoint.pretrained import check_pretrained_shape, read_pretrained_config, with_pretrained_shape
from mpilm.config.parse import parse
from mpilm.config.presets import PRESETS
from mpilm.config.schema import Config, ModelConfig, resolve_config
from mpilm.errors import ConfigError, FileError
from mpilm.model.hf.config import hf_config

SHAPE = resolve_config(Config(model=ModelConfig(arch="gpt2", n_layers=3, n_heads=2, d_model=24, context_length=32))).model
ROTARY = resolve_config(
    Config(model=ModelConfig(n_layers=3, n_heads=2, d_model=24, context_length=32, tie_embeddings=False))
).model


@pytest.fixture
def folder(tmp_path):
    return write_config(tmp_path / "model", SHAPE)


def write_config(path, shape, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(shape, 99, 7) | changes))
    return path


def parse_model(*arguments):
    return resolve_config(
        parse(
            [str(argument) for argument in arguments],
            Config(),
            "train",
            "",
            PRESETS,
            with_pretrained_shape,
            check_pretrained_shape,
        )
    ).model


def test_parse_with_init_from_takes_the_shape_of_the_folder(folder):
    expected = replace(SHAPE, vocab_size=99, init_from=str(folder))
    assert parse_model("--model.init-from", folder) == expected
    assert parse_model(f"--model.init_from={folder}") == expected
    assert parse_model("--preset", "llama-1b", "--model.init-from", folder) == expected
    assert replace(read_pretrained_config(folder), init_from=str(folder)) == expected


def test_parse_with_init_from_in_a_file_lets_flags_override_it(folder, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(f'[model]\ninit-from = "{folder}"\ndropout = 0.3\ncontext-length = 16\n')
    expected = replace(SHAPE, vocab_size=99, init_from=str(folder), dropout=0.3, context_length=16)
    assert parse_model("--config", file) == expected
    assert parse_model("--config", file, "--model.dropout", 0.5).dropout == 0.5
    other = write_config(tmp_path / "other", replace(SHAPE, n_layers=5))
    assert parse_model("--config", file, "--model.init-from", other).n_layers == 5
    assert parse_model("--config", file, "--model.init-from", "").n_layers == ModelConfig().n_layers


def test_parse_with_init_from_keeps_what_the_user_may_set(folder, tmp_path):
    assert parse_model("--model.init-from", folder, "--model.dropout", 0.2).dropout == 0.2
    assert parse_model("--model.init-from", folder, "--model.context-length", 8).context_length == 8
    rotary = write_config(tmp_path / "rotary", ROTARY)
    assert parse_model("--model.init-from", rotary, "--model.context-length", 64).context_length == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model.d-model", 64), "--model.d-model 64: FOLDER has 24; remove the setting"),
        (("--model.arch", "llama"), "--model.arch llama: FOLDER has gpt2; remove the setting"),
        (("--model.tie-embeddings", "false"), "--model.tie-embeddings False: FOLDER has True; remove the setting"),
        (("--model.vocab-size", 100), "--model.vocab-size 100: FOLDER has 99; remove the setting"),
        (("--model.context-length", 33), "--model.context-length 33: FOLDER has learned positions for only 32 tokens"),
    ],
)
def test_parse_of_another_shape_raises(folder, flags, message):
    with pytest.raises(ConfigError) as caught:
        parse_model("--model.init-from", folder, *flags)
    assert str(caught.value) == message.replace("FOLDER", str(folder))


def test_parse_with_init_from_of_no_model_folder_raises(tmp_path):
    with pytest.raises(FileError, match="none is not a folder"):
        parse_model("--model.init-from", tmp_path / "none")
    with pytest.raises(FileError, match=r"has no config\.json, so it is not a Hugging Face folder"):
        parse_model("--model.init-from", tmp_path)
    with pytest.raises(
        ConfigError, match=r"model_type 'mamba' is not supported; llama, qwen2, qwen3, mixtral, qwen3_moe, gpt2, bert are"
    ):
        parse_model("--model.init-from", write_config(tmp_path / "m", SHAPE, model_type="mamba"))
