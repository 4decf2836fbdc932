"""A training job that is killed: gone on with on another number of ranks, it ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from helpers import LAUNCHER, OPEN_MPI, mpirun
from text import write_tokens

from mpilm.checkpoint.format import checkpoints
from mpilm.telemetry.metrics import read_rows

STEPS = 120
FLAGS = (
    "--model.n-layers", 1, "--model.d-model", 32, "--model.n-heads", 2, "--model.context-length", 16, "--model.dropout", 0.1,
    "--train.global-batch", 8, "--train.micro-batch", 2, "--train.steps", STEPS, "--train.threads", 1, "--train.device", "cpu",
    "--train.lr-schedule", "constant", "--checkpoint.every", 5, "--run.log-every", 1, "--run.eval-every", 40,
    "--run.eval-batches", 1, "--generate.max-tokens", 0,
)  # fmt: skip
OTHER = os.environ.get("MPILM_TEST_OTHER_PYTHON", "")
ROOT = Path(__file__).parents[2]


def command(data, run, *more):
    return ["-m", "mpilm.train", *map(str, FLAGS), "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def outcome(run):
    """The last checkpoint's bytes, and the numbers of every step."""
    newest = checkpoints(run / "checkpoints")[-1]
    files = {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    rows = [row for row in read_rows(run / "metrics.jsonl") if "event" not in row]
    return newest.name, files, [[row.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")] for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("whole") / "run"
    done = mpirun(0, *command(data, run))
    assert done.returncode == 0, done.stderr
    return outcome(run)


def members(token):
    """The processes started with this token in their environment: the launcher, its helpers, the ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def killed(data, run, after_s):
    """Start two ranks and kill every process of the job, `after_s` after the first checkpoint."""
    token = uuid.uuid4().hex
    environment = {**os.environ, **OPEN_MPI, "PYTHONPATH": str(ROOT), "MPILM_TEST_TOKEN": token}
    words = [str(LAUNCHER), "-n", "2", sys.executable, *command(data, run)]
    job = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 40
        while not checkpoints(run / "checkpoints"):
            assert job.poll() is None, f"the job ended by itself with {job.returncode}"
            assert time.monotonic() < deadline, "no checkpoint within 40 s"
            time.sleep(0.005)
        time.sleep(after_s)
    finally:
        for pid in members(token):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.wait(20)
    deadline = time.monotonic() + 20
    while members(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(token)


@pytest.mark.timeout(150)
def test_killed_on_two_ranks_and_gone_on_with_on_three(tmp_path, data, uninterrupted):
    if not LAUNCHER.exists():
        pytest.skip(f"there is no {LAUNCHER}")
    run, after_s = tmp_path / "run", random.random() * 0.5
    killed(data, run, after_s)
    left = checkpoints(run / "checkpoints")
    assert left
    assert left[-1].name < f"step-{STEPS:08d}", f"it was done {after_s:.3f} s after the first checkpoint"
    done = mpirun(3, *command(data, run))
    assert done.returncode == 0, f"killed {after_s:.3f} s after the first checkpoint\n{done.stderr}"
    assert "from step" in done.stdout
    assert outcome(run) == uninterrupted, f"killed {after_s:.3f} s after the first checkpoint"


@pytest.mark.skipif(not OTHER, reason="MPILM_TEST_OTHER_PYTHON names no interpreter with another MPI library")
@pytest.mark.timeout(150)
def test_another_mpi_library_gives_the_same_bits(tmp_path, data, uninterrupted):
    python = Path(OTHER)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI", "MPI"))},
        **OPEN_MPI,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    words = [str(python.with_name("mpirun")), "-n", "2", str(python), *command(data, tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == uninterrupted
    starts = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "start"]
    assert starts[0]["versions"]["mpi"] not in ("", "no MPI")
