"""Runs that are asked to stop: all ranks save at the same step, end with 75, and go on as if nothing had been."""

import os
import signal
import time

import pytest
from training_jobs import logged_step, read_outcome, run_serially, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.checkpoint.verify import verify_checkpoint

STEPS = 300
ENDED = 75


def words(data, run, *more):
    return train_arguments(data, run, "--train.steps", STEPS, "--run.eval-every", 100, "--checkpoint.every", 1000, *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    return run_serially(words(data, folder / "run"), folder)


WAYS = {
    "SIGUSR1 to one rank": lambda job, run: os.kill(job.rank_processes()[1], signal.SIGUSR1),
    "SIGTERM to one rank": lambda job, run: os.kill(job.rank_processes()[0], signal.SIGTERM),
    "SIGUSR1 to the launcher": lambda job, run: os.kill(job.process.pid, signal.SIGUSR1),
    "stop file": lambda job, run: (run / "stop").touch(),
}
SAID = {"stop file": "its stop file", "SIGTERM to one rank": "SIGTERM"}


@pytest.mark.parametrize("way", WAYS)
def test_it_stops_and_goes_on(tmp_path, data, uninterrupted, way):
    run = tmp_path / "run"
    with start_job(2, words(data, run), tmp_path) as job:
        job.wait_for(lambda: logged_step(run) >= 20)
        WAYS[way](job, run)
        assert job.wait(20) == ENDED, job.output
    (saved,) = list_checkpoints(run / "checkpoints")
    verify_checkpoint(saved)
    step = int(saved.name.split("-")[1])
    assert 20 <= step < STEPS
    assert logged_step(run) == step
    asked = SAID.get(way, "SIGUSR1")
    said = f"mpilm: stopped after step {step} of {STEPS}, as {asked} asked; saved, and the same command goes on"
    assert job.output.count("mpilm: stopped") == 1
    assert said in job.output
    assert "Traceback" not in job.output
    assert not (run / "stop").exists()
    assert not (run / "lock.json").exists()
    with start_job(3, words(data, run), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(run)[1] == uninterrupted[1]
    assert [row for row in read_outcome(run)[2] if row[1]] == [row for row in uninterrupted[2] if row[1]]


def test_one_rank_without_a_launcher(tmp_path, data):
    run = tmp_path / "run"
    with start_job(0, words(data, run), tmp_path) as job:
        job.wait_for(lambda: logged_step(run) >= 5)
        job.process.terminate()
        assert job.wait(20) == ENDED, job.output
    assert len(list_checkpoints(run / "checkpoints")) == 1


def test_slices_of_time_make_the_whole_run(tmp_path, data, uninterrupted):
    run, slices = tmp_path / "run", 0
    while True:
        with start_job(2, words(data, run, "--run.time-limit", 1), tmp_path) as job:
            began = time.monotonic()
            code = job.wait(40)
            slices += 1
        if code == 0:
            break
        assert code == ENDED, job.output
        assert "as run.time-limit asked" in job.output
        assert time.monotonic() - began < 12  # starting and leaving included
        assert slices < 20
    assert slices > 1
    assert read_outcome(run)[1] == uninterrupted[1]


def test_no_step_is_started_that_cannot_be_finished(tmp_path, data):
    """Of a second each, within a limit of five; so many that the limit would be passed by far."""
    run = tmp_path / "run"
    fault = ";".join(f"kind=sleep rank=1 step={step} point=forward value=1" for step in range(2, 40))
    with start_job(2, words(data, run, "--run.time-limit", 5), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_for(lambda: logged_step(run) >= 1)
        began = time.monotonic()
        assert job.wait(30) == ENDED, job.output
        assert time.monotonic() - began < 5 + 2  # the limit began before step 1; what the processes need to go
    assert "as run.time-limit asked; saved" in job.output
    assert 2 <= logged_step(run) <= 7
    assert len(list_checkpoints(run / "checkpoints")) == 1


def test_sigterm_to_the_launcher_leaves_the_older_checkpoint(tmp_path, data, uninterrupted):
    """It gives the ranks no time under mpirun; README says which signal does."""
    run = tmp_path / "run"
    with start_job(2, words(data, run, "--checkpoint.every", 20), tmp_path) as job:
        job.wait_for(lambda: list_checkpoints(run / "checkpoints"))
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.wait(20) != 0
    verify_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    with start_job(2, words(data, run, "--checkpoint.every", 20), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(run)[1] == uninterrupted[1]


def test_the_end_of_a_slurm_job_is_known(tmp_path, data):
    run = tmp_path / "run"
    soon = str(int(time.time()) + 35)  # of which half a minute is kept free
    with start_job(2, words(data, run, "--train.steps", 10**6), tmp_path, SLURM_JOB_END_TIME=soon) as job:
        assert job.wait(40) == ENDED, job.output
    assert "as the end of the SLURM job asked" in job.output


def test_a_second_job_on_the_folder_is_refused(tmp_path, data):
    run, long = tmp_path / "run", ("--train.steps", 10**6)
    with start_job(2, words(data, run, *long), tmp_path) as first:
        first.wait_for(lambda: logged_step(run) >= 1)
        with start_job(2, words(data, run, *long), tmp_path) as second:
            assert second.end(30) == 78, second.output
        assert second.output.count("mpilm: error") == 1
        assert f"--run.dir {run} is in use: process {first.ranks()[0]} on " in second.output
        first.wait_for(lambda: logged_step(run) >= 10)
        first.kill()
    with start_job(2, words(data, run), tmp_path) as third:  # what a killed job leaves is no obstacle
        third.wait_for(lambda: logged_step(run) >= 5)
