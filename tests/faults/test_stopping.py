"""Runs that are asked to stop: all ranks save after the same step and exit with 75, and the same command resumes."""

import os
import signal
import time

import pytest
from training_jobs import logged_step, read_outcome, run_serially, sleep_in_steps, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.checkpoint.verify import verify_checkpoint

STEPS, LAST_QUICK = 60, 5  # steps, and how many of a start are not slowed down
PREEMPTED = 75


def arguments(data, run, *more):
    return train_arguments(data, run, "--train.steps", STEPS, "--run.eval-every", 20, "--checkpoint.every", 1000, *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run_serially(arguments(data, folder / "run"), folder)


def do_nothing(job, run):
    """Flags or environment of the start are the request."""


STOPS = {  # how a start is asked to stop, its flags and environment, and the reason it prints
    "SIGUSR1 to one rank": (lambda job, run: os.kill(job.rank_processes()[1], signal.SIGUSR1), (), {}, "received SIGUSR1"),
    "SIGTERM to one rank": (lambda job, run: os.kill(job.rank_processes()[0], signal.SIGTERM), (), {}, "received SIGTERM"),
    "SIGUSR1 to the launcher": (lambda job, run: os.kill(job.process.pid, signal.SIGUSR1), (), {}, "received SIGUSR1"),
    "stop file": (lambda job, run: (run / "stop").touch(), (), {}, "found a stop file"),
    "time limit": (do_nothing, ("--run.time-limit", 1), {}, "reached run.time-limit"),
    "end of the SLURM job": (do_nothing, (), {"SLURM_JOB_END_TIME": 31}, "its batch job ends"),  # half a minute is kept
}


def test_run_stopped_in_every_way_and_resumed_equals_one_never_stopped(tmp_path, data, uninterrupted):
    """One start after the other, each on the checkpoint of the one before; the last one on three ranks."""
    run, step = tmp_path / "run", 0
    for name, (stop, flags, variables, reason) in STOPS.items():
        fault = sleep_in_steps(step + LAST_QUICK, STEPS, 0.15)
        ends = {key: str(int(time.time()) + seconds) for key, seconds in variables.items()}
        with start_job(2, arguments(data, run, *flags), tmp_path, MPILM_FAULT=fault, **ends) as job:
            job.wait_until(lambda since=step: logged_step(run) > since)
            stop(job, run)
            assert job.wait(30) == PREEMPTED, f"{name}: {job.output}"
        newest = list_checkpoints(run / "checkpoints")[-1]
        verify_checkpoint(newest)
        before, step = step, int(newest.name.split("-")[1])
        assert before < step < STEPS, f"{name}: {job.output}"
        assert logged_step(run) == step
        message = f"mpilm: stopped after step {step} of {STEPS}: {reason}; saved, and the same command resumes"
        assert job.output.count("mpilm: stopped") == 1
        assert message in job.output
        assert "Traceback" not in job.output
        assert not (run / "stop").exists()
        assert not (run / "lock.json").exists()
    with start_job(3, arguments(data, run), tmp_path) as job:
        assert job.wait() == 0, job.output
    outcome = read_outcome(run)
    assert outcome[1] == uninterrupted[1]
    assert [row[:3] for row in outcome[2] if row[1]] == [row[:3] for row in uninterrupted[2] if row[1]]


def test_single_process_stopped_by_sigterm_saves(tmp_path, data):
    run = tmp_path / "run"
    with start_job(0, arguments(data, run), tmp_path, MPILM_FAULT=sleep_in_steps(5, STEPS, 0.1, rank=0)) as job:
        job.wait_until(lambda: logged_step(run) >= 5)
        job.process.terminate()
        assert job.wait(20) == PREEMPTED, job.output
    assert len(list_checkpoints(run / "checkpoints")) == 1


def test_time_limit_starts_no_step_that_would_exceed_it(tmp_path, data):
    """Steps of half a second within a limit of three; so many that the limit would be exceeded by far."""
    run = tmp_path / "run"
    limit = ("--run.time-limit", 3)
    with start_job(2, arguments(data, run, *limit), tmp_path, MPILM_FAULT=sleep_in_steps(2, 40, 0.5)) as job:
        job.wait_until(lambda: logged_step(run) >= 1)
        assert job.wait(30) == PREEMPTED, job.output
    assert "reached run.time-limit; saved" in job.output
    assert 2 <= logged_step(run) <= 7  # step 1 and six steps of half a second
    assert len(list_checkpoints(run / "checkpoints")) == 1


def test_sigterm_to_the_launcher_leaves_the_older_checkpoint(tmp_path, data):
    """mpirun leaves its ranks no time to save; README names the signal that does."""
    run = tmp_path / "run"
    fault = sleep_in_steps(10, STEPS, 0.1)
    with start_job(2, arguments(data, run, "--checkpoint.every", 5), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_until(lambda: list_checkpoints(run / "checkpoints"))
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.wait(20) != 0
    verify_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def test_second_job_in_a_run_folder_is_refused_and_a_later_one_is_not(tmp_path, data):
    """A killed job leaves its lock file, which the later job must not mind."""
    run, endless = tmp_path / "run", ("--train.steps", 10**6)
    with start_job(2, arguments(data, run, *endless), tmp_path) as first:
        first.wait_until(lambda: logged_step(run) >= 1)
        with start_job(2, arguments(data, run, *endless), tmp_path) as second:
            assert second.wait(30) == 78, second.output
        assert second.output.count("mpilm: error") == 1
        assert f"--run.dir {run} is in use: process {first.rank_processes()[0]} on " in second.output
        step = logged_step(run)
        first.wait_until(lambda: logged_step(run) > step)
        first.kill()
    with start_job(0, arguments(data, run), tmp_path) as third:
        third.wait_until(lambda: logged_step(run) >= 5)
