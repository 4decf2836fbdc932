"""Networks that are slow, lose packets or are disconnected, between emulated hosts (scripts/hosts-here)."""

import os
import re
import shutil
import signal
import sys
import time
from itertools import product

import pytest
from helpers import LAUNCHER, OTHER_PYTHON, find_open_mpi, read_metrics
from training_jobs import (
    PHASES,
    ROOT,
    logged_step,
    read_outcome,
    run_serially,
    sleep_in_steps,
    slow_case,
    start_job,
    train_arguments,
)

CAN_EMULATE = os.geteuid() == 0 and os.path.exists("/dev/net/tun") and all(map(shutil.which, ("ip", "nsenter", "unshare")))
pytestmark = [
    pytest.mark.skipif(
        not CAN_EMULATE, reason="emulated hosts need Linux, root, /dev/net/tun and the packages iproute2 and util-linux"
    ),
    pytest.mark.timeout(240),
]
LIMIT_S = 4
STEPS = ("--train.steps", 8, "--checkpoint.every", 4)


def hosts(slots, *flags):
    """Return the command that runs another one on two hosts with so many ranks each."""
    return [str(ROOT / "scripts" / "hosts-here"), "--slots", str(slots), *map(str, flags)]


@pytest.fixture(scope="module")
def serial(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("serial")
    return run_serially(train_arguments(data, folder / "run", *STEPS), folder)


def test_slow_network_that_loses_packets_gives_the_same_bits(tmp_path, data, serial):
    network = hosts(1, "--mbit", 100, "--delay-ms", 5, "--loss", 0.01)
    with start_job(2, train_arguments(data, tmp_path / "run", *STEPS), tmp_path, wrapper=network) as job:
        assert job.wait(120) == 0, job.output
        lost = re.search(r"hosts-here: [\d,]+ packets, [\d,]+ bytes carried, ([\d,]+) packets lost", job.output)
    assert lost is not None
    assert lost.group(1) != "0"
    assert read_outcome(tmp_path / "run") == serial


def test_shared_memory_within_two_nodes_gives_the_same_bits(tmp_path, data, serial):
    """That it sends fewer bytes between nodes: tests/ranks/test_reduce.py."""
    line = train_arguments(data, tmp_path / "run", *STEPS, "--parallel.reduce", "shared-memory")
    with start_job(4, line, tmp_path, wrapper=hosts(2)) as job:
        assert job.wait(120) == 0, job.output
    assert "gradient all-reduce: shared memory within the node" in job.output
    assert read_outcome(tmp_path / "run") == serial


@pytest.mark.slow
def test_network_disconnected_for_a_moment_gives_the_same_bits(tmp_path, data):
    flags = ("--train.steps", 400, "--fault.step-timeout", 60)
    (tmp_path / "serial").mkdir()
    expected = run_serially(train_arguments(data, tmp_path / "serial" / "run", *flags), tmp_path / "serial")
    with start_job(2, train_arguments(data, tmp_path / "run", *flags), tmp_path, wrapper=hosts(1)) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 20, 120)
        job.process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        reached = logged_step(tmp_path / "run")
        time.sleep(2)
        assert logged_step(tmp_path / "run") == reached < 400, job.output
        job.process.send_signal(signal.SIGUSR2)
        assert job.wait(120) == 0, job.output
    assert read_outcome(tmp_path / "run") == expected


