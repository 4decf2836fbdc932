"""Checkpoints under fire: runs killed at any time and while saving, full disks; the same command resumes to the same bits.

tests/ranks/test_checkpoint.py and tests/unit/test_format.py have every way in which a write can fail and a file be damaged.
"""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from helpers import HAS_OTHER_MPI, OTHER_PYTHON, read_metrics
from training_jobs import read_outcome, run_serially, sleep_in_steps, slow_case, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.checkpoint.verify import find_newest_valid

STEPS = 48
SYNCHRONOUS = ("--checkpoint.asynchronous", "false")
DISK_FULL = "could not be written: No space left on device; older checkpoints are unchanged (on rank 1)"


def arguments(data, run, *more):
    return train_arguments(data, run, "--train.steps", STEPS, "--checkpoint.every", 4, "--run.eval-every", 24, *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run_serially(arguments(data, folder / "run"), folder)


def newest_reported(output):
    """Return the step of the newest checkpoint that the run has reported as saved."""
    return max((line.rsplit("step-", 1)[1] for line in output.splitlines() if line.startswith("saved ")), default="")


def start_until_killed(tmp_path, data, point, rank, flags):
    """Start a run that is killed while it saves its second checkpoint; an old or the new one must be complete."""
    run = tmp_path / "run"
    fault = f"kind=kill rank={rank} point=checkpoint.{point} after=1"
    with start_job(2, arguments(data, run, *flags), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait(40) != 0
        assert f"fault: kill at checkpoint.{point}" in job.output
    reported = newest_reported(job.output)
    found, broken = find_newest_valid(run / "checkpoints")
    assert not broken
    assert found is None or found.name >= f"step-{reported}"
    assert found is not None or not reported


@pytest.mark.parametrize(
    "kills",
    [
        [("write", 1, ()), ("rename", 0, ()), ("fsync", 1, SYNCHRONOUS)],
        slow_case([(point, 0, ()) for point in ("open", "write", "fsync", "manifest", "cleanup")]),
        slow_case([("write", 1, SYNCHRONOUS)]),
    ],
    ids=lambda kills: " ".join(point for point, *_ in kills),
)
def test_run_killed_while_saving_and_at_any_time_resumes_to_the_same_bits(tmp_path, data, uninterrupted, kills):
    """One start after the other, each on what the one before has left; the last one on three ranks."""
    run, delay_s = tmp_path / "run", random.random() * 0.3
    with start_job(2, arguments(data, run), tmp_path, MPILM_FAULT=sleep_in_steps(6, STEPS, 0.05)) as job:
        job.wait_until(lambda: list_checkpoints(run / "checkpoints"))
        time.sleep(delay_s)
        job.kill()
    assert list_checkpoints(run / "checkpoints")[-1].name < f"step-{STEPS:08d}", f"complete {delay_s:.3f} s after the first"
    for point, rank, flags in kills:
        start_until_killed(tmp_path, data, point, rank, flags)
    with start_job(3, arguments(data, run), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert "from step" in job.output
    assert read_outcome(run) == uninterrupted, f"killed {delay_s:.3f} s after the first checkpoint"
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_full_disk_on_one_rank_ends_the_run_or_is_only_reported(tmp_path, data, uninterrupted):
    """With checkpoint.on-error stop, the default, the run keeps what it has; with warn it continues and saves the next one."""
    run, fault = tmp_path / "run", "kind=enospc rank=1 point=checkpoint.write after=1"
    with start_job(2, arguments(data, run), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait(40) == 74, job.output
    assert job.output.count("mpilm: error") == 1
    assert DISK_FULL in job.output
    assert list_checkpoints(run / "checkpoints")
    assert find_newest_valid(run / "checkpoints")[1] == {}
    with start_job(2, arguments(data, run, "--checkpoint.on-error", "warn"), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait() == 0, job.output
    assert "not saved: " in job.output
    assert DISK_FULL in job.output
    assert read_outcome(run)[1] == uninterrupted[1]


@pytest.mark.slow
def test_checkpoint_folder_moved_away_while_saving_ends_the_run(tmp_path, data):
    run, fault = tmp_path / "run", "kind=sleep rank=0 point=checkpoint.manifest after=2 value=2"
    with start_job(2, arguments(data, run), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_until(lambda: "fault: " in job.output)
        (run / "checkpoints").rename(tmp_path / "moved")
        assert job.wait(40) == 74, job.output
    assert job.output.count("mpilm: error") == 1
    assert "could not be written: not all ranks see its folder; older checkpoints are unchanged" in job.output
    assert find_newest_valid(tmp_path / "moved")[0] is not None


def test_file_system_too_small_for_a_checkpoint_ends_the_run(tmp_path, data):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with start_job(2, arguments(data, small / "run"), tmp_path) as job:
            assert job.wait(40) == 74, job.output
        assert "needs 0." in job.output
        assert "MiB are free there; older checkpoints are unchanged" in job.output
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.skipif(not HAS_OTHER_MPI, reason="MPILM_TEST_OTHER_PYTHON names no Python with another MPI library")
def test_other_mpi_library_gives_the_same_bits(tmp_path, data, uninterrupted):
    from mpilm.comm.mpi import mpi_library_name

    path = f"{Path(OTHER_PYTHON).parent}:{os.environ['PATH']}"
    with start_job(2, arguments(data, tmp_path / "run"), tmp_path, python=OTHER_PYTHON, PATH=path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(tmp_path / "run") == uninterrupted
    (start,) = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "start"]
    assert start["versions"]["mpi"] not in ("", "no MPI", mpi_library_name())
