"""The plan command: what it says, what it refuses, and that it needs neither torch nor MPI."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mpilm.cli import run_alone
from mpilm.errors import ConfigError, FileError
from mpilm.plan import VOCABULARIES, configure, describe, make, presets, rank
from mpilm.planner.machine import write
from mpilm.presets import PRESETS
from tests.machines import machine

ROOT = Path(__file__).parents[2]


def plan(*words):
    return make(configure(["--draw", *words]))


def test_it_needs_neither_torch_nor_mpi(tmp_path):
    code = (
        "import sys, mpilm.plan as plan\n"
        "try: plan.run_alone(plan.prepare)\n"
        "finally: print('torch' in sys.modules, 'mpi4py' in sys.modules, 'numpy' in sys.modules)"
    )
    image = tmp_path / "plan.svg"
    words = "--draw --preset llama-1b --parallel.pipeline 4 --parallel.schedule interleaved --parallel.chunks 2 --ranks 8"
    words += f" --train.global-batch 16 --svg {image}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False False"
    assert done.stdout.splitlines()[0] == (
        "schedule interleaved; ranks of a pipeline: 4, chunks a rank: 2, microbatches on the fullest of 2 replicas: 8"
    )
    assert "layers of each stage, balanced by cost: 3 3 3 3 3 3 3 1; the heaviest, stage 0, has 1.03 times" in done.stdout
    assert "by formula, were all stages alike: 15.79%" in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines() if line.startswith("rank "))
    ElementTree.fromstring(image.read_text())


def test_one_rank_accumulates():
    one = plan()
    assert (one.cut, one.work, one.microbatches, one.replicas) == ((4,), (1.0,), 8, 1)
    assert one.timeline.bubble == pytest.approx(0)
    assert "bubble, simulated: 0.00%; by formula, were all stages alike: 0.00%" in describe(one, 100)


def test_even_stages_have_the_bubble_of_the_formula():
    even = plan("--parallel.pipeline", "4", "--vocabulary", "1", "--model.n-layers", "8")
    assert even.timeline.bubble == pytest.approx(3 / 11, rel=1e-2)
    assert even.timeline.step_s == pytest.approx(3 * 11, rel=1e-2)
    assert [even.timeline.peak_in_flight(rank) for rank in range(4)] == [4, 3, 2, 1]


def test_a_large_vocabulary_takes_layers_from_the_last_stage():
    layers = ("--model.n-layers", "12", "--parallel.pipeline", "3")
    assert plan(*layers, "--vocabulary", "1").cut == (4, 4, 4)
    assert plan(*layers, "--vocabulary", "4096").cut[-1] < 4
    assert sum(plan(*layers).work) == pytest.approx(3)


def test_costs_are_ratios():
    words = ("--parallel.pipeline", "2", "--parallel.schedule", "zero-bubble", "--costs")
    assert plan(*words, "2,4,2.4,1.6").timeline == plan(*words, "1,2,1.2,0.8").timeline
    assert "by formula" in describe(plan(*words, "1,2,1.2,0.8"), 100)
    assert "by formula" not in describe(plan(*words, "1,2,0.8,1.2"), 100)


def test_microbatches_that_do_not_divide_evenly_are_those_of_the_fullest_replica():
    assert plan("--ranks", "3").microbatches == 3  # of 8
    assert plan("--parallel.pipeline", "2", "--ranks", "6").microbatches == 3


def test_a_stated_cut_is_taken():
    stated = plan("--parallel.pipeline", "2", "--parallel.cut", "3", "1")
    assert stated.cut == (3, 1)
    assert "layers of each stage, as stated: 3 1; the heaviest, stage 0, has 1.25 times" in describe(stated, 100)


def test_every_preset_of_train_can_be_planned():
    assert set(dict(VOCABULARIES)) | {"tiny"} == set(PRESETS) == set(presets())
    assert presets()["llama-8b"]().vocabulary == 128256
    assert presets()["tiny"]().vocabulary == 2048
    assert configure(["--preset", "llama-1b", "--draw"]).model.n_layers == 22


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draw", "--vocabulary", "0"], "--vocabulary must be at least 1, not 0"),
        (["--draw", "--ranks", "-1"], "--ranks must be at least 1, not -1"),
        (["--ranks", "2,0"], "--ranks must be at least 1, not 0"),
        (["--tokens", "-1"], "--tokens must be at least 0, not -1"),
        (["--draw", "--ranks", "2,4"], "--draw is of one number of ranks, not of 2; write --ranks 2"),
        (["--draw", "--plot", "x.png"], "--plot draws speed over ranks and --draw a pipeline: write one of them"),
        (["--model.lora-rank", "8"], "--model.lora-rank: the predictions are of training whole models"),
        (["--draw", "--model.d-model", "7"], "--model.d-model 7 is not divisible by --model.n-heads 4"),
    ],
)
def test_settings_that_cannot_work(words, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        configure(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel.pipeline", "2", "--ranks", "7"], "--parallel.pipeline 2 does not divide 7 ranks"),
        (["--ranks", "9"], "9 ranks, but a step has only 8 microbatches"),
        (["--parallel.pipeline", "2", "--parallel.cut", "3", "3"], "--parallel.cut 3 3 adds up to 6 layers"),
        (["--parallel.pipeline", "2", "--parallel.chunks", "2"], "--parallel.chunks 2 needs --parallel.schedule interleaved"),
        (["--costs", "1,2"], "--costs 1,2: write four numbers, of F, B, I and W: 1,2,1,1"),
        (["--costs", "1,2,one,1"], "--costs 1,2,one,1: write four numbers"),
        (["--costs", "1,2,0,1"], "--costs 1,2,0,1: each must be above zero"),
        (
            ["--parallel.pipeline", "2", "--parallel.schedule", "interleaved", "--ranks", "6"],
            "--parallel.schedule interleaved needs a multiple of --parallel.pipeline 2 microbatches on each replica, not 3",
        ),
    ],
)
def test_layouts_that_cannot_work(words, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan(*words)


def said(capsys, prepare):
    with pytest.raises(SystemExit) as stop:
        run_alone(prepare)
    return stop.value.code, capsys.readouterr()


def test_a_command_alone_ends_as_the_others_do(capsys, monkeypatch):
    def refuse():
        raise FileError("no such file")

    assert said(capsys, lambda: lambda: print("done")) == (0, ("done\n", ""))
    assert said(capsys, refuse) == (FileError.code, ("", "mpilm: error: no such file\n"))
    assert said(capsys, lambda: refuse)[0] == FileError.code
    code, output = said(capsys, lambda: configure(["--help"]))
    assert code == 0
    assert "--parallel.pipeline" in output.out
    assert "With --draw instead: draw what each rank of a pipeline does" in " ".join(output.out.split())
    code, output = said(capsys, lambda: configure(["--no-such-flag"]))
    assert code == ConfigError.code
    assert "no-such-flag" in output.err


def test_an_image_that_cannot_be_written(monkeypatch, capsys):
    from mpilm.plan import prepare

    monkeypatch.setattr(sys, "argv", ["plan", "--draw", "--svg", "/no/such/folder/plan.svg"])
    code, output = said(capsys, prepare)
    assert code == FileError.code
    assert output.err == "mpilm: error: --svg /no/such/folder/plan.svg: cannot be written: No such file or directory\n"


# The ranking.


def ranked(tmp_path, *words):
    write(tmp_path / "m.json", machine(4))
    return rank(configure(["--machine", str(tmp_path / "m.json"), *words]))


def test_layouts_are_ranked_with_their_parts(tmp_path):
    lines = ranked(tmp_path, "--ranks", "4", "--tokens", "1e9")
    assert lines[0] == "2 million parameters, 16 sequences of 256 tokens a step (8 microbatches), float32"
    assert "a processor, cpu, 4 cores and 64 GiB; measured today with 4 ranks a node" in lines[1]
    assert lines[3].split() == ["layout", "step", "s", "tokens/s", "compute", "bubble", "talk", "update", "MiB", "a", "rank"]
    assert lines[4].startswith("  1  data 4, pipeline 1, zero 0")
    assert "best: no settings: it is the default" in lines
    assert any("244,141 steps, 1e+09 tokens, take" in line for line in lines)
    assert any("memory of the fullest rank: program 23 MiB, weights 8 MiB, moments 17 MiB" in line for line in lines)


def test_numbers_of_ranks_are_compared(tmp_path):
    lines = ranked(tmp_path, "--ranks", "1,2,4,64", "--plot", str(tmp_path / "curve.png"))
    assert [line.split()[0] for line in lines if ", zero " in line and "ranks:" not in line] == ["1", "2", "4"]
    assert any("64 ranks: no layout of 64 ranks works" in line and "make the batch 128" in line for line in lines)
    assert any(
        "from 1 to 2 ranks the speed grows 1.00 times only: computing itself: the cores of a node" in line for line in lines
    )
    assert any(line.startswith("mind: more than 4 ranks are on several nodes, and one was measured") for line in lines)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_calibration_it_is_said_how_to_make_one(tmp_path):
    with pytest.raises(FileError, match="no such file; measure this machine first: mpirun -n RANKS"):
        rank(configure(["--machine", str(tmp_path / "none.json"), "--ranks", "2"]))


def test_a_ranking_needs_no_torch(tmp_path):
    write(tmp_path / "m.json", machine(4))
    code = "import sys\nfrom mpilm.plan import configure, rank\n"
    code += f"rank(configure(['--ranks', '4', '--machine', '{tmp_path}/m.json']))"
    code += "\nprint('torch' in sys.modules, 'mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False False", done.stderr


def test_how_often_replicas_meet_is_planned_whatever_is_saved_when(tmp_path):
    assert ranked(tmp_path, "--ranks", "4", "--parallel.sync-every", "500")