@pytest.mark.slow
def test_disconnected_network_ends_the_job(tmp_path, data):
    """The launcher alone would wait for the other host until the job's time is up."""
    flags = ("--train.steps", 100_000, "--fault.step-timeout", LIMIT_S)
    with start_job(2, train_arguments(data, tmp_path / "run", *flags), tmp_path, wrapper=hosts(1)) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 20, 120)
        job.process.send_signal(signal.SIGUSR1)
        code = job.wait(120)
    assert code in (signal.SIGALRM, 128 + signal.SIGKILL), job.output  # of the rank, or of its launcher
    assert "mpilm: watchdog: step" in job.output
    assert "the limit is 4 s (--fault.step-timeout" in job.output
    assert "rank 0 on h0" in job.output
    assert "rank 1 on h1" in job.output
    assert len(list((tmp_path / "run" / "watchdog").glob("*/rank-*.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("pulled", [1, 2], ids=["a working rank", "a spare"])
def test_spare_rank_takes_the_place_of_a_rank_whose_host_is_disconnected(tmp_path, data, pulled):
    """Of three hosts with a rank each. The disconnected rank is alone with itself, and must leave the run to the others."""
    if not (python := find_open_mpi()):
        pytest.skip("no Open MPI; MPILM_TEST_OTHER_PYTHON may name a Python that has it")
    steps, more = ("--train.steps", 60), ("--fault.elastic", "true", "--fault.spare-ranks", 1, "--fault.step-timeout", 60)
    (tmp_path / "serial").mkdir()
    expected = run_serially(train_arguments(data, tmp_path / "serial" / "run", *steps), tmp_path / "serial")
    variables = {f"OMPI_MCA_mpi_ft_detector_{name}": value for name, value in (("period", "1"), ("timeout", "5"))}
    variables["MPILM_FAULT"] = sleep_in_steps(20, 40, 0.5, rank=0)
    line, network = train_arguments(data, tmp_path / "run", *steps, *more), hosts(1, "--hosts", 3, "--pull", pulled)
    flags = ("--with-ft", "ulfm")
    with start_job(3, line, tmp_path, wrapper=network, python=python, flags=flags, **variables) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 20, 120)
        job.process.send_signal(signal.SIGUSR1)
        job.wait_until(lambda: read_metrics(tmp_path / "run" / "metrics.jsonl")[-1].get("event") == "end", 60)
        assert job.wait(120) == 128 + signal.SIGKILL  # of the launcher, which would wait for the disconnected host for ever
    has_continued = re.search(r"rank 1 \(h1, process \d+\) lost; 2 ranks continue after step", job.output)
    assert bool(has_continued) == (pulled == 1), job.output
    assert read_outcome(tmp_path / "run") == expected


@pytest.mark.slow
def test_batch_job_with_a_spare_node_goes_on_without_a_disconnected_one(tmp_path, data):
    """The script runs on the first of three hosts, with the environment of PBS."""
    steps = ("--train.steps", 60, "--checkpoint.every", 5, "--fault.step-timeout", LIMIT_S)
    (tmp_path / "serial").mkdir()
    expected = run_serially(train_arguments(data, tmp_path / "serial" / "run", *steps), tmp_path / "serial")
    (tmp_path / "nodes").write_text("h0\nh1\nh2\n")
    variables = {
        "PBS_JOBID": "1.server", "PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_O_WORKDIR": str(tmp_path),
        "MPILM_JOBS": str(ROOT / "jobs"), "MPILM_SITE": "/dev/null", "MPILM_DOCTOR": "off", "MPILM_SPARE_NODES": "1",
        "MPILM_MPIRUN": str(LAUNCHER), "PATH": f"{LAUNCHER.parent}:{os.environ['PATH']}",
        "MPILM_FAULT": sleep_in_steps(20, 40, 0.5, rank=0),
    }  # fmt: skip
    script = [*hosts(1, "--hosts", 3, "--pull", 1), "bash", str(ROOT / "jobs" / "train.pbs")]
    line = train_arguments(data, tmp_path / "run", *steps)[2:]
    with start_job(0, line, tmp_path, python=script[-1], wrapper=script[:-1], **variables) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 20, 120)
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait(160) == 0, job.output
    assert "h1 does not start a program: this job goes on without it\n" in job.output
    assert job.output.count("mpilm 0.1.0: 2 ranks") == 2
    assert read_outcome(tmp_path / "run") == expected


def cells():
    """Yield phase, ranks, and the Python of an environment with its MPI library."""
    for phase, ranks, python in product(PHASES, (2, 4), (sys.executable, OTHER_PYTHON)):
        if phase != "start-up":  # before MPI is up, hosts do not know each other
            yield slow_case(phase, ranks, python)


@pytest.mark.parametrize(("phase", "ranks", "python"), list(cells()))
def test_disconnected_network_is_named_in_any_phase(tmp_path, text, phase, ranks, python):
    """The last rank works slowly, on the far host, or rank 0 where it alone works, so that the phase lasts."""
    worker = 0 if phase in ("tokenizer training", "report") else ranks - 1
    line = train_arguments(
        text, tmp_path / "run", "--train.steps", 6, "--run.eval-every", 2, "--checkpoint.every", 2, "--generate.max-tokens", 4,
        "--data.tokenizer", "bpe:300", "--fault.step-timeout", LIMIT_S,
    )  # fmt: skip
    variables = {"MPILM_FAULT": f"kind=slow rank={worker} value=300 {PHASES[phase]}", "MPILM_CACHE": str(tmp_path)}
    with start_job(ranks, line, tmp_path, wrapper=hosts(ranks // 2), python=python, **variables) as job:
        job.wait_until(lambda: "fault: slow" in job.output, 120)
        if "step" not in phase:  # where a stated limit holds for the whole
            time.sleep(LIMIT_S + 2)
        assert "watchdog" not in job.output
        job.process.send_signal(signal.SIGUSR1)
        pulled = time.monotonic()
        job.wait_until(lambda: "mpilm: watchdog: " in job.output, 30)
        assert time.monotonic() - pulled < LIMIT_S + 5
        assert job.wait(120) != 0
    if "step" not in phase:
        assert "mpilm: watchdog: no heartbeat from h" in job.output
