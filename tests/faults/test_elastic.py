"""Ranks are lost, and the others go on, or end in good order: never a wrong number, never a hang. Wants Open MPI 5, here or in
the environment that MPILM_TEST_OTHER_PYTHON names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_jobs import read_outcome, run_serially, slow_case, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.telemetry.metrics import read_metrics

STEPS = 60
LOST_RANK = 89
POINTS = ("data.next", "forward", "backward", "reduce.before", "reduce.after", "optimizer")
SAVING = ("checkpoint.open", "checkpoint.write", "checkpoint.manifest", "eval")
PIPELINE = ("--parallel.pipeline", "2", "--parallel.cut", "1,1")


def _open_mpi(python: str) -> bool:
    mpirun = Path(python).with_name("mpirun")
    return mpirun.exists() and "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout


PYTHON = next((python for python in (sys.executable, os.environ.get("MPILM_TEST_OTHER_PYTHON", "")) if _open_mpi(python)), "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="there is no Open MPI; MPILM_TEST_OTHER_PYTHON may name a Python that has it"
)


def words(data, run, *more):
    return train_arguments(
        data, run, "--train.steps", STEPS, "--checkpoint.every", 25, "--run.eval-every", 30, "--model.n-layers", 2,
        "--fault.elastic", "true", "--fault.step-timeout", 20, *more,
    )  # fmt: skip


def hit(tmp_path, data, ranks, *faults, more=()):
    """The code and the output of a job."""
    injected = ";".join(faults)
    line = words(data, tmp_path / "run", *more)
    with start_job(ranks, line, tmp_path, python=PYTHON, flags=["--with-ft", "ulfm"], MPILM_FAULT=injected) as job:
        code = job.wait(90)
    assert job.output.count("fault: ") == len(faults), job.output
    return code, job.output


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    return run_serially(train_arguments(data, folder / "run", *words(data, folder / "run")[2:-4]), folder)


def assert_whole(run, uncut):
    """The same bits, and a row of the same numbers for every step."""
    assert read_outcome(run) == uncut
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert rows[-1]["event"] == "end"


@pytest.mark.parametrize(
    ("ranks", "rank", "point", "more"),
    [
        (3, 0, "backward", ("--parallel.zero", "2")),
        (3, 0, "eval", ()),
        (4, 1, "p2p.send", PIPELINE),
        *(slow_case(3, i % 3, point, ("--parallel.zero", str(i % 4))) for i, point in enumerate(POINTS)),
        *(slow_case(3, i % 3, point, ()) for i, point in enumerate(SAVING)),
        slow_case(4, 2, "optimizer", (*PIPELINE, "--parallel.zero", "3")),
        slow_case(4, 3, "reduce.after", ("--train.optimizer", "muon", "--parallel.zero", "1")),
    ],
)  # fmt: skip
def test_the_others_go_on(tmp_path, data, uncut, ranks, rank, point, more):
    step = "" if point.startswith("checkpoint") or point == "eval" else " step=33"
    rank = 0 if point in ("checkpoint.open", "checkpoint.manifest") else rank
    code, output = hit(tmp_path, data, ranks, f"kind=kill rank={rank}{step} point={point}", more=more)
    assert code == 0, output
    left = 2 if more[:2] == PIPELINE[:2] else ranks - 1
    assert re.search(rf"rank {rank} \(\S+ process \d+\) lost; {ranks - 1} ranks go on after step \d+", output), output
    assert f"mpilm 0.1.0: {left} rank" in output
    if "muon" in more:
        (tmp_path / "muon").mkdir()
        uncut = run_serially(words(data, tmp_path / "muon" / "run", "--fault.elastic", "false", *more[:2]), tmp_path / "muon")
    assert_whole(tmp_path / "run", uncut)


def test_one_after_the_other(tmp_path, data, uncut):
    faults = [f"kind=kill rank={rank} step={step} point=forward" for rank, step in ((0, 12), (3, 30), (1, 47))]
    code, output = hit(tmp_path, data, 4, *faults, more=("--parallel.zero", "2"))
    assert code == 0, output
    assert [int(n) for n in re.findall(r"lost; (\d) ranks? go", output)] == [3, 2, 1]
    assert_whole(tmp_path / "run", uncut)


@pytest.mark.slow
def test_two_at_once(tmp_path, data, uncut):
    """Of four replicas that hold everything."""
    faults = [f"kind=kill rank={rank} step=20 point=reduce.before" for rank in (1, 2)]
    code, output = hit(tmp_path, data, 4, *faults)
    assert code == 0, output
    assert_whole(tmp_path / "run", uncut)


@pytest.mark.parametrize(
    ("point", "more"), [slow_case("agree", ()), slow_case("give after=3", ()), ("give after=20", ("--parallel.zero", "1"))]
)
def test_another_one_while_the_state_is_brought_together(tmp_path, data, uncut, point, more):
    faults = ["kind=kill rank=1 step=20 point=forward", f"kind=kill rank=3 point=recover.{point}"]
    code, output = hit(tmp_path, data, 4, *faults, more=more)
    assert code == 0, output
    assert "lost; 2 ranks go on after step 20" in output
    assert_whole(tmp_path / "run", uncut)


@pytest.mark.parametrize(
    ("ranks", "more"), [slow_case(2, PIPELINE), (4, ("--parallel.zero", "1"))], ids=["a stage", "a shard and its copy"]
)
def test_what_nobody_else_holds_ends_the_job_in_good_order(tmp_path, data, uncut, ranks, more):
    faults = [f"kind=kill rank={rank} step=40 point=forward" for rank in ((1,) if ranks == 2 else (1, 2))]
    at_once = ("--checkpoint.asynchronous", "false")  # or step 40 may come before the disk has step 25
    code, output = hit(tmp_path, data, ranks, *faults, more=(*more, *at_once))
    assert code == LOST_RANK, output
    assert output.count("mpilm: error") == 1
    assert "the same command goes on from the newest checkpoint" in output
    assert "end" not in [row.get("event") for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000025"]
    with start_job(2, words(data, tmp_path / "run", "--fault.elastic", "false"), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(tmp_path / "run")[:2] == uncut[:2]


def test_an_mpi_that_cannot(tmp_path, data):
    with start_job(2, words(data, tmp_path / "run"), tmp_path) as job:
        assert job.wait() == 78
    assert "--fault.elastic needs an MPI that lets the survivors speak: Open MPI 5 under mpirun --with-ft ulfm" in job.output
