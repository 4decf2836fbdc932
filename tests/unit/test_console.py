"""The console command: the list of commands, the completion of shells, and a new project."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import mpirun

from mpilm.__main__ import COMMANDS, main
from mpilm.completion import SHELLS, list_settings, make_script
from mpilm.config.parse import parse, read_toml
from mpilm.config.presets import COMMON_SETTINGS
from mpilm.config.schema import Config
from mpilm.config.settings import flag_of, flatten
from mpilm.errors import ConfigError
from mpilm.init import JOBS, write_project

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom mpilm.__main__ import main\nsys.exit(main())\n"  # as pip writes it


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mpilm"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def settings():
    return list_settings()


def test_every_module_at_the_top_that_is_a_command_is_listed():
    found = {path.stem for path in ROOT.glob("mpilm/*.py") if "__main__" in path.read_text() and path.stem != "__main__"}
    assert found | {path.parent.name for path in ROOT.glob("mpilm/*/__main__.py")} == set(COMMANDS)


def test_list_of_commands_needs_no_torch():
    block = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; sys.argv = ['mpilm']\n"
    done = subprocess.run([sys.executable, "-c", block + SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  (\w+)  ", done.stdout, re.M) == list(COMMANDS)


@pytest.mark.parametrize("rank", [0, 1])
def test_unknown_command_is_refused_on_every_rank_with_one_message(monkeypatch, capsys, rank):
    monkeypatch.setenv("PMI_RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["mpilm", "trian"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which main replaces
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == ConfigError.code
    message = "mpilm: error: there is no command 'trian'; did you mean python -m mpilm.train?\n"
    assert capsys.readouterr().err == message * (rank == 0)


def test_help_calls_the_program_as_its_user_does(script):
    for words, called in (([script, "watch"], "mpilm watch"), (["-m", "mpilm", "watch"], "python -m mpilm.watch")):
        text = mpirun(0, *words, "--help").stdout
        assert text.startswith(f"usage: {called} [-h] RUN")
        assert f"\n  $ {called} runs/NAME\n" in text


def test_rank_that_raises_ends_a_job_of_the_console_command(script):
    done = mpirun(2, script, "verify", limit_s=30, MPILM_FAULT="kind=raise rank=1 point=command")
    assert done.returncode != 0
    assert "ValueError: injected by MPILM_FAULT" in done.stderr


# Help.


def test_help_of_train_begins_with_common_settings_and_examples():
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], Config(), "train", "Train.\n\n$ one\n$ two\n", common=COMMON_SETTINGS)
    head = caught.value.args[0].partition("model options")[0]
    assert re.findall(r"^  (--\S+) ", head, re.M) == [flag_of(name) for name in COMMON_SETTINGS]
    assert "Examples:\n\n  $ one\n  $ two\n" in head
    assert Path(re.findall("Manual: (.*)", head)[0]).is_file()


# Completion.


def test_completion_knows_the_settings_of_every_command(settings):
    assert set(settings) == set(COMMANDS) - {"completion"}
    assert {flag_of(name) for name in flatten(Config())} <= set(settings["train"])
    assert settings["fetch"] == ["--help", "--config"]


def test_bash_completes_commands_and_settings(settings, tmp_path):
    (tmp_path / "script").write_text(make_script("bash", settings))
    for words, expected in ((["pre"], "prepare"), (["train", "--train.step"], "--train.steps"), (["train", "x"], "")):
        line = f"source ./script; COMP_WORDS=(mpilm {' '.join(words)}); COMP_CWORD={len(words)}; _mpilm; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_scripts_of_all_shells_have_all_settings(settings):
    for shell in SHELLS:
        script = make_script(shell, settings)
        assert all(flag.removeprefix("--") in script for flags in settings.values() for flag in flags)


# Init.


def test_new_project_has_a_config_that_changes_only_the_run_folder(tmp_path):
    names = write_project(tmp_path / "new", "")
    parsed = parse(["--config", str(tmp_path / "new" / "train.toml")], Config(), "train", "")
    assert {name for name, value in flatten(parsed).items() if value != flatten(Config())[name]} == {"run.dir"}
    text = (tmp_path / "new" / "train.toml").read_text()
    assert all(re.search(rf"^(# )?{name.partition('.')[2].replace('_', '-')} = ", text, re.M) for name in COMMON_SETTINGS)
    uncommented = re.sub(r"^# ([\w-]+ = )", r"\1", text, flags=re.M)
    (tmp_path / "all.toml").write_text(uncommented)
    assert read_toml(tmp_path / "all.toml")["model"]["n-layers"] == Config().model.n_layers
    for path in (path for path in JOBS.rglob("*") if path.is_file()):
        copy = tmp_path / "new" / "jobs" / path.relative_to(JOBS)
        assert copy.relative_to(tmp_path / "new") in names
        assert copy.read_bytes() == path.read_bytes()
        assert os.access(copy, os.X_OK) == bool(path.stat().st_mode & stat.S_IXUSR)


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "common.sh").write_text("mine")
    with pytest.raises(ConfigError, match=r"jobs/common\.sh exists; init overwrites nothing"):
        write_project(tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["jobs"]
    assert (tmp_path / "jobs" / "common.sh").read_text() == "mine"


def test_init_for_a_site_takes_its_file(tmp_path, monkeypatch):
    (tmp_path / "jobs" / "sites").mkdir(parents=True)
    (tmp_path / "jobs" / "sites" / "alps.sh").write_text("module load alps\n")
    monkeypatch.setattr("mpilm.init.JOBS", tmp_path / "jobs")
    write_project(tmp_path / "new", "alps")
    assert (tmp_path / "new" / "jobs" / "site.sh").read_text().startswith("module load alps\n")
    with pytest.raises(ConfigError, match="--site alpz: no such machine; known are alps"):
        write_project(tmp_path / "other", "alpz")
