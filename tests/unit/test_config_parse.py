"""Reading of settings: the order of sources, the spelling of flags, TOML files, old names, and refusals."""

import re
from typing import Any

import pytest

from mpilm.config.old_names import OLD_NAMES, OLD_VALUES
from mpilm.config.parse import SYNONYMS, merge_settings, parse, read_toml
from mpilm.config.presets import PRESETS
from mpilm.config.schema import Config
from mpilm.config.settings import flatten, override, to_dict
from mpilm.doctor.__main__ import DoctorArguments
from mpilm.errors import RANK_VARIABLES, ConfigError, FileError
from mpilm.inference.arguments import EvaluateArguments, GenerateArguments, ModelFolder


def parse_train(*words: str) -> Config:
    return parse(words, Config(), "train", "Train.", PRESETS)


def parse_generate(*words: str) -> GenerateArguments:
    return parse(words, GenerateArguments(), "generate", "Generate.")


def error_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_train(*words)
    return str(caught.value)


def test_parse_without_words_gives_the_default():
    assert parse_train() == Config() == PRESETS["tiny"]()


def test_parse_lets_later_sources_win(tmp_path):
    file, other = tmp_path / "a.toml", tmp_path / "b.toml"
    file.write_text("[model]\nn-layers = 5\n[train]\nlr = 0.5\nmin_lr = 0.25\n")
    other.write_text("[train]\nlr = 0.75\n")
    base = PRESETS["llama-100m"]()
    assert parse_train("--preset", "llama-100m") == base
    from_file = override(base, model__n_layers=5, train__lr=0.5, train__min_lr=0.25)
    assert parse_train(f"--config={file}", "--preset=llama-100m") == from_file  # in any order
    words = ("--model.n-layers", "7", "--preset", "llama-100m", "--config", str(file), "--config", str(other))
    assert parse_train(*words) == override(from_file, model__n_layers=7, train__lr=0.75)


@pytest.mark.parametrize("flag", ["--checkpoint.keep-best", "--checkpoint.keep_best"])
@pytest.mark.parametrize(
    ("words", "value"), [(["true"], True), (["FALSE"], False), ([], True), (["--train.seed", "1"], True), (["False"], False)]
)
def test_parse_reads_booleans_in_any_spelling(flag, words, value):
    assert parse_train(flag, *words).checkpoint.keep_best is value


def test_parse_reads_hyphens_underscores_and_equals_signs_alike():
    assert parse_train("--model.n_layers", "3") == parse_train("--model.n-layers", "3") == parse_train("--model.n-layers=3")
    assert parse_train("--generate.prompt=--x").generate.prompt == "--x"
    assert parse_train("--run.dir", "").run.dir == ""


def test_parse_splits_lists_at_spaces_and_commas_but_not_paths():
    for words in (["train.lr", "train.seed"], ["train.lr,train.seed"]):
        assert parse_train("--checkpoint.allow-change", *words).checkpoint.allow_change == ("train.lr", "train.seed")
    assert parse_train("--data.path", "a,b.txt").data.path == ("a,b.txt",)


@pytest.mark.parametrize("words", [["--no-such-flag", "1"], ["--train.steps", "ten"], ["--train.dtype", "float8"], ["word"]])
def test_parse_unreadable_flag_is_reported_in_one_line(words, capsys):
    text = error_of(*words)
    assert words[0].strip("-") in text
    assert "\n" not in text
    assert capsys.readouterr() == ("", "")  # the caller prints, once


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.compile", "maybe"], "--train.compile must be true or false, not 'maybe'"),
        (["--train.compile=1"], "--train.compile must be true or false, not '1'"),
        (["--generate.prompt", "caf\udce9"], r"--generate.prompt 'caf\udce9' is not valid UTF-8"),
        (["--data.path", "caf\udce9"], r"--data.path 'caf\udce9' is not valid UTF-8"),
        (["--preset", "huge"], "--preset must be one of tiny, llama-100m, "),
        (["--preset"], "--preset needs a value"),
        (["--config"], "--config needs a value"),
        (["--train.steps", "0"], "--train.steps must be above zero, not 0"),
        (["--preset", "llama-8b", "--model.n-heads", "5"], "--model.d-model 4096 is not divisible by --model.n-heads 5"),
        (["--run.trackers", "x"], "--run.trackers must be one of wandb, mlflow, not 'x'"),
        (["--train.steps", "ten"], "--train.steps must be a whole number, not 'ten'"),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.stepz", "4"], "unknown setting --train.stepz; did you mean --train.steps?"),
        (["--parallel.zero", "4"], "--parallel.zero must be one of 0, 1, 2, 3, not 4"),
        (["--parallel.cut", "1", "x"], "--parallel.cut must be a list of whole numbers, not 'x'"),
        (["--train.steps", "4", "5"], "'5' follows no setting"),
        (["-lr", "5"], "'-lr' follows no setting; did you mean --train.lr?"),
        (["train.lr", "5"], "'train.lr' follows no setting; did you mean --train.lr?"),
        (["--lr", "1"], "unknown setting --lr; did you mean --train.lr?"),
        (["--learning-rate=1"], "unknown setting --learning-rate; did you mean --train.lr?"),
        (["--train.learning-rate", "1"], "unknown setting --train.learning-rate; did you mean --train.lr?"),
        (["--steps", "1"], "unknown setting --steps; did you mean --train.steps?"),
        (["--batch-size", "1"], "unknown setting --batch-size; did you mean --train.global-batch?"),
        (["--trian.steps", "1"], "unknown setting --trian.steps; did you mean --train.steps?"),
        (["--stpes", "1"], "unknown setting --stpes; did you mean --train.steps?"),
        (["--data", "x"], "data is a section: write --data.KEY or, in a file, [data] and its keys below it; did you mean --d"),
        (["--model.init-from", "x"], "--model.init-from: this command cannot start from a model folder"),
    ],
)
def test_parse_refuses_what_cannot_work(words, message):
    assert error_of(*words).startswith(message)


