"""The batch scripts in a real SLURM of emulated nodes on this machine (scripts/slurm-here)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from helpers import LAUNCHER, OPEN_MPI
from training_jobs import ROOT, SMALL, logged_step, read_outcome, run_serially, sleep_in_steps, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.checkpoint.verify import verify_checkpoint

HERE = ROOT / "scripts" / "slurm-here"
STEPS, SLOW_STEPS = 200, (20, 120)  # the slow ones leave a test ten seconds to act
SHORT = ("--train.steps", 150)
pytestmark = pytest.mark.timeout(500)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2", "--nodelist=n[0-1]")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
WARNING = "--signal=USR1@1"  # SLURM may send it up to a minute early, and these jobs are short


class Cluster:
    """A SLURM whose jobs are started with this Python and its MPI."""

    def __init__(self, folder: Path):
        self.folder, self.logs = folder / "slurm", folder
        open_mpi = "Open MPI" in subprocess.run([LAUNCHER, "--version"], capture_output=True, text=True, check=True).stdout
        self.environment = {
            **os.environ, **OPEN_MPI, "PYTHONPATH": str(ROOT), "MPILM_SITE": "/dev/null", "MPILM_DOCTOR": "off",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MPILM_SRUN_MPI": "pmix" if open_mpi else "pmi2", "MPILM_FAULT": sleep_in_steps(*SLOW_STEPS, 0.1),
        }  # fmt: skip
        self.several_nodes = {} if open_mpi else {"MPILM_SRUN_MPI": "off"}  # see docs/guides/cluster.md

    def call(self, *words: object) -> str:
        done = subprocess.run(
            [*map(str, words)], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *words: object, **variables: str) -> str:
        """Submit a job and return its number."""
        exports = ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())])
        flags = (f"--export={exports}", "--cpus-per-task=1", "--time=5", f"--output={self.logs}/%j.log")
        return self.call("sbatch", "--parsable", *flags, *words).strip()

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))

    def log(self, job: str) -> str:
        path = self.logs / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, job: str, condition, limit_s: float = 150.0):
        """Return the value of `condition` once it is true."""
        end = time.monotonic() + limit_s
        while not (found := condition()):
            assert time.monotonic() < end, f"not within {limit_s} s: {self.state(job)}\n{self.log(job)}"
            time.sleep(0.2)
        return found

    def wait_for_end(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job once it has ended."""
        self.wait_for(job, lambda: self.state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        return self.state(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    if not LAUNCHER.exists():
        pytest.skip(f"there is no {LAUNCHER}")
    started = subprocess.run([HERE, "start", folder / "slurm"], capture_output=True, text=True, timeout=100, check=False)
    if "not found" in started.stderr:
        pytest.skip("SLURM is not installed here: scripts/slurm-here install")
    assert started.returncode == 0, started.stderr
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([HERE, "stop", folder / "slurm"], timeout=100, check=True)
        remaining = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in read_or_empty(path)]
        assert not remaining, [read_or_empty(path) for path in remaining]


def read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def train_flags(data, run, *more):
    return train_arguments(
        data, run, "--train.steps", STEPS, "--run.eval-every", 0, "--checkpoint.every", 0, "--run.log-every", 5, *more
    )[2:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run_serially(["-m", "mpilm.train", *train_flags(data, folder / "run")], folder)


@pytest.fixture(scope="module", autouse=True)
def chain(cluster, tmp_path_factory, data):
    """Three jobs of a minute each, of which half is reserved for saving; slow steps last beyond the rest of the first.

    They run while the other tests run.
    """
    run = tmp_path_factory.mktemp("chain") / "run"
    flags = f"--cpus-per-task=1 --time=1 --output={cluster.logs}/%j.log --nodelist=n3 {' '.join(ONE_NODE)} {WARNING}"
    variables = {"SBATCH_FLAGS": flags, "MPILM_FAULT": sleep_in_steps(40, 75, 1.0)}
    with mock.patch.dict(cluster.environment, variables):
        return run, cluster.call("jobs/chain", 3, "jobs/train.sbatch", *train_flags(data, run, *SHORT)).split()


def test_job_preempted_and_warned_completes_the_run(cluster, tmp_path, data, uninterrupted):
    """SLURM requeues the job that it preempts; after the warning, SIGUSR1, the script does."""
    run = tmp_path / "run"
    nodes = (*ONE_NODE, "--nodelist=n0") if cluster.several_nodes else TWO_NODES
    job = cluster.submit(*nodes, WARNING, "jobs/train.sbatch", *train_flags(data, run), MPILM_DOCTOR="on")
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    stale = create_stale_memory(job)
    cluster.submit("--partition=high", "--nodelist=n[0-1]", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    cluster.wait_for(job, lambda: cluster.log(job).count("received SIGTERM; saved") == 1)
    first = logged_step(run)
    cluster.wait_for(job, lambda: logged_step(run) > first)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait_for(job, lambda: "goes back into the queue" in cluster.log(job))
    assert "received SIGUSR1; saved" in cluster.log(job)
    state = cluster.wait_for_end(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), cluster.log(job)
    assert cluster.log(job).count("all checks passed") == 1  # the doctor, on the first start only
    assert f"{2 if cluster.several_nodes else 4} ranks" in cluster.log(job)
    assert not stale.exists()
    assert read_outcome(run)[:2] == uninterrupted[:2]


def create_stale_memory(job):
    """Create a file as MPICH leaves it when a job is killed."""
    number = 0x811C9DC5
    for byte in f"{job}.5".encode():
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    path = Path(f"/dev/shm/mpich_shm_{number:x}_0")
    path.touch()
    return path


def test_job_with_mpirun_warned_is_requeued(cluster, tmp_path, data, uninterrupted):
    run = tmp_path / "run"
    flags = (*ONE_NODE, "--signal=B:USR1@1", "--nodelist=n2")
    job = cluster.submit(*flags, "jobs/train-mpirun.sbatch", *train_flags(data, run))
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    state = cluster.wait_for_end(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert "received SIGUSR1; saved" in cluster.log(job)
    assert read_outcome(run)[:2] == uninterrupted[:2]


def test_nodes_that_computed_wrongly_are_left_out(cluster, tmp_path, data):
    """n1 is one of the two nodes of the job; n7 is not."""
    run = tmp_path / "run"
    for steps in (5, 10):
        flags = train_flags(data, run, "--train.steps", steps)
        job = cluster.submit(*TWO_NODES, WARNING, "jobs/train.sbatch", *flags, MPILM_FAULT="", **cluster.several_nodes)
        state = cluster.wait_for_end(job)
        assert state["JobState"] == "COMPLETED", cluster.log(job)
        (run / "bad-hosts.json").write_text(json.dumps({"n1.cluster": [], "n7": []}))
    assert "without the nodes that have computed wrongly: n1\n" in cluster.log(job)
    assert "2 ranks, 1 thread each" in cluster.log(job)


def test_job_cancelled_saves_and_is_not_requeued(cluster, tmp_path, data):
    run = tmp_path / "run"
    job = cluster.submit(*ONE_NODE, WARNING, "jobs/train.sbatch", *train_flags(data, run))
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    cluster.call("scancel", job)
    state = cluster.wait_for_end(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    (saved,) = list_checkpoints(run / "checkpoints")
    verify_checkpoint(saved)
    assert "goes back" not in cluster.log(job)


def test_rank_killed_under_srun_is_named(cluster, tmp_path, data):
    """srun then ends the other ranks, which would wait for it in their step."""
    run = tmp_path / "run"
    job = cluster.submit(*ONE_NODE, WARNING, "--time=2", "jobs/train.sbatch", *train_flags(data, run, "--train.steps", 10**6))
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    (victim,) = [path.parent for path in Path("/proc").glob("[0-9]*/environ") if is_rank(path, job, 1)]
    os.kill(int(victim.name), signal.SIGKILL)
    state = cluster.wait_for_end(job)
    assert state["JobState"] == "FAILED", cluster.log(job)
    if cluster.environment["MPILM_SRUN_MPI"] == "pmix":  # which kills all ranks at once: only SLURM can report it
        assert re.search(r"srun: error: n0: tasks? .*: Killed", cluster.log(job)), cluster.log(job)
        return
    assert "Missing: rank 1." in cluster.log(job)
    assert "its process no longer exists" in cluster.log(job)


def is_rank(path, job, rank):
    environment = read_or_empty(path).split(b"\0")
    program = read_or_empty(path.with_name("cmdline"))
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    return wanted <= set(environment) and b"python" in program and b"mpilm.train" in program


def test_job_with_a_bad_setting_prints_one_error(cluster, tmp_path, data):
    job = cluster.submit(
        *ONE_NODE, WARNING, "jobs/train.sbatch", *train_flags(data, tmp_path / "run", "--train.global-batch", 7)
    )
    state = cluster.wait_for_end(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "78:0", "0")
    assert cluster.log(job).count("mpilm: error") == 1


def test_prepare_and_sweep_jobs(cluster, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    where = ("--data.path", tmp_path / "text.txt", "--data.tokenizer", "bytes", "--output", tmp_path / "tokens")
    prepared = cluster.submit(*ONE_NODE, "jobs/prepare.sbatch", *where)
    assert cluster.wait_for_end(prepared)["JobState"] == "COMPLETED", cluster.log(prepared)
    sweep = tmp_path / "rates.txt"
    sweep.write_text("--train.lr 1e-3\n--train.lr 2e-3 --model.n-layers 2\n")
    flags = [str(word) for word in SMALL] + ["--data.path", tmp_path / "tokens", "--train.steps", 3]
    runs = [f"--run.dir={tmp_path}/run"]  # not runs/ of this folder, where the other MPI would resume
    job = cluster.submit(*ONE_NODE, WARNING, "--array=2-3", "jobs/sweep.sbatch", sweep, *flags, *runs)
    swept, beyond = cluster.wait_for_end(f"{job}_2"), cluster.wait_for_end(f"{job}_3")
    assert swept["JobState"] == "COMPLETED", cluster.log(swept["JobId"])
    assert "has no line 3; jobs/submit starts a run for each of its 2 lines" in cluster.log(beyond["JobId"])
    assert beyond["ExitCode"] == "78:0"
    assert "lr = 0.002" in (tmp_path / "run" / "config.toml").read_text()


def test_chain_of_short_jobs_completes_the_run(cluster, chain, tmp_path, data):
    """The run reads the end of the job's time from SLURM; no signal is sent."""
    run, (first, second, last) = chain
    state = cluster.wait_for_end(first)
    assert state["ExitCode"] == "75:0", cluster.log(first)
    assert "batch job ends; saved" in cluster.log(first)
    assert cluster.wait_for_end(second)["ExitCode"] in ("75:0", "0:0"), cluster.log(second)
    assert "from step" in cluster.log(second)
    assert cluster.wait_for_end(last)["JobState"] == "COMPLETED", cluster.log(last)
    uninterrupted = run_serially(["-m", "mpilm.train", *train_flags(data, tmp_path / "run", *SHORT)], tmp_path)
    assert read_outcome(run)[:2] == uninterrupted[:2]


def test_job_with_a_spare_node_goes_on_without_one_that_fails(cluster, tmp_path, data, uninterrupted):
    """The last test: n1 stays down."""
    run = tmp_path / "run"
    nodes = ("--nodes=3", "--ntasks-per-node=1", "--nodelist=n[0-2]", "--no-kill")
    every = ("--checkpoint.every", 10, "--fault.step-timeout", 10)
    variables = {"MPILM_SPARE_NODES": "1", **cluster.several_nodes}
    job = cluster.submit(*nodes, WARNING, "jobs/train.sbatch", *train_flags(data, run, *every), **variables)
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    daemons = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if is_daemon(path, cluster, job)]
    for daemon in daemons:
        os.kill(int(daemon.name), signal.SIGKILL)
    cluster.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    state = cluster.wait_for_end(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), cluster.log(job)
    assert "n1 does not start a program: this job goes on without it\n" in cluster.log(job)
    assert cluster.log(job).count("mpilm 0.1.0: 2 ranks") == 2
    assert read_outcome(run)[:2] == uninterrupted[:2]


def is_daemon(path, cluster, job):
    """Return whether a process is SLURM's daemon of node n1, or one of its ranks."""
    command, environment = read_or_empty(path), read_or_empty(path.with_name("environ"))
    is_own = str(cluster.folder).encode() in command + environment
    rank = {b"SLURMD_NODENAME=n1", f"SLURM_JOB_ID={job}".encode()} <= set(environment.split(b"\0"))
    return (is_own and b"slurmd" in command and b"\0n1\0" in command) or rank
