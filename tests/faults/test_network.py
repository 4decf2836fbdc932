"""Networks that are slow, lose packets or are disconnected, between emulated hosts (scripts/hosts-here)."""

import os
import re
import shutil
import signal
import time

import pytest
from training_jobs import ROOT, logged_step, read_outcome, run_serially, slow_case, start_job, train_arguments

CAN_EMULATE = os.geteuid() == 0 and os.path.exists("/dev/net/tun") and all(map(shutil.which, ("ip", "nsenter", "unshare")))
pytestmark = [
    pytest.mark.skipif(
        not CAN_EMULATE, reason="emulated hosts need Linux, root, /dev/net/tun and the packages iproute2 and util-linux"
    ),
    pytest.mark.timeout(240),
]
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
    flags = ("--train.steps", 100_000, "--fault.step-timeout", 4)
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


@pytest.mark.parametrize(
    "point", list(map(slow_case, ("prepare", "build", "load", "eval", "checkpoint.open", "sample", "leaving")))
)
def test_disconnected_network_is_named_in_any_phase(tmp_path, text, point):
    """Rank 1 works slowly, and rank 0 waits for it, so that the phase lasts."""
    fault = f"kind=slow rank=1 value=300 point={point}"
    flags = (
        *STEPS,
        "--fault.step-timeout",
        4,
        "--run.eval-every",
        2,
        "--generate.max-tokens",
        4,
        "--data.tokenizer",
        "bpe:300",
    )
    variables = {"MPILM_FAULT": fault, "MPILM_CACHE": str(tmp_path)}
    with start_job(2, train_arguments(text, tmp_path / "run", *flags), tmp_path, wrapper=hosts(1), **variables) as job:
        job.wait_until(lambda: "fault: slow" in job.output, 120)
        time.sleep(6)
        assert "watchdog" not in job.output
        job.process.send_signal(signal.SIGUSR1)
        pulled = time.monotonic()
        job.wait_until(lambda: "mpilm: watchdog: no heartbeat from h" in job.output, 30)
        assert time.monotonic() - pulled < 4 + 5
        assert job.wait(120) != 0
