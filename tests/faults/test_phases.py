"""A rank that stops in any phase of a run: the job ends within the stated limit, and the report names the rank."""

import re
import sys
import time
from itertools import product

import pytest
from helpers import OTHER_PYTHON
from training_jobs import PHASES, slow_case, start_job, train_arguments

EXIT_CODE, LIMIT_S, GRACE_S = 86, 3, 1
QUICK_WATCHDOG = (
    "import sys, runpy; from mpilm.launch import watchdog; "
    f"watchdog.GRACE_S = {GRACE_S}; watchdog.TICK_S = 0.2; watchdog.NOTICE_S = 2; watchdog.MIN_LIMIT_S = {LIMIT_S}; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
KINDS = {
    "stop": "no response; its process has been stopped",
    "hold": "no response; its process exists .* probably native code holds the interpreter lock",
    "sleep": "waits for no other rank",
    "kill": "",  # the launcher ends the job
}

SLOW_POINTS = ("load", "eval", "checkpoint.write", "sample")


def arguments(text, run):
    line = train_arguments(
        text, run, "--train.steps", 6, "--run.eval-every", 2, "--checkpoint.every", 2, "--generate.max-tokens", 4,
        "--data.tokenizer", "bpe:300", "--fault.step-timeout", LIMIT_S,
    )  # fmt: skip
    return ["-c", QUICK_WATCHDOG, *line[1:]]


def cells():
    """Yield phase, kind, ranks, the rank that stops, and the Python of an environment with its MPI library."""
    quick = {("start-up", "stop"), ("first evaluation", "sleep"), ("first save", "hold"), ("leaving", "stop")}
    for phase, kind in product(PHASES, KINDS):
        if phase != "start-up" or kind in ("stop", "kill"):
            yield (
                (phase, kind, 2, 1, sys.executable) if (phase, kind) in quick else slow_case(phase, kind, 2, 1, sys.executable)
            )
            yield slow_case(phase, kind, 4, 2, sys.executable)
            yield slow_case(phase, kind, 2, 0, sys.executable)
            yield slow_case(phase, kind, 2, 1, OTHER_PYTHON)
            yield slow_case(phase, kind, 4, 0, OTHER_PYTHON)


@pytest.mark.parametrize(("phase", "kind", "ranks", "rank", "python"), list(cells()))
def test_rank_that_stands_still_is_named(tmp_path, text, phase, kind, ranks, rank, python):
    if phase in ("tokenizer training", "report") and rank:
        rank = 0  # which alone does it
    fault = f"kind={kind} rank={rank} value={10**6 * (kind == 'sleep')} {PHASES[phase]}"
    variables = {"MPILM_FAULT": fault, "MPILM_CACHE": str(tmp_path)}
    with start_job(ranks, arguments(text, tmp_path / "run"), tmp_path, python=python, **variables) as job:
        job.wait_until(lambda: "fault: " in job.output or job.process.poll() is not None)
        fired = time.monotonic()
        code = job.wait(40)
        took_s = time.monotonic() - fired
    assert "fault: " in job.output
    assert took_s < LIMIT_S + 12, job.output  # 5 s, and what the processes need to exit
    if kind == "kill":
        assert code != 0
        return
    codes = (EXIT_CODE, 9, 137) if phase == "start-up" else (EXIT_CODE,)  # MPI starts with the interpreter lock held
    assert code in codes or f"({EXIT_CODE})" in job.output, f"{code}\n{job.output}"
    assert job.output.count("mpilm: watchdog:") == 1, job.output
    assert re.search(rf"  rank {rank} on \S+ \(process \d+\): {KINDS[kind]}", job.output), job.output
    verdict = f"The others wait for rank {rank}." if kind == "sleep" else f"Missing: rank {rank}."
    assert verdict in job.output, job.output


@pytest.mark.parametrize(
    ("phase", "kind", "rank"),
    [slow_case(*cell) for cell in product(PHASES, ("stop", "hold"), (0, 1)) if cell[:2] != ("start-up", "hold")],
)
def test_rank_is_named_within_a_minute_if_no_limit_is_stated(tmp_path, text, phase, kind, rank):
    if phase in ("tokenizer training", "report") and rank:
        pytest.skip("rank 0 alone does it")
    line, fault = arguments(text, tmp_path / "run")[2:], f"kind={kind} rank={rank} value=0 {PHASES[phase]}"
    line = ["-m", *line[: line.index("--fault.step-timeout")]]
    with start_job(2, line, tmp_path, MPILM_FAULT=fault, MPILM_CACHE=str(tmp_path)) as job:
        job.wait_until(lambda: "fault: " in job.output)
        fired = time.monotonic()
        job.wait_until(lambda: "mpilm: watchdog:" in job.output, 90)
        took_s = time.monotonic() - fired
        assert job.wait(40) != 0
    assert took_s < 60, job.output
    assert re.search(rf"  rank {rank} on \S+ \(process \d+\): {KINDS[kind]}", job.output), job.output


@pytest.mark.parametrize(
    ("seconds", "points"),
    [
        (4, ("load", "eval", "checkpoint.write", "sample")),
        *(slow_case(600, (point,)) for point in ("prepare", "load", "eval", "checkpoint.write", "sample")),
    ],
)
def test_rank_that_works_slowly_is_waited_for(tmp_path, text, seconds, points):
    fault = ";".join(f"kind=slow rank=1 value={seconds} point={point}" for point in points)
    with start_job(2, arguments(text, tmp_path / "run"), tmp_path, MPILM_FAULT=fault, MPILM_CACHE=str(tmp_path)) as job:
        assert job.wait(60 + 2 * seconds * len(points)) == 0, job.output
    assert job.output.count("fault: slow") == len(points)
    assert "watchdog" not in job.output
    assert re.search(r"mpilm: rank 0 has waited [2-4] s for rank 1 in \w+ on world \(call \d+\), in start", job.output), (
        job.output
    )


@pytest.mark.parametrize("command", ["generate", *map(slow_case, ("evaluate", "prepare", "verify", "doctor"))])
def test_every_command_names_a_rank_that_stands_still(tmp_path, command):
    with start_job(
        3, ["-c", QUICK_WATCHDOG, f"mpilm.{command}"], tmp_path, MPILM_FAULT="kind=stop rank=2 point=command"
    ) as job:
        code = job.wait(40)
    assert code == EXIT_CODE or f"({EXIT_CODE})" in job.output, f"{code}\n{job.output}"
    assert "mpilm: watchdog: no response from rank 2 for 3 s in start; the limit is 3 s" in job.output
    assert re.search(rf"  rank 2 on \S+ \(process \d+\): {KINDS['stop']}", job.output), job.output