def test_parse_help_names_sources_and_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train("--help")
    text, code = caught.value.args
    assert code == 0
    assert "--preset" in text
    assert "--config" in text
    for name in flatten(Config()):
        flag = re.escape("--" + name.replace("_", "-"))
        explained = re.search(rf"{flag} (\{{[^}}]*\}}|[A-Z]+|\[[^\n]*\])\s+(\w[^\n]+)\n", text)
        assert explained, f"{name} has no help text: write a comment behind or above the field"
        assert not explained[2].startswith("(default"), name
    assert capsys.readouterr() == ("", "")


def test_parse_accepts_the_config_of_a_run_for_every_command(tmp_path):
    """Settings that the command lacks are skipped; settings that no command has are still refused."""
    file = tmp_path / "config.toml"
    file.write_text('[model]\nn_layers = 7\n[data]\npath = ["x"]\n[generate]\ntop_k = 3\n[train]\ndtype = "bfloat16"\n')
    parsed = parse_generate("--config", str(file), "--model.init-from", "x")
    assert (parsed.generate.top_k, parsed.train.dtype, parsed.model) == (3, "bfloat16", ModelFolder("x"))
    file.write_text("[model]\nn_layerz = 7\n")
    with pytest.raises(ConfigError, match=r"unknown setting --model\.n-layerz"):
        parse_generate("--config", str(file))
    with pytest.raises(ConfigError, match="unknown setting --preset"):
        parse_generate("--preset", "tiny")
    with pytest.raises(ConfigError, match=r"--model\.context-length must be zero or more, not -1"):
        parse(["--model.context-length", "-1"], EvaluateArguments(), "evaluate", "")


def test_names_of_other_programs_lead_to_settings():
    assert set(SYNONYMS.values()) <= set(flatten(Config()))
    assert not set(SYNONYMS) & {name.partition(".")[2] for name in flatten(Config())}


# Old names.


