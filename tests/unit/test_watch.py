"""python -m mpilm.watch: shows a run in any state and changes nothing in its folder."""

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


def run(monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "250")  # for a long name of the folder
    monkeypatch.setattr(sys, "argv", ["watch", *map(str, arguments)])
    watch.main()


BROKEN = (
    '{"step": 3, "lo', "\0\0\0\n", '{"event": "start"}\n', '{"loss": 1.5}\n', "[" * 100_000 + "\n",
    '{"event": {}, "step": 2, "time": 1e999, "ranks": "x"}\n', '{"event": "x\\ud800", "step": 2, "time": 3}\n',
    json.dumps(ROWS[2] | {"rank_s": [], "memory_bytes": {}, "step_s": 1e999}) + "\n",
)  # fmt: skip


@pytest.mark.parametrize("last_line", ["", *BROKEN])
def test_watch_once_running_run_is_shown_and_unchanged(folder, monkeypatch, capsys, last_line):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(last_line)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(monkeypatch, folder, "--once", "true")
    screen = capsys.readouterr().out
    assert "3 ranks, data 3" in screen
    assert "step 2/9" in screen
    assert "4.2500" in screen
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_watch_resumed_run_is_followed_to_its_end(folder, monkeypatch, capsys):
    """A resume from step 1 for 7 steps in all: the row of step 2 is replaced by another."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    def resume():
        time.sleep(0.2)
        (folder / "config.toml").write_text("[train]\nsteps = 7\n")
        (folder / "metrics.jsonl").write_text(lines(*ROWS[:2], {**ROWS[0], "step": 1}, {**ROWS[2], "loss": 4.125}))
        time.sleep(0.2)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(lines(END))

    thread = threading.Thread(target=resume)
    thread.start()
    run(monkeypatch, folder, "--interval", "0.05")
    thread.join()
    screen = capsys.readouterr().out
    assert screen.index("step 2/9") < screen.index("step 2/7")
    assert screen.index("4.2500") < screen.index("4.1250")
    assert "done" in screen[screen.index("step 2/7") :]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no folder given: write the folder of a run: python -m mpilm.watch runs/NAME"),
        (("{}/none",), "{}/none: folder not found"),
        (("{}/empty",), "{}/empty: write the folder of a run: python -m mpilm.watch runs/NAME"),
        (("{}/broken",), "{}/broken/config.toml is not valid TOML: "),
        (("{}/newer",), "{}/newer/config.toml: unknown setting --train.zzz; "),
        (("{}", "--interval", "0"), "--interval must be above zero, not 0.0"),
    ],
)
def test_watch_wrong_argument_names_the_problem(folder, monkeypatch, arguments, message):
    for name, content in (("broken", "[train\n"), ("newer", "[train]\nzzz = 1\n")):
        (folder / name).mkdir()
        (folder / name / "config.toml").write_text(content)
    (folder / "empty").mkdir()
    with pytest.raises(UserError) as error:
        run(monkeypatch, *(argument.format(folder) for argument in arguments))
    assert str(error.value).startswith(message.format(folder))
