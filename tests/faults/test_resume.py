"""A training job that is killed: gone on with on another number of ranks, it ends with the same bits."""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from helpers import OPEN_MPI, mpirun
from training_jobs import ROOT, read_outcome, run_serially, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.telemetry.metrics import read_metrics

STEPS = 120
OTHER = os.environ.get("MPILM_TEST_OTHER_PYTHON", "")


def words(data, run):
    return train_arguments(data, run, "--train.steps", STEPS, "--checkpoint.every", 5, "--run.eval-every", 40)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    return run_serially(words(data, folder / "run"), folder)


@pytest.mark.timeout(150)
def test_killed_on_two_ranks_and_gone_on_with_on_three(tmp_path, data, uninterrupted):
    run, after_s = tmp_path / "run", random.random() * 0.5
    with start_job(2, words(data, run), tmp_path) as job:
        job.wait_for(lambda: list_checkpoints(run / "checkpoints"))
        time.sleep(after_s)
    left = list_checkpoints(run / "checkpoints")
    assert left
    assert left[-1].name < f"step-{STEPS:08d}", f"it was done {after_s:.3f} s after the first checkpoint"
    done = mpirun(3, *words(data, run))
    assert done.returncode == 0, f"killed {after_s:.3f} s after the first checkpoint\n{done.stderr}"
    assert "from step" in done.stdout
    assert read_outcome(run) == uninterrupted, f"killed {after_s:.3f} s after the first checkpoint"


@pytest.mark.skipif(
    not Path(OTHER or ".").with_name("mpirun").exists(),
    reason="MPILM_TEST_OTHER_PYTHON names no Python with another MPI library",
)
@pytest.mark.timeout(150)
def test_another_mpi_library_gives_the_same_bits(tmp_path, data, uninterrupted):
    python = Path(OTHER)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI", "MPI"))},
        **OPEN_MPI,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    line = [str(python.with_name("mpirun")), "-n", "2", str(python), *words(data, tmp_path / "run")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert read_outcome(tmp_path / "run") == uninterrupted
    starts = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "start"]
    assert starts[0]["versions"]["mpi"] not in ("", "no MPI")
