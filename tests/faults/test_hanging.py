"""Ranks that hang, die or leave: the job ends in time, with a name, and nothing of it is left."""

import os
import re
import signal
import time

import pytest
from training_jobs import logged_step, slow_case, start_job, train_arguments

WATCHDOG = 86
LIMIT_S = 3


def words(data, run, *more):
    return train_arguments(
        data, run, "--train.steps", 10**6, "--run.eval-every", 0, "--checkpoint.every", 0, "--model.n-layers", 2,
        "--fault.step-timeout", LIMIT_S, *more,
    )  # fmt: skip


def ended_by_watchdog(code, output):
    """MPICH's launcher may kill the aborting rank before it has left with its code, which it then says itself."""
    return code == WATCHDOG or (code == 9 and f"({WATCHDOG})" in output)


HANGS = {
    "loop": "waits for nobody; step 5, at guard/fault|waits for nobody; step 5, at ",
    "sleep": "waits for nobody; step 5, at ",
    "hold": "no word from it; the process is there .* probably native code keeps the interpreter lock",
    "stop": "no word from it; the process has been stopped",
}
LAYOUTS = {
    "data": ((), "forward", r"in (barrier|all_reduce|all_to_all|all_gather) on (data|world)"),
    "pipeline": (("--parallel.pipeline", "2", "--parallel.cut", "1,1"), "backward", r"in (send|receive) on pipeline .*tag \d+"),
}


