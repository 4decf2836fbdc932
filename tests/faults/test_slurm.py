"""The batch scripts in a real SLURM, of pretend nodes on this machine (scripts/slurm-here)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import LAUNCHER, OPEN_MPI
from training_jobs import ROOT, SMALL, logged_step, read_outcome, run_serially, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.checkpoint.verify import verify_checkpoint

HERE = ROOT / "scripts" / "slurm-here"
STEPS = 1500
SHORT = ("--train.steps", 500)
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
            "MPILM_SRUN_MPI": "pmix" if open_mpi else "pmi2",
        }  # fmt: skip

    def ask(self, *words: object) -> str:
        done = subprocess.run(
            [*map(str, words)], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *words: object, **variables: str) -> str:
        """The number of a job."""
        exports = ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())])
        flags = (f"--export={exports}", "--cpus-per-task=1", "--time=5", f"--output={self.logs}/%j.log")
        return self.ask("sbatch", "--parsable", *flags, *words).strip()

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", job)))

    def log(self, job: str) -> str:
        path = self.logs / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(
        self, job: str, what, limit_s: float = 400.0
    ):  # pretend nodes make Open MPI slow: it takes them for hosts with cores of their own
        end = time.monotonic() + limit_s
        while not (found := what()):
            assert time.monotonic() < end, f"not within {limit_s} s: {self.state(job)}\n{self.log(job)}"
            time.sleep(0.2)
        return found

    def ended(self, job: str) -> dict[str, str]:
        """What SLURM says of a job that has come to its end, whole."""
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
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _content(path)]
        assert not left, [_content(path) for path in left]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def words(data, run, *more):
    return train_arguments(
        data, run, "--train.steps", STEPS, "--run.eval-every", 0, "--checkpoint.every", 0, "--run.log-every", 5, *more
    )[2:]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    return run_serially(["-m", "mpilm.train", *words(data, folder / "run")], folder)


@pytest.fixture(scope="module", autouse=True)
def chained(cluster, tmp_path_factory, data):
    """Three jobs of a minute each, of which half is kept free; a step in the first takes most of the rest. They run beside the
    other tests."""
    run = tmp_path_factory.mktemp("chain") / "run"
    flags = f"--cpus-per-task=1 --time=1 --output={cluster.logs}/%j.log --nodelist=n3 {' '.join(ONE_NODE)} {WARNING}"
    slow = "kind=sleep rank=1 step=40 point=forward value=26"
    cluster.environment |= {"SBATCH_FLAGS": flags, "MPILM_FAULT": slow}
    try:
        return run, cluster.ask("jobs/chain", 3, "jobs/train.sbatch", *words(data, run, *SHORT)).split()
    finally:
        del cluster.environment["MPILM_FAULT"]


def test_a_job_that_is_preempted_and_warned_becomes_the_whole_run(cluster, tmp_path, data, uncut):
    """Preempted by SLURM, which puts it back itself; warned by SIGUSR1, after which the script does."""
    run = tmp_path / "run"
    job = cluster.submit(*TWO_NODES, WARNING, "jobs/train.sbatch", *words(data, run), MPILM_DOCTOR="on")
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    stale = _stale_memory(job)
    cluster.submit("--partition=high", "--nodelist=n[0-1]", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    cluster.wait_for(job, lambda: cluster.log(job).count("as SIGTERM asked") == 1)
    first = logged_step(run)
    cluster.wait_for(job, lambda: logged_step(run) > first)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.wait_for(job, lambda: "goes back into the queue" in cluster.log(job))
    assert "as SIGUSR1 asked; saved" in cluster.log(job)
    state = cluster.ended(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), cluster.log(job)
    assert cluster.log(job).count("all checks passed") == 1  # the doctor, on the first start only
    assert "4 ranks" in cluster.log(job)
    assert not stale.exists()
    assert read_outcome(run)[:2] == uncut[:2]


def _stale_memory(job):
    """As MPICH leaves it behind when a job is killed."""
    number = 0x811C9DC5
    for byte in f"{job}.5".encode():
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    path = Path(f"/dev/shm/mpich_shm_{number:x}_0")
    path.touch()
    return path


def test_mpirun_inside_a_job_is_warned_and_goes_on(cluster, tmp_path, data, uncut):
    run = tmp_path / "run"
    flags = (*ONE_NODE, "--signal=B:USR1@1", "--nodelist=n2")
    job = cluster.submit(*flags, "jobs/train-mpirun.sbatch", *words(data, run))
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    state = cluster.ended(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert "as SIGUSR1 asked; saved" in cluster.log(job)
    assert read_outcome(run)[:2] == uncut[:2]


def test_a_job_that_is_cancelled_saves_and_stays_away(cluster, tmp_path, data):
    run = tmp_path / "run"
    job = cluster.submit(*ONE_NODE, WARNING, "jobs/train.sbatch", *words(data, run))
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    cluster.ask("scancel", job)
    state = cluster.ended(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    (saved,) = list_checkpoints(run / "checkpoints")
    verify_checkpoint(saved)
    assert "goes back" not in cluster.log(job)


def test_a_rank_that_is_killed_under_srun_is_named(cluster, tmp_path, data):
    """srun asks the others to go, who would wait for it in their step."""
    run = tmp_path / "run"
    job = cluster.submit(*ONE_NODE, WARNING, "--time=2", "jobs/train.sbatch", *words(data, run, "--train.steps", 10**6))
    cluster.wait_for(job, lambda: logged_step(run) >= 20)
    (victim,) = [path.parent for path in Path("/proc").glob("[0-9]*/environ") if _is_rank(path, job, 1)]
    os.kill(int(victim.name), signal.SIGKILL)
    state = cluster.ended(job)
    assert state["JobState"] == "FAILED", cluster.log(job)
    if cluster.environment["MPILM_SRUN_MPI"] == "pmix":  # which kills all ranks at once: SLURM alone can say something
        assert re.search(r"srun: error: n0: tasks? .*: Killed", cluster.log(job)), cluster.log(job)
        return
    assert "Missing: rank 1." in cluster.log(job)
    assert "the process is not there any more" in cluster.log(job)


def _is_rank(path, job, rank):
    said = _content(path).split(b"\0")
    program = _content(path.with_name("cmdline"))
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    return wanted <= set(said) and b"python" in program and b"mpilm.train" in program


def test_a_bad_setting_ends_the_job_once(cluster, tmp_path, data):
    job = cluster.submit(*ONE_NODE, WARNING, "jobs/train.sbatch", *words(data, tmp_path / "run", "--train.global-batch", 7))
    state = cluster.ended(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "78:0", "0")
    assert cluster.log(job).count("mpilm: error") == 1


def test_text_is_prepared_and_swept_over(cluster, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    where = ("--data.path", tmp_path / "text.txt", "--data.tokenizer", "bytes", "--output", tmp_path / "tokens")
    prepared = cluster.submit(*ONE_NODE, "jobs/prepare.sbatch", *where)
    assert cluster.ended(prepared)["JobState"] == "COMPLETED", cluster.log(prepared)
    sweep = tmp_path / "rates.txt"
    sweep.write_text("--train.lr 1e-3\n--train.lr 2e-3 --model.n-layers 2\n")
    flags = [str(word) for word in SMALL] + ["--data.path", tmp_path / "tokens", "--train.steps", 3]
    runs = [f"--run.dir={tmp_path}/run"]  # another place than runs/ of this folder; both go on where the other has ended
    job = cluster.submit(*ONE_NODE, WARNING, "--array=2-3", "jobs/sweep.sbatch", sweep, *flags, *runs)
    swept, beyond = cluster.ended(f"{job}_2"), cluster.ended(f"{job}_3")
    assert swept["JobState"] == "COMPLETED", cluster.log(swept["JobId"])
    assert "has no line 3; sbatch --array=1-2 has a run for every line" in cluster.log(beyond["JobId"])
    assert beyond["ExitCode"] == "78:0"
    assert "lr = 0.002" in (tmp_path / "run" / "config.toml").read_text()


def test_jobs_that_are_too_short_make_the_whole_run_in_a_chain(cluster, chained, tmp_path, data):
    """The end of the job's time is read from SLURM, without a signal."""
    run, (first, second, last) = chained
    state = cluster.ended(first)
    assert state["ExitCode"] == "75:0", cluster.log(first)
    assert "as the end of the SLURM job asked; saved" in cluster.log(first)
    assert cluster.ended(second)["ExitCode"] in ("75:0", "0:0"), cluster.log(second)
    assert "from step" in cluster.log(second)
    assert cluster.ended(last)["JobState"] == "COMPLETED", cluster.log(last)
    uncut = run_serially(["-m", "mpilm.train", *words(data, tmp_path / "run", *SHORT)], tmp_path)
    assert read_outcome(run)[:2] == uncut[:2]