def test_old_names_are_replaced_with_one_warning_on_rank_0(tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.toml"
    file.write_text('[parallel]\ncompress = 2\nreduce = "sent"\n')
    new = override(Config(), parallel__powersgd_rank=4, parallel__reduce="messages", checkpoint__allow_change=("train.lr",))
    words = ("--config", str(file), "--parallel.compress", "4", "--checkpoint.allow-change", "train.lr")
    for variable in RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert parse_train(*words) == new
    end = "; the next version will not accept the old form\n"
    assert capsys.readouterr().err.splitlines(keepends=True) == [
        f"mpilm: warning: --parallel.compress 4 is now --parallel.powersgd-rank 4{end}",
        f"mpilm: warning: --parallel.compress 2 is now --parallel.powersgd-rank 2{end}",
        f"mpilm: warning: --parallel.reduce sent is now --parallel.reduce messages{end}",
    ]
    monkeypatch.setenv(RANK_VARIABLES[0], "1")
    assert parse_train(*words, "--parallel.reduce=sent") == new
    assert capsys.readouterr().err == ""
    assert parse_train("--checkpoint.allow-change", "parallel.compress").checkpoint.allow_change == ("parallel.powersgd_rank",)


def test_old_names_in_stored_settings_load_silently(capsys):
    merged = merge_settings(Config(), {"parallel": {"compress": 2, "reduce": "shared"}, "train": {"gpu_aware_mpi": True}}, "x")
    changes = {"parallel__powersgd_rank": 2, "parallel__reduce": "shared-memory", "train__device_transport": "gpu-aware-mpi"}
    assert merged == override(Config(), **changes)
    assert capsys.readouterr() == ("", "")


def test_old_names_lead_to_settings_of_the_same_section():
    names = {*flatten(Config()), *flatten(DoctorArguments())}
    assert {*OLD_NAMES.values(), *OLD_VALUES} <= names
    assert not names & set(OLD_NAMES)
    assert all(old.split(".")[0] == new.split(".")[0] for old, new in OLD_NAMES.items())


# TOML.


def test_merge_settings_replaces_values_and_keeps_the_rest():
    merged = merge_settings(Config(), {"model": {"n-layers": 7}, "train": {"lr": 1, "clip_norm": 0.5}}, "a.toml")
    assert merged == override(Config(), model__n_layers=7, train__lr=1.0, train__clip_norm=0.5)
    assert isinstance(merged.train.lr, float)


def test_merge_settings_inverts_to_dict():
    config = override(
        Config(), checkpoint__allow_change=("train.lr",), data__path=("x.txt",), train__reproducible=False, parallel__cut=(1, 3)
    )
    assert merge_settings(Config(), to_dict(config), "config.toml") == config


@pytest.mark.parametrize("value", [["a.txt", 0.7, "b.txt", 0.3], [["a.txt", 0.7], ["b.txt", 0.3]]])
def test_merge_settings_flattens_paths_and_shares(value):
    assert merge_settings(Config(), {"data": {"path": value}}, "x").data.path == ("a.txt", "0.7", "b.txt", "0.3")
    assert merge_settings(Config(), {"data": {"path": "a.txt"}}, "x").data.path == ("a.txt",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n-layer": 3}}, "unknown setting --model.n-layer; did you mean --model.n-layers?"),
        ({"modle": {"d_ff": 3}}, "unknown setting --modle.d-ff; did you mean --model.d-ff?"),
        ({"run": {"zzz": 1}}, "unknown setting --run.zzz; --help lists the settings"),
        (
            {"model": 3},
            "model is a section: write --model.KEY or, in a file, [model] and its keys below it; "
            "did you mean --model.init-from?",
        ),
        ({"train": {"steps": "ten"}}, "train.steps must be a whole number, not 'ten'"),
        ({"train": {"steps": True}}, "train.steps must be a whole number, not true"),
        ({"train": {"steps": 2.0}}, "train.steps must be a whole number, not 2.0"),
        ({"train": {"lr": "3e-4"}}, "train.lr must be a number, not '3e-4'"),
        ({"train": {"lr": [1.0]}}, "train.lr must be a number, not [1.0]"),
        ({"train": {"reproducible": 1}}, "train.reproducible must be true or false, not 1"),
        ({"data": {"path": [{}]}}, "data.path must be a list of strings, not {}"),
        ({"checkpoint": {"allow-change": "train.lr"}}, "checkpoint.allow-change must be a list of strings, not 'train.lr'"),
        ({"parallel": {"cut": 4}}, "parallel.cut must be a list of whole numbers, not 4"),
        ({"parallel": {"cut": [2.0, 2]}}, "parallel.cut must be a list of whole numbers, not 2.0"),
        ({"parallel": {"cut": [True, 3]}}, "parallel.cut must be a list of whole numbers, not true"),
        ({"parallel": {"zero": "1"}}, "parallel.zero must be a whole number, not '1'"),
        ({"parallel": {"schedule": {"x": 1}}}, "unknown setting --parallel.schedule.x; did you mean --parallel.schedule?"),
    ],
)
def test_merge_settings_names_what_is_wrong(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        merge_settings(Config(), values, "a.toml")
    assert str(caught.value) == f"a.toml: {message}"


def test_read_toml_names_files_that_cannot_be_read(tmp_path):
    bad, binary = tmp_path / "bad.toml", tmp_path / "binary.toml"
    bad.write_text("[train\n")
    binary.write_bytes(b"\xff\xfe")
    for path in (bad, binary):
        assert error_of("--config", str(path)).startswith(f"--config {path} is not valid TOML: ")
    with pytest.raises(FileError, match=r"^--config /none\.toml cannot be read: No such file or directory"):
        parse_train("--config", "/none.toml")
    with pytest.raises(FileError, match=r"^/none\.toml cannot be read"):
        read_toml("/none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = " + "[" * 5000, "it is nested too deep"),
        (".".join("a" * 5000) + " = 1\n", "it is nested too deep"),
        ("[train]\nsteps = 0x" + "f" * 5000, "a number in it has thousands of digits"),
        ("#" * 2**22 + "\n", "it is larger than 4.0 MiB"),
    ],
)
def test_read_toml_refuses_absurd_files_with_one_message(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.toml is not valid TOML: {message}"):
        read_toml(tmp_path / "a.toml")


def test_parse_refuses_values_of_any_length_in_one_line():
    for flags in (
        ["--train.seed", "9" * 9000],
        ["--train.lr", "9" * 9000],
        ["--train.steps", "x" * 10**6],
        ["--" + "x" * 10**6],
    ):
        with pytest.raises(ConfigError) as caught:
            parse(flags, Config(), "train", "")
        assert len(str(caught.value)) < 4100
