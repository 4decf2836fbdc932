"""Ranks that hang, die or run out of memory: the job ends in time, names the rank, and leaves no process."""

import os
import re
import signal
import time

import pytest
from training_jobs import logged_step, sleep_in_steps, slow_case, start_job, train_arguments

EXIT_CODE, LIMIT_S, GRACE_S = 86, 2, 1
QUICK_WATCHDOG = (
    "import sys, runpy; from mpilm.launch import watchdog; "
    f"watchdog.GRACE_S = {GRACE_S}; watchdog.TICK_S = 0.2; sys.argv.pop(0); "
    "runpy.run_module('mpilm.train', run_name='__main__', alter_sys=True)"
)


def arguments(data, run, *more):
    return train_arguments(
        data, run, "--train.steps", 10**6, "--run.eval-every", 0, "--checkpoint.every", 0, "--model.n-layers", 2,
        "--fault.step-timeout", LIMIT_S, *more,
    )  # fmt: skip


def quick_arguments(data, run, *more):
    """Return the arguments of a run whose watchdog waits less for other ranks."""
    return ["-c", QUICK_WATCHDOG, *arguments(data, run, *more)[1:]]


def assert_ended_by_watchdog(job, limit_s=40):
    """MPICH's launcher may kill the aborting rank before it has exited with its code, which it then prints."""
    code = job.wait(limit_s)
    assert code == EXIT_CODE or (code == 9 and f"({EXIT_CODE})" in job.output), f"{code}\n{job.output}"


NO_RESPONSE = "no response; its process exists .* probably native code holds the interpreter lock"
HANGS = {
    "loop": "waits for no other rank; step 5, at ",
    "sleep": "waits for no other rank; step 5, at ",
    "hold": NO_RESPONSE,
    "stop": r"no response; its process has been stopped",
}
DATA_CALL = r"in (barrier|all_reduce|all_to_all|all_gather) on (data|world)"
PIPELINE_CALL = r"in (send|receive) on pipeline .*tag \d+"
PIPELINE = ("--parallel.pipeline", 2, "--parallel.cut", "1,1")
GLOO = ("--train.device-transport", "torch", "--parallel.zero", 3)  # tensors do not travel over MPI


