"""The plan command: its output, the settings that it refuses, and that it needs neither torch nor MPI."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mpilm.config.parse import parse
from mpilm.config.presets import PRESETS, VOCABULARIES
from mpilm.config.schema import Config, resolve_config
from mpilm.config.settings import override
from mpilm.errors import ConfigError, FileError
from mpilm.launch.local import run_local
from mpilm.plan import main
from mpilm.planner.command import PlanConfig, make_plan, plan_presets
from mpilm.planner.guess import guess_profile
from mpilm.planner.profile import write_profile
from mpilm.planner.search import PlannedJob, search
from tests.machines import machine

ROOT = Path(__file__).parents[2]


def configure(*words):
    return parse(words, PlanConfig(), "plan", "Predict.", plan_presets())


def draw(*words):
    return make_plan(configure("--draw", "--width", "100", *words))


def run_command(*words):
    code = "import sys, mpilm.plan as plan\ntry: plan.run_local(plan.main)\n"
    code += "finally: print('torch' in sys.modules, 'mpi4py' in sys.modules, 'numpy' in sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def test_draw_without_torch_or_mpi_prints_and_writes_the_schedule(tmp_path):
    layout = "--preset llama-1b --parallel.pipeline 4 --parallel.schedule interleaved --parallel.chunks 2 --ranks 8"
    done = run_command("--draw", *layout.split(), "--train.global-batch", 16, "--svg", tmp_path / "plan.svg")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "False False False"
    assert lines[0] == (
        "schedule interleaved; ranks of a pipeline: 4, chunks a rank: 2, microbatches on the fullest of 2 replicas: 8"
    )
    assert "layers of each stage, balanced by cost: 3 3 3 3 3 3 3 1; the heaviest, stage 0, has 1.03 times" in done.stdout
    assert "by formula, if all stages were equal: 15.79%" in done.stdout
    assert all(len(line) <= 100 for line in lines if line.startswith("rank "))
    ElementTree.fromstring((tmp_path / "plan.svg").read_text())


def test_draw_one_rank_accumulates_without_a_bubble():
    assert "chunks a rank: 1, microbatches: 8\n" in draw()
    assert "balanced by cost: 4; the heaviest, stage 0, has 1.00 times" in draw()
    assert "bubble, simulated: 0.00%; by formula, if all stages were equal: 0.00%" in draw()


def test_draw_even_stages_have_the_bubble_of_the_formula():
    text = draw("--parallel.pipeline", "4", "--vocabulary", "1", "--model.n-layers", "8")
    assert "bubble, simulated: 27.28%; by formula, if all stages were equal: 27.27%" in text
    assert "step 33; bubble 27.3%; most microbatches in flight, rank by rank: 4 3 2 1" in text


def test_draw_with_a_large_vocabulary_takes_layers_from_the_last_stage():
    layers = ("--model.n-layers", "12", "--parallel.pipeline", "3", "--vocabulary")
    assert "balanced by cost: 4 4 4;" in draw(*layers, "1")
    assert "balanced by cost: 4 5 3;" in draw(*layers, "4096")


def test_draw_costs_are_ratios():
    words = ("--parallel.pipeline", "2", "--parallel.schedule", "zero-bubble", "--costs")
    assert draw(*words, "2,4,2.4,1.6") == draw(*words, "1,2,1.2,0.8")
    assert "by formula" in draw(*words, "1,2,1.2,0.8")
    assert "by formula" not in draw(*words, "1,2,0.8,1.2")


@pytest.mark.parametrize("words", [["--ranks", "3"], ["--parallel.pipeline", "2", "--ranks", "6"]])
def test_draw_uneven_replicas_shows_the_fullest(words):
    assert "microbatches on the fullest of 3 replicas: 3\n" in draw(*words)  # of 8


def test_draw_a_stated_cut_keeps_it():
    text = draw("--parallel.pipeline", "2", "--parallel.cut", "3", "1")
    assert "layers of each stage, as stated: 3 1; the heaviest, stage 0, has 1.25 times" in text


def test_plan_presets_are_those_of_train():
    assert set(VOCABULARIES) | {"tiny"} == set(PRESETS) == set(plan_presets())
    assert [plan_presets()[name]().vocabulary for name in ("llama-8b", "tiny")] == [128256, 2048]
    assert configure("--preset", "llama-1b").model.n_layers == 22


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draw", "--vocabulary", "0"], "--vocabulary must be above zero, not 0"),
        (["--draw", "--ranks", "-1"], "--ranks must be above zero, not -1"),
        (["--ranks", "2,0"], "--ranks must be above zero, not 0"),
        (["--tokens", "-1"], "--tokens must be zero or more, not -1.0"),
        (["--draw", "--ranks", "2,4"], "--draw takes a single number of ranks, not 2; write --ranks 2"),
        (["--draw", "--plot", "x.png"], "--plot draws speed over ranks and --draw a pipeline; remove one of them"),
        (["--model.lora-rank", "8"], "--model.lora-rank: predictions are for training all parameters; remove it"),
        (["--draw", "--model.d-model", "7"], "--model.d-model 7 is not divisible by --model.n-heads 4"),
        (["--draw", "--parallel.pipeline", "2", "--ranks", "7"], "--parallel.pipeline 2 does not divide 7 ranks"),
        (["--draw", "--ranks", "9"], "9 ranks, but a step has only 8 microbatches"),
        (["--draw", "--parallel.pipeline", "2", "--parallel.cut", "3", "3"], "--parallel.cut 3 3 adds up to 6 layers"),
        (["--draw", "--parallel.chunks", "2"], "--parallel.chunks 2 needs --parallel.schedule interleaved"),
        (["--draw", "--costs", "1,2"], "--costs 1,2: write four finite numbers above zero, for F, B, I and W: 1,2,1,1"),
        (["--draw", "--costs", "1,2,one,1"], "--costs 1,2,one,1: write four finite numbers above zero"),
        (["--draw", "--costs", "1,2,0,1"], "--costs 1,2,0,1: write four finite numbers above zero"),
        (
            ["--draw", "--parallel.pipeline", "2", "--parallel.schedule", "interleaved", "--ranks", "6"],
            "--parallel.schedule interleaved needs a multiple of --parallel.pipeline 2 microbatches on each replica, not 3",
        ),
    ],
)
def test_make_plan_with_impossible_settings_raises(words, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_plan(configure(*words))


def exit_of(capsys, prepare):
    with pytest.raises(SystemExit) as stop:
        run_local(prepare)
    return stop.value.code, capsys.readouterr()


def test_run_alone_exits_as_other_commands(capsys, monkeypatch):
    def refuse():
        raise FileError("no such file")

    assert exit_of(capsys, lambda: lambda: print("done")) == (0, ("done\n", ""))
    assert exit_of(capsys, refuse) == (FileError.code, ("", "mpilm: error: no such file\n"))
    assert exit_of(capsys, lambda: refuse)[0] == FileError.code
    code, output = exit_of(capsys, lambda: configure("--help"))
    assert code == 0
    assert "--parallel.pipeline" in output.out
    text = " ".join(output.out.split())
    assert "Predict. " in text
    assert "Tokens to train on, such as 2e9" in text  # the comment behind the setting
    code, output = exit_of(capsys, lambda: configure("--no-such-flag"))
    assert code == ConfigError.code
    assert "no-such-flag" in output.err


@pytest.mark.parametrize(("rank", "message"), [("0", "mpilm: error: no such file\n"), ("1", "")])
def test_run_alone_under_a_launcher_prints_once(capsys, monkeypatch, rank, message):
    def refuse():
        print("begun")
        raise FileError("no such file")

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored at the end
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setenv("PMI_RANK", rank)
    assert exit_of(capsys, lambda: refuse) == (FileError.code, ("begun\n" * (rank == "0"), message))


def test_draw_into_a_missing_folder_exits_with_the_file_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--draw", "--svg", "/no/such/folder/plan.svg"])
    code, output = exit_of(capsys, main)
    assert code == FileError.code
    assert output.err.startswith(
        "mpilm: error: --svg /no/such/folder/plan.svg cannot be written: No such file or directory (on "
    )


# The ranking.


def plan(tmp_path, *words):
    write_profile(tmp_path / "m.json", machine(4))
    return make_plan(configure("--machine", str(tmp_path / "m.json"), *words)).splitlines()


def test_ranking_without_torch_or_mpi_shows_layouts_with_their_parts(tmp_path):
    lines = plan(tmp_path, "--ranks", "4", "--tokens", "1e9")
    assert lines[0] == "2 million parameters, 16 sequences of 256 tokens a step (8 microbatches), float32"
    assert "a processor, cpu, 4 cores and 64.0 GiB; measured today with 4 ranks a node" in lines[1]
    assert lines[3].split() == ["layout", "step", "s", "tokens/s", "compute", "bubble", "comm", "update", "MiB", "a", "rank"]
    assert lines[4].startswith("  1  data 4, pipeline 1, zero 0")
    assert "best: no settings: the default layout" in lines
    assert any("244,141 steps, 1e+09 tokens, take" in line for line in lines)
    assert any("memory of the rank that uses most: program 23 MiB, weights 8 MiB, moments 17 MiB" in line for line in lines)
    done = run_command("--ranks", 4, "--tokens", 1e9, "--machine", tmp_path / "m.json")
    assert done.stdout.splitlines() == [*lines, "False False False"], done.stderr


def test_ranking_of_several_numbers_of_ranks_compares_them(tmp_path):
    lines = plan(tmp_path, "--ranks", "1,2,4,256", "--plot", str(tmp_path / "curve.png"))
    assert [line.split()[0] for line in lines if ", zero " in line and "%" in line] == ["1", "2", "4"]
    assert "no layout of 256 ranks works:" in lines
    assert any("make the batch 512" in line for line in lines)
    assert any("from 1 to 2 ranks the speed grows only 1.00 times: ranks share the cores of a node" in line for line in lines)
    assert any(line.startswith("warning: more than 4 ranks need several nodes, and one was measured") for line in lines)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_ranking_with_sync_every_ignores_when_checkpoints_are_written(tmp_path):
    assert plan(tmp_path, "--ranks", "4", "--parallel.sync-every", "500")


# Without a calibration.


def test_plan_without_a_machine_file_states_its_guess_and_has_the_same_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = make_plan(configure("--ranks", "2", "--ranks-per-node", "2", "--preset", "llama-100m")).splitlines()
    assert lines[1].startswith("no machine.json here: seconds are a guess, from 30 GFLOP/s and 4 GB/s a core")
    assert "python -m mpilm.doctor --calibrate" in lines[1]
    guess = guess_profile()
    measured = machine(2, program_bytes=guess.program_bytes, memory_bytes=guess.memory_bytes)
    rates = tuple(replace(measured.compute[0], dtype=each.dtype) for each in guess.compute)
    write_profile(tmp_path / "machine.json", replace(measured, compute=rates))
    with_file = make_plan(configure("--ranks", "2", "--ranks-per-node", "2", "--preset", "llama-100m")).splitlines()
    assert "measured today" in with_file[1]
    assert memory_of(with_file) == memory_of(lines)
    for arch in ("gpt2", "qwen", "mixtral", "bert"):
        assert search(PlannedJob(resolve_config(override(Config(), model__arch=arch)), 2048, guess, 2), 2)[0]


def memory_of(lines):
    """Return the memory of a rank of each layout in a plan."""
    return {line.split("  ")[2]: line.split()[-1] for line in lines if re.match(r"  \d+  data", line)}
