"""python -m mpilm.watch: the folder of a run is read, whatever state it is in, and nothing in it is changed."""

import json
import sys
import threading
import time

import pytest

from mpilm import watch
from mpilm.errors import UserError

ROWS = [
    {"event": "start", "step": 0, "time": 1.0, "ranks": 3, "layout": {"data": 3}},
    {"step": 1, "time": 2.0, "loss": 4.5, "grad_norm": 0.5, "lr": 1e-3},
    {"step": 2, "time": 3.0, "loss": 4.25, "grad_norm": 0.5, "lr": 1e-3, "step_s": 0.5, "tokens_per_s": 1024.0},
]
END = {"event": "end", "step": 9, "time": 10.0}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.toml").write_text("[train]\nsteps = 9\n")
    (tmp_path / "metrics.jsonl").write_text(lines(*ROWS))
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "250")  # for a long name of the folder
    monkeypatch.setattr(sys, "argv", ["watch", *map(str, words)])
    watch.prepare()()


@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', "\0\0\0\n", '{"event": "start"}\n', '{"loss": 1.5}\n'])
def test_a_run_that_goes_on_is_shown_and_left_as_it_is(folder, monkeypatch, capsys, tail):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(tail)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(monkeypatch, folder, "--once", "true")
    said = capsys.readouterr().out
    assert "3 ranks, data 3" in said
    assert "step 2/9" in said
    assert "4.2500" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_it_ends_with_the_run_and_sees_a_run_that_is_taken_up_again(folder, monkeypatch, capsys):
    """A resume from step 1: the row of step 2 goes, another comes, of a run that is to make 7 steps now."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    def go_on():
        time.sleep(0.2)
        (folder / "config.toml").write_text("[train]\nsteps = 7\n")
        (folder / "metrics.jsonl").write_text(lines(*ROWS[:2], {**ROWS[0], "step": 1}, {**ROWS[2], "loss": 4.125}))
        time.sleep(0.2)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(lines(END))

    other = threading.Thread(target=go_on)
    other.start()
    run(monkeypatch, folder, "--interval", "0.05")
    other.join()
    said = capsys.readouterr().out
    assert said.index("step 2/9") < said.index("step 2/7")
    assert said.index("4.2500") < said.index("4.1250")
    assert "done" in said[said.index("step 2/7") :]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no folder: a run folder is wanted, with a config.toml: python -m mpilm.watch runs/NAME"),
        (("{}/none",), "{}/none: there is no such folder, or not yet"),
        (("{}/empty",), "{}/empty: a run folder is wanted, with a config.toml: python -m mpilm.watch runs/NAME"),
        (("{}/broken",), "{}/broken/config.toml: is not TOML: "),
        (("{}/newer",), "{}/newer/config.toml: unknown key train.zzz; "),
        (("{}", "--interval", "0"), "--interval 0.0: must be above zero"),
    ],
)
def test_what_is_refused_says_why(folder, monkeypatch, words, message):
    for name, content in (("broken", "[train\n"), ("newer", "[train]\nzzz = 1\n")):
        (folder / name).mkdir()
        (folder / name / "config.toml").write_text(content)
    (folder / "empty").mkdir()
    with pytest.raises(UserError) as error:
        run(monkeypatch, *(word.format(folder) for word in words))
    assert str(error.value).startswith(message.format(folder))
