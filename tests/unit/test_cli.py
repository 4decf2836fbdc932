"""From words to settings: the order of sources, the spelling of flags, and what is refused."""

import re

import pytest

from mpilm.cli import parse
from mpilm.config import Config, replaced
from mpilm.errors import ConfigError, FileError
from mpilm.generate import GenerateConfig
from mpilm.presets import PRESETS
from mpilm.usage import Folder


def config(*words):
    return parse(words, Config(), "train", "Train.", PRESETS)


def test_nothing_said_is_the_default():
    assert config() == Config() == PRESETS["tiny"]()


def test_later_wins_preset_file_flags(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[model]\nn-layers = 5\n[train]\nlr = 0.5\nmin_lr = 0.25\n")
    base = PRESETS["llama-100m"]()
    assert config("--preset", "llama-100m") == base
    changed = replaced(base, model__n_layers=5, train__lr=0.5, train__min_lr=0.25)
    assert config("--preset", "llama-100m", "--config", str(file)) == changed
    assert config(f"--config={file}", "--preset=llama-100m") == changed  # wherever they stand
    flags = config("--model.n-layers", "7", "--preset", "llama-100m", "--config", str(file))
    assert flags == replaced(changed, model__n_layers=7)


def test_later_files_win(tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.toml").write_text(f"[train]\nseed = {value}\n")
    assert config("--config", str(tmp_path / "a.toml"), "--config", str(tmp_path / "b.toml")).train.seed == 2


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["true"], True),
        (["false"], False),
        (["True"], True),
        (["False"], False),
        (["FALSE"], False),
        ([], True),
        (["--train.seed", "1"], True),
    ],
)
@pytest.mark.parametrize("flag", ["--train.gpu-aware-mpi", "--train.gpu_aware_mpi"])
def test_booleans(flag, words, value):
    assert config(flag, *words).train.gpu_aware_mpi is value


def test_dashes_and_underscores_are_the_same():
    assert config("--model.n_layers", "3") == config("--model.n-layers", "3") == config("--model.n-layers=3")


def test_lists():
    assert config("--checkpoint.allow-change", "train.lr", "train.seed").checkpoint.allow_change == ("train.lr", "train.seed")


@pytest.mark.parametrize("words", [["--no-such-flag", "1"], ["--train.steps", "ten"], ["--train.dtype", "float16"], ["word"]])
def test_flags_that_cannot_be_read(words, capsys):
    with pytest.raises(ConfigError) as caught:
        config(*words)
    text = str(caught.value)
    assert words[0].strip("-") in text
    assert text.endswith("python -m mpilm.train --help")
    assert not re.search("[│╭╰─\n]|--{5}", text)  # one line, nothing drawn
    assert capsys.readouterr() == ("", "")  # the caller prints, once


@pytest.mark.parametrize("words", [("--train.compile", "maybe"), ("--train.compile=maybe",), ("--train.compile", "1")])
def test_what_is_neither_true_nor_false_is_refused_by_name(words):
    with pytest.raises(ConfigError, match=r"^--train\.compile (maybe|1): write true or false$"):
        config(*words)


def test_words_that_are_not_utf8():
    with pytest.raises(ConfigError, match=r"^--generate\.prompt: 'caf\\udce9' is not UTF-8 text$"):
        config("--generate.prompt", "caf\udce9")


def test_the_config_of_a_run_goes_with_any_command(tmp_path):
    """What another command has no use for is left out; what nobody knows is still refused."""
    file = tmp_path / "config.toml"
    file.write_text('[model]\nn_layers = 7\n[data]\npath = ["x"]\n[generate]\ntop_k = 3\n[train]\ndtype = "bfloat16"\n')
    parsed = parse(["--config", str(file), "--model.init-from", "x"], GenerateConfig(), "generate", "Write.")
    assert (parsed.generate.top_k, parsed.train.dtype, parsed.model) == (3, "bfloat16", Folder("x"))
    file.write_text("[model]\nn_layerz = 7\n")
    with pytest.raises(ConfigError, match=r"unknown key model\.n_layerz"):
        parse(["--config", str(file)], GenerateConfig(), "generate", "Write.")


def test_help_names_every_section(capsys):
    with pytest.raises(SystemExit) as caught:
        config("--help")
    text, code = caught.value.args
    assert code == 0
    assert all(
        name in text for name in ("--model.n-layers", "--data.path", "--train.lr", "--checkpoint.every", "--preset", "--config")
    )
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "huge"], "--preset huge: there is none of that name; there are tiny, llama-100m, llama-1b, llama-8b, "),
        (["--preset"], "--preset needs a value"),
        (["--config"], "--config needs a value"),
        (["--train.steps", "0"], "--train.steps must be above zero, not 0"),
        (["--preset", "llama-8b", "--model.n-heads", "5"], "--model.d-model 4096 is not divisible by --model.n-heads 5"),
    ],
)
def test_what_cannot_work(words, message):
    with pytest.raises(ConfigError) as caught:
        config(*words)
    assert str(caught.value).startswith(message)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileError, match=r"--config /none\.toml: cannot be read"):
        config("--config", "/none.toml")
    file = tmp_path / "a.toml"
    file.write_text("[train]\nstepps = 3\n")
    with pytest.raises(ConfigError, match=r"a\.toml: unknown key train\.stepps; did you mean train\.steps\?"):
        config("--config", str(file))


def test_another_command_has_its_own_settings():
    parsed = parse(["--model.init-from", "x", "--generate.top-k", "3"], GenerateConfig(), "generate", "Write.")
    assert (parsed.model.init_from, parsed.generate.top_k) == ("x", 3)
    with pytest.raises(ConfigError, match="Unrecognized options: --preset, tiny"):
        parse(["--preset", "tiny"], GenerateConfig(), "generate", "Write.")