@pytest.mark.parametrize(
    ("hang", "layout"),
    [
        ("loop", "data"),
        ("hold", "data"),
        ("stop", "pipeline"),
        slow_case("sleep", "data"),
        slow_case("stop", "data"),
        slow_case("sleep", "pipeline"),
    ],
)
def test_a_rank_that_hangs_is_named(tmp_path, data, hang, layout):
    run, (flags, point, call) = tmp_path / "run", LAYOUTS[layout]
    fault = f"kind={hang} rank=1 step=4 point={point} value={10**6 * (hang == 'sleep')}"
    with start_job(2, words(data, run, *flags), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_for(lambda: "fault: " in job.output)
        fired = time.monotonic()
        code = job.wait(40)
        took_s = time.monotonic() - fired
    assert ended_by_watchdog(code, job.output), f"{code}\n{job.output}"
    assert took_s < LIMIT_S + 15
    assert job.output.count("mpilm: watchdog:") == 1
    assert f"step 5 has lasted {LIMIT_S}" in job.output or f"step 5 has lasted {LIMIT_S + 1}" in job.output
    assert re.search(rf"  rank 1 on \S+ \(process {job_pid(job.output, 1)}\): ({HANGS[hang]})", job.output), job.output
    assert re.search(rf"  rank 0 on \S+ .*: waits \d+ s for rank 1 {call}", job.output), job.output
    assert ("Missing: rank 1." in job.output) == (hang in ("hold", "stop"))
    assert ("The others wait for rank 1." in job.output) == (hang in ("loop", "sleep"))
    (folder,) = (run / "watchdog").iterdir()
    assert str(folder) in job.output
    assert "rank-0000.json" in {path.name for path in folder.iterdir()}


def job_pid(output, rank):
    found = re.search(rf"  rank {rank} on \S+ \(process (\d+)\)", output)
    return found and found.group(1)


def test_a_rank_that_wakes_up_while_the_job_is_ended(tmp_path, data):
    """The report interrupts the sleep: nothing goes on for it, and the exit code is the watchdog's."""
    run = tmp_path / "run"
    fault = f"kind=hold rank=1 step=4 point=forward value={4 * LIMIT_S}"
    with start_job(2, words(data, run), tmp_path, MPILM_FAULT=fault) as job:
        assert ended_by_watchdog(job.wait(40), job.output), job.output
    assert "Missing: rank 1." in job.output
    assert logged_step(run) <= 5


def test_a_rank_may_have_work_of_its_own_when_the_others_are_done(tmp_path):
    program = (
        "import time; from mpilm.comm import mpi; from mpilm.data_parallel import launch; mpi.LEAVE_S = 1\n"
        "launch(lambda comm: comm.rank or (time.sleep(3), print('done with it', flush=True)))"
    )
    with start_job(2, ["-c", program], tmp_path) as job:
        assert job.wait(30) == 0, job.output
    assert "done with it" in job.output


@pytest.mark.slow
def test_a_rank_that_hangs_when_all_is_done_is_named(tmp_path, data):
    with start_job(
        2, words(data, tmp_path / "run", "--train.steps", 2), tmp_path, MPILM_FAULT="kind=stop rank=1 point=leaving"
    ) as job:
        assert ended_by_watchdog(job.wait(110), job.output), job.output
    assert re.search(r"watchdog: the end, all being done has lasted 6\d s, and 60 s is the limit", job.output), job.output
    assert "Missing: rank 1." in job.output
    assert re.search(r"  rank 0 on \S+ .*: waits \d+ s for rank 1 in barrier on world", job.output), job.output


@pytest.mark.slow
def test_a_rank_that_hangs_in_the_last_moment_of_mpi(tmp_path):
    """Nobody can say its name any more; the others do not wait for ever all the same."""
    program = (
        "import os, signal; from mpilm.comm import mpi; mpi.LEAVE_S = 3; world = mpi.mpi_world(); world.barrier()\n"
        "os.kill(os.getpid(), signal.SIGSTOP) if world.rank else mpi.finalize(0)"
    )
    with start_job(2, ["-c", program], tmp_path) as job:
        assert job.wait(30) not in (0, None), job.output


@pytest.mark.slow
def test_a_job_that_was_suspended_goes_on(tmp_path, data):
    """As by Ctrl-Z or scontrol suspend, for much longer than a step may last."""
    run = tmp_path / "run"
    with start_job(2, words(data, run), tmp_path) as job:
        job.wait_for(lambda: logged_step(run) >= 5)
        ranks = job.rank_processes()
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        time.sleep(6 * LIMIT_S)
        step = logged_step(run)
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        time.sleep(2 * LIMIT_S)
        assert logged_step(run) > step
        assert job.rank_processes() == ranks
        assert "watchdog" not in job.output


def test_three_ranks_and_the_one_in_the_middle(tmp_path, data):
    run = tmp_path / "run"
    fault = "kind=stop rank=1 step=3 point=optimizer"
    with start_job(3, words(data, run), tmp_path, MPILM_FAULT=fault) as job:
        assert ended_by_watchdog(job.wait(40), job.output), job.output
    assert "Missing: rank 1." in job.output
    assert len(re.findall(r"  rank [02] on .*: waits \d+ s for rank 1 in", job.output)) == 2


def test_a_slow_rank_is_named_and_nothing_ends(tmp_path, data):
    run = tmp_path / "run"
    fault = ";".join(f"kind=sleep rank=1 step={step} point=forward value=0.2" for step in range(1, 12))
    with start_job(2, words(data, run, "--train.steps", 12, "--run.log-every", 4), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait() == 0, job.output
    assert job.output.count("fault: sleep") == 11
    assert re.search(r"rank 1 computes [\d.]+ times as long as most", job.output)
    assert "watchdog" not in job.output


ENDS = {"kill": None, "segv": None, "exit": 3, "os_exit": 3, "raise": 1}
POINTS = ("data.next", "forward", "backward", "reduce.before", "reduce.after", "optimizer")


@pytest.mark.parametrize(
    ("end", "point"),
    [
        *((end, POINTS[i % len(POINTS)]) for i, end in enumerate(ENDS)),
        *(slow_case(end, POINTS[(i + j) % len(POINTS)]) for i, end in enumerate(ENDS) for j in range(1, len(POINTS))),
    ],
)
def test_a_rank_that_dies_ends_the_job(tmp_path, data, end, point):
    run = tmp_path / "run"
    fault = f"kind={end} rank=1 step=4 point={point}"
    with start_job(3, words(data, run, "--fault.step-timeout", 600), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_for(lambda: "fault: " in job.output or job.process.poll() is not None)
        fired = time.monotonic()
        code = job.wait(30)
        assert time.monotonic() - fired < 8  # 5 s, and what the processes need to go
    assert code != 0
    assert f"fault: {end} at {point} of step 4 on rank 1" in job.output
    if end == "raise":
        assert "ValueError: brought about on purpose" in job.output[job.output.index("mpilm: rank 1 of 3") :]
    assert not (run / "checkpoints").exists() or not any((run / "checkpoints").iterdir())


OWN_STDERR = """
import os, runpy, sys
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
os.dup2(os.open(sys.argv.pop(1) + rank, os.O_WRONLY | os.O_CREAT), 2)
runpy.run_module("mpilm.train", run_name="__main__", alter_sys=True)
"""


def test_a_rank_that_crashes_prints_its_stack_last(tmp_path, data):
    """Each rank writes into a file of its own: launchers do not always pass on what a crashing process has written."""
    errors = tmp_path / "stderr-"
    line = ["-c", OWN_STDERR, str(errors), *words(data, tmp_path / "run")[2:]]
    with start_job(3, line, tmp_path, MPILM_FAULT="kind=segv rank=1 step=4 point=forward") as job:
        assert job.wait(30) != 0
    said = (tmp_path / "stderr-1").read_text()
    assert said.startswith("fault: segv at forward of step 4 on rank 1\nFatal Python error: Segmentation fault\n")
    assert "in pass_by" in said
    assert "in train_step" in said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_nothing_is_left_of_a_job_whose_launcher_dies(tmp_path, data, how):
    run = tmp_path / "run"
    with start_job(2, words(data, run), tmp_path) as job:
        job.wait_for(lambda: logged_step(run) >= 3)
        os.kill(job.process.pid, how)
        job.process.wait(10)
        job.gone(10)  # fails where one is left
        assert job.members() == []
        assert logged_step(run) < 10**6  # it was killed, and had not come to its end


def test_the_drill_of_the_doctor_ends_the_job(tmp_path):
    with start_job(3, ["-m", "mpilm.doctor", "--megabytes", "1", "--drill", "true"], tmp_path) as job:
        job.wait_for(lambda: "drill" in job.output or job.process.poll() is not None)
        began = time.monotonic()
        assert job.wait(20) != 0
        assert time.monotonic() - began < 8
    assert "all checks passed" in job.output
    assert "killing rank 2" in job.output


def test_a_rank_without_memory_says_what_would_need_less(tmp_path, data):
    run = tmp_path / "run"
    more = ("--model.d-model", 256, "--model.context-length", 256, "--train.micro-batch", 4)
    with start_job(2, words(data, run, *more), tmp_path, MPILM_FAULT="kind=memory rank=1 step=2 point=data.next") as job:
        assert job.wait(30) != 0
    assert "fault: memory" in job.output
    said = (
        r"error on rank 1 of 2 on \S+: there is no more memory in step 3, with [\d,]+ MiB in use .*; predicted were [\d,]+ MiB"
    )
    assert re.search(f"{said}: program", job.output), job.output
    assert "--train.recompute block" in job.output