@pytest.mark.parametrize(
    ("hang", "ranks", "flags", "point", "call"),
    [
        ("loop", 2, (), "forward", DATA_CALL),
        ("stop", 3, (), "optimizer", DATA_CALL),
        ("hold", 2, PIPELINE, "backward", PIPELINE_CALL),
        ("stop", 3, GLOO, "backward", r"in (all_to_all|all_gather) on data"),
        slow_case("loop", 2, (*GLOO[:2], *PIPELINE), "backward", PIPELINE_CALL),
        slow_case("sleep", 2, (), "forward", DATA_CALL),
        slow_case("hold", 2, (), "forward", DATA_CALL),
        slow_case("stop", 2, PIPELINE, "backward", PIPELINE_CALL),
    ],
)
def test_hanging_rank_is_named_and_the_job_ends(tmp_path, data, hang, ranks, flags, point, call):
    run = tmp_path / "run"
    fault = f"kind={hang} rank=1 step=4 point={point} value={10**6 * (hang == 'sleep')}"
    with start_job(ranks, quick_arguments(data, run, *flags), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_until(lambda: "fault: " in job.output)
        fired = time.monotonic()
        assert_ended_by_watchdog(job)
        assert time.monotonic() - fired < LIMIT_S + 15
    output = job.output
    assert output.count("mpilm: watchdog:") == 1
    assert re.search(
        rf"(step 5 has lasted|no response from rank 1 for) [{LIMIT_S}{LIMIT_S + 1}] s( in step 5)?; the limit is {LIMIT_S} s",
        output,
    ), output
    (pid,) = re.findall(r"  rank 1 on \S+ \(process (\d+)\)", output)
    assert re.search(rf"  rank 1 on \S+ \(process {pid}\): {HANGS[hang]}", output), output
    others = [rank for rank in range(ranks) if rank != 1]
    assert all(re.search(rf"  rank {rank} on \S+ .*: waits \d+ s for rank 1 {call}", output) for rank in others), output
    assert ("Missing: rank 1." in output) == (hang in ("hold", "stop"))
    assert ("The others wait for rank 1." in output) == (hang in ("loop", "sleep"))
    (folder,) = (run / "watchdog").iterdir()
    assert str(folder) in output
    assert {f"rank-{rank:04d}.json" for rank in others} <= {path.name for path in folder.iterdir()}


def test_hanging_rank_that_wakes_up_while_the_job_ends_does_nothing_more(tmp_path, data):
    """The report interrupts its sleep; the rank must not continue, and the exit code is the watchdog's."""
    run = tmp_path / "run"
    fault = f"kind=hold rank=1 step=4 point=forward value={6 * LIMIT_S}"
    with start_job(2, quick_arguments(data, run), tmp_path, MPILM_FAULT=fault) as job:
        assert_ended_by_watchdog(job)
    assert "Missing: rank 1." in job.output
    assert logged_step(run) <= 5


def test_rank_with_work_left_at_the_end_is_waited_for(tmp_path):
    program = (
        "import time; from mpilm.comm import mpi; from mpilm.data_parallel import launch; mpi.FINALIZE_TIMEOUT_S = 1\n"
        "launch(lambda comm: comm.rank or (time.sleep(2), print('finished', flush=True)))"
    )
    with start_job(2, ["-c", program], tmp_path) as job:
        assert job.wait(30) == 0, job.output
    assert "finished" in job.output


@pytest.mark.slow
def test_rank_that_hangs_at_the_exit_barrier_is_named(tmp_path, data):
    fault = "kind=stop rank=1 point=leaving"
    with start_job(2, arguments(data, tmp_path / "run", "--train.steps", 2), tmp_path, MPILM_FAULT=fault) as job:
        assert_ended_by_watchdog(job, 110)
    assert "watchdog: no response from rank 1 for 2 s in the exit barrier; the limit is 2 s" in job.output
    assert "Missing: rank 1." in job.output
    assert re.search(r"  rank 0 on \S+ .*: waits \d+ s for rank 1 in barrier on world", job.output), job.output


@pytest.mark.slow
def test_rank_that_hangs_in_mpi_finalize_does_not_keep_the_others(tmp_path):
    """No message can name it any more."""
    program = (
        "import os, signal; from mpilm.comm import mpi; mpi.FINALIZE_TIMEOUT_S = 3\n"
        "if mpi.mpi_world().rank: mpi.MPI.Finalize = lambda: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "mpi.finalize(0)"
    )
    with start_job(2, ["-c", program], tmp_path) as job:
        assert job.wait(30) not in (0, None), job.output


@pytest.mark.parametrize("limits", [2, slow_case(9)])
def test_suspended_job_continues(tmp_path, data, limits):
    """As by Ctrl-Z or scontrol suspend, for longer than a step may last."""
    run = tmp_path / "run"
    with start_job(2, arguments(data, run), tmp_path) as job:
        job.wait_until(lambda: logged_step(run) >= 5)
        ranks = job.rank_processes()
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        time.sleep(limits * LIMIT_S)
        step = logged_step(run)
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        time.sleep(1.5 * LIMIT_S)
        assert logged_step(run) > step
        assert job.rank_processes() == ranks
        assert "watchdog" not in job.output


def test_slow_rank_is_named_and_the_run_continues(tmp_path, data):
    flags = ("--train.steps", 16, "--run.log-every", 4)
    fault = sleep_in_steps(1, 15, 0.1)
    with start_job(2, arguments(data, tmp_path / "run", *flags), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait() == 0, job.output
    assert job.output.count("fault: sleep") == 15
    assert re.search(r"rank 1 computes [\d.]+ times as long as the other rank", job.output)
    assert "watchdog" not in job.output


# Ranks that die.

DEATHS = [
    ("kill", "data.next", ()),
    ("segv", "forward", ()),
    ("raise", "reduce.after", ()),
    ("os_exit", "reduce.before", ()),
    ("kill", "backward", GLOO),
    ("raise", "backward", GLOO),
]
MORE_DEATHS = [
    (end, point, ())
    for end in ("kill", "segv", "raise", "os_exit", "exit")
    for point in ("data.next", "forward", "backward", "reduce.before", "reduce.after", "optimizer")
    if (end, point, ()) not in DEATHS
]
OWN_STDERR = """
import os, runpy, sys
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
os.dup2(os.open(sys.argv.pop(1) + rank, os.O_WRONLY | os.O_CREAT), 2)
runpy.run_module("mpilm.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(("end", "point", "flags"), [*DEATHS, *(slow_case(*death) for death in MORE_DEATHS)])
def test_dying_rank_ends_the_job(tmp_path, data, end, point, flags):
    """Each rank has a file for its stderr: launchers do not always pass on what a crashing process has written. The other rank
    writes nothing."""
    run, errors = tmp_path / "run", tmp_path / "stderr-"
    line = ["-c", OWN_STDERR, str(errors), *arguments(data, run, "--fault.step-timeout", 600, *flags)[2:]]
    with start_job(2, line, tmp_path, MPILM_FAULT=f"kind={end} rank=1 step=4 point={point}") as job:
        stderr = tmp_path / "stderr-1"
        job.wait_until(lambda: (stderr.exists() and stderr.read_text()) or job.process.poll() is not None)
        fired = time.monotonic()
        code = job.wait(30)
        assert time.monotonic() - fired < 8  # 5 s, and what the processes need to exit
    assert code != 0
    text = stderr.read_text()
    assert f"fault: {end} at {point} of step 4 on rank 1" in text
    if end == "raise":
        assert "ValueError: injected by MPILM_FAULT" in text[text.index("mpilm: rank 1 of 2") :]
    assert "mpilm" not in (tmp_path / "stderr-0").read_text()
    if end == "segv":
        assert "on rank 1\nFatal Python error: Segmentation fault\n" in text
        assert "in maybe_fire" in text
        assert "in train_step" in text
    assert not (run / "checkpoints").exists() or not any((run / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_dying_launcher_leaves_no_process(tmp_path, data, number):
    run = tmp_path / "run"
    with start_job(2, arguments(data, run), tmp_path) as job:
        job.wait_until(lambda: logged_step(run) >= 3)
        os.kill(job.process.pid, number)
        job.process.wait(10)
        job.wait_for_processes(10)
        assert job.processes() == []
        assert logged_step(run) < 10**6


def test_drill_of_the_doctor_ends_the_job(tmp_path):
    with start_job(3, ["-m", "mpilm.doctor", "--megabytes", "1", "--drill", "true"], tmp_path) as job:
        job.wait_until(lambda: "killing rank 2" in job.output or job.process.poll() is not None)
        start = time.monotonic()
        assert job.wait(20) != 0
        assert time.monotonic() - start < 8
    assert "all checks passed" in job.output
    assert "killing rank 2" in job.output


def test_rank_out_of_memory_names_what_needs_less(tmp_path, data):
    flags = ("--model.d-model", 256, "--model.context-length", 256, "--train.micro-batch", 4, "--fault.step-timeout", 20)
    fault = "kind=memory rank=1 step=2 point=data.next"
    with start_job(2, arguments(data, tmp_path / "run", *flags), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait(30) != 0
    assert "fault: memory" in job.output
    message = r"error on rank 1 of 2 on \S+: out of memory in step 3, with [\d,]+ MiB in use.*; predicted: [\d,]+ MiB: program"
    assert re.search(message, job.output), job.output
    assert "--train.recompute block" in job.output
