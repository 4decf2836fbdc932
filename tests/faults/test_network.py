"""A network that is slow, loses packets, or is not there any more, between pretend hosts (scripts/hosts-here)."""

import os
import re
import shutil
import signal
import time

import pytest
from training_jobs import ROOT, logged_step, read_outcome, run_serially, start_job, train_arguments

NETWORK = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or not all(map(shutil.which, ("ip", "nsenter", "unshare"))),
    reason="pretend hosts want Linux, root, /dev/net/tun and the packages iproute2 and util-linux",
)
pytestmark = [NETWORK, pytest.mark.timeout(240)]


def hosts(*flags: object) -> list[str]:
    """Runs a command on two hosts, one rank on each."""
    return [str(ROOT / "scripts" / "hosts-here"), "--slots", "1", *map(str, flags)]


def after(job, run, step: int) -> None:
    job.wait_for(lambda: logged_step(run) >= step, 120)


def test_a_slow_network_that_loses_packets_changes_nothing_but_the_time(tmp_path, data):
    words = ("--train.steps", 12, "--checkpoint.every", 6)
    (tmp_path / "serial").mkdir()
    wanted = run_serially(train_arguments(data, tmp_path / "serial" / "run", *words), tmp_path / "serial")
    with start_job(
        2,
        train_arguments(data, tmp_path / "run", *words),
        tmp_path,
        within=hosts("--mbit", 100, "--delay-ms", 5, "--loss", 0.01),
    ) as job:
        assert job.wait(120) == 0, job.output
        lost = re.search(r"hosts-here: [\d,]+ packets, [\d,]+ bytes carried, ([\d,]+) packets lost", job.output)
    assert lost is not None
    assert lost.group(1) != "0"
    assert read_outcome(tmp_path / "run") == wanted


def test_nodes_add_at_home_and_then_across_to_the_same_bits(tmp_path, data):
    words = ("--train.steps", 6, "--parallel.reduce", "shared-memory")
    (tmp_path / "serial").mkdir()
    wanted = run_serially(train_arguments(data, tmp_path / "serial" / "run", *words), tmp_path / "serial")
    sent = {}
    for way in ("shared-memory", "messages"):
        folder = tmp_path / way
        folder.mkdir()
        two_each = [str(ROOT / "scripts" / "hosts-here"), "--slots", "2"]
        with start_job(
            4, train_arguments(data, folder / "run", *words, "--parallel.reduce", way), folder, within=two_each
        ) as job:
            assert job.wait(120) == 0, job.output
            assert ("gradients are added in memory that the ranks of a node share" in job.output) == (way == "shared-memory"), (
                job.output
            )
            sent[way] = int(re.search(r"packets, ([\d,]+) bytes carried", job.output).group(1).replace(",", ""))
        assert read_outcome(folder / "run") == wanted
    assert sent["shared-memory"] < sent["messages"]


@pytest.mark.slow
def test_a_cable_that_is_pulled_for_a_moment(tmp_path, data):
    words = ("--train.steps", 400, "--fault.step-timeout", 60)
    (tmp_path / "serial").mkdir()
    wanted = run_serially(train_arguments(data, tmp_path / "serial" / "run", *words), tmp_path / "serial")
    with start_job(2, train_arguments(data, tmp_path / "run", *words), tmp_path, within=hosts()) as job:
        after(job, tmp_path / "run", 20)
        job.process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        reached = logged_step(tmp_path / "run")
        time.sleep(2)
        assert logged_step(tmp_path / "run") == reached < 400, job.output
        job.process.send_signal(signal.SIGUSR2)
        assert job.wait(120) == 0, job.output
    assert read_outcome(tmp_path / "run") == wanted


@pytest.mark.slow
def test_a_cable_that_is_pulled_is_noticed(tmp_path, data):
    """The launcher would wait for the other host until the job's time is up."""
    with start_job(
        2,
        train_arguments(data, tmp_path / "run", "--train.steps", 100_000, "--fault.step-timeout", 4),
        tmp_path,
        within=hosts(),
    ) as job:
        after(job, tmp_path / "run", 20)
        job.process.send_signal(signal.SIGUSR1)
        code = job.wait(120)
        said = job.output
    assert code in (signal.SIGALRM, 128 + signal.SIGKILL), said  # of the rank, or of its launcher
    assert "mpilm: watchdog: step" in said
    assert "4 s is the limit (--fault.step-timeout" in said
    assert "rank 0 on h0" in said
    assert "rank 1 on h1" in said
    assert len(list((tmp_path / "run" / "watchdog").glob("*/rank-*.json"))) == 2
