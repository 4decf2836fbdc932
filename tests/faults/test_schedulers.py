"""The batch scripts under a real Grid Engine (scripts/grid-engine-here) and under stand-ins for schedulers that cannot run here
(tests/fake_schedulers.py); tests/faults/test_slurm.py has a real SLURM."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fake_schedulers import FAKES, Pbs
from helpers import LAUNCHER
from training_jobs import ROOT, logged_step, read_outcome, run_serially, sleep_in_steps, train_arguments

from mpilm.checkpoint.format import list_checkpoints

pytestmark = pytest.mark.timeout(300)
SUBMIT, STEPS = ROOT / "jobs" / "submit", 60
SCRIPTS = [path for path in (ROOT / "jobs").rglob("*") if path.is_file() and path.suffix not in (".condor", ".yaml")]


@pytest.fixture(params=FAKES)
def fake(request, tmp_path):
    return FAKES[request.param](tmp_path / "cluster")


def wait_until(condition, limit_s=60.0):
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def run_until(fake, number, act):
    """Start a job, act on it once its ranks run, and return its exit code."""
    (fake.folder / "hold").touch()
    job = fake.start(number)
    wait_until(lambda: (fake.folder / "running").exists() or job.poll() is not None)
    assert job.poll() is None, fake.log()
    act(job)
    code = job.wait(30)
    (fake.folder / "hold").unlink(missing_ok=True)
    return code


def test_warned_job_goes_back_with_its_arguments_and_completes(fake):
    fake.submit("train", "--run.dir", "runs/a run", "--data.path", "it's", 'a "text"')
    code = run_until(fake, 1, fake.warn)
    assert fake.is_requeued(code, before=1), fake.log()
    assert "goes back into the queue" in fake.log()
    assert fake.start(len(fake.jobs())).wait(30) == 0, fake.log()
    for launched in fake.launched():
        assert launched["words"][-5:] == ["--run.dir", "runs/a run", "--data.path", "it's", 'a "text"']
        assert launched["hosts"] == ["n1", "n1", "n2", "n2"]
    assert len(fake.launched()) == 2


def test_job_warned_before_its_ranks_train_goes_back(tmp_path):
    """SIGUSR1 ends them, with another code."""
    fake = FAKES["lsf"](tmp_path / "cluster")
    text = (fake.bin / "stub").read_text()
    (fake.bin / "stub").write_text(text.replace("sys.exit(75 if stop else 0)", "sys.exit(10)"))
    fake.submit("train")
    assert run_until(fake, 1, fake.warn) == 99, fake.log()


def test_cancelled_job_stays_away(fake):
    fake.submit("train", "--run.dir", "run")
    code = run_until(fake, 1, fake.cancel)
    assert code == 75, fake.log()  # the ranks have saved
    assert "goes back" not in fake.log()
    if fake.suffix != "yaml":  # where deleting the MPIJob keeps the pod from starting again
        assert not fake.is_requeued(code, before=1)


def test_hosts_that_computed_wrongly_are_left_out(fake):
    """The scheduler is asked for others; a job that has one all the same does not start ranks there."""
    (fake.folder / "run").mkdir()
    (fake.folder / "run" / "bad-hosts.json").write_text(json.dumps({"n2.cluster": []}))
    fake.submit("train", "--run.dir=run", MPILM_EXCLUDE="n7")
    (job,) = fake.jobs()
    if excluded := fake.excluded(job):
        assert "n7" in excluded
        assert "n2" in excluded or fake.suffix == "yaml"
    assert fake.start(1).wait(30) == 0, fake.log()
    (launched,) = fake.launched()
    assert "without the nodes that have computed wrongly: n2\n" in fake.log()
    if fake.suffix == "flux":
        assert {"--requires=-host:n2", "--ntasks=2"} <= set(launched["words"])
    else:
        assert launched["hosts"] == ["n1", "n1"]
        assert launched["words"][launched["words"].index("-n") + 1] == "2"


def start_job_whose_first_host_fails(fake, spares):
    """Return the exit code, and the hosts of each start of the ranks."""
    fake.submit("train", "--run.dir", "run", **({"MPILM_SPARE_NODES": str(spares)} if spares else {}))

    def fail(job):
        (fake.folder / "n1.down").touch()
        (fake.folder / "crash").touch()

    code = run_until(fake, 1, fail)
    return code, [row["hosts"] for row in fake.launched() if row["words"][-1] != "true"]


def test_spare_node_takes_the_place_of_one_that_fails(fake):
    code, hosts = start_job_whose_first_host_fails(fake, spares=1)
    assert code == 0, fake.log()
    assert hosts == [["n1", "n1"], ["n2", "n2"]]
    assert "n1 does not start a program: this job goes on without it\n" in fake.log()
    assert "training resumes on 2 ranks\n" in fake.log()


def test_job_without_spare_nodes_goes_on_with_fewer_ranks(tmp_path):
    fake = FAKES["lsf"](tmp_path / "cluster")
    code, hosts = start_job_whose_first_host_fails(fake, spares=0)
    assert code == 0, fake.log()
    assert hosts == [["n1", "n1", "n2", "n2"], ["n2", "n2"]]


def test_job_goes_back_when_too_few_hosts_are_left(tmp_path):
    fake = FAKES["lsf"](tmp_path / "cluster")
    text = (fake.bin / "stub").read_text()
    (fake.bin / "stub").write_text(text.replace("stop = []", 'stop = []\nif (folder / "n1.down").exists():\n    sys.exit(78)'))
    code, hosts = start_job_whose_first_host_fails(fake, spares=0)
    assert (code, len(hosts)) == (99, 2), fake.log()
    (fake.folder / "n2.down").touch()
    assert fake.start(1).wait(30) == 99, fake.log()  # no host is left
    assert "goes back into the queue" in fake.log()


def test_job_goes_on_without_a_host_that_has_computed_wrongly(tmp_path):
    """Ranks that found one end with 88 and note its host."""
    fake = FAKES["lsf"](tmp_path / "cluster")
    (fake.folder / "run").mkdir()
    wrong = """
bad = Path("run/bad-hosts.json")
if not bad.exists():
    bad.write_text(json.dumps({"n1": []}))
    sys.exit(88)
stop = []
"""
    (fake.bin / "stub").write_text((fake.bin / "stub").read_text().replace("stop = []", wrong))
    fake.submit("train", "--run.dir", "run")
    assert fake.start(1).wait(30) == 0, fake.log()
    assert [row["hosts"] for row in fake.launched()] == [["n1", "n1", "n2", "n2"], ["n2", "n2"]]
    assert "without the nodes that have computed wrongly: n1\ntraining resumes on 2 ranks\n" in fake.log()


def test_job_whose_ranks_fail_on_good_hosts_ends(tmp_path):
    fake = FAKES["lsf"](tmp_path / "cluster")
    (fake.bin / "stub").write_text((fake.bin / "stub").read_text().replace("sys.exit(75 if stop else 0)", "sys.exit(86)"))
    fake.submit("train", "--run.dir", "run")
    assert fake.start(1).wait(30) == 86, fake.log()
    assert [row["words"][-1] for row in fake.launched()].count("true") == 2  # both hosts have been asked


def test_number_of_spare_nodes_that_leaves_none_is_refused(tmp_path):
    fake = Pbs(tmp_path / "cluster")
    for value in ("2", "one", "-1"):
        fake.submit("train", "--run.dir", "run", MPILM_SPARE_NODES=value)
        assert fake.start(len(fake.jobs())).wait(30) == 78
        assert f"MPILM_SPARE_NODES={value} must be a number below that of the nodes of this job (2)" in fake.log()


def test_sweep_trains_with_each_line(fake):
    (fake.folder / "rates.txt").write_text("--train.lr 1e-3\n--train.lr 2e-3\n")
    fake.submit("sweep", "rates.txt", "--data.path", "tokens")
    jobs = fake.jobs()
    arrays = {"pbs": ["-J", "1-2"], "lsf": ["-J", "mpilm-sweep[1-2]"]}
    if fake.suffix in arrays:
        (job,) = jobs
        assert " ".join(arrays[fake.suffix]) in " ".join(job["words"])
        fake.environment |= {"PBS_ARRAY_INDEX": "2", "LSB_JOBINDEX": "2"}
        variables = {**fake.command(1, job)[1], "PBS_ARRAY_INDEX": "2", "LSB_JOBINDEX": "2"}
        fake.command = lambda number, job, start=fake.command: (start(number, job)[0], variables, start(number, job)[2])
    else:
        assert len(jobs) == 2
    assert fake.start(len(jobs)).wait(30) == 0, fake.log()
    words = fake.launched()[-1]["words"]
    assert words[-6:] == ["--run.dir", "runs/rates-2", "--data.path", "tokens", "--train.lr", "2e-3"]


def test_jobs_of_a_chain_wait_for_each_other(fake):
    done = fake.call(ROOT / "jobs" / "chain", 2, *fake.script("train"), "--run.dir", "run")
    if fake.suffix in ("condor", "yaml"):
        assert done.returncode == 78
        assert "submit one job instead of a chain" in done.stderr
        return
    first, _ = done.stdout.split()
    assert any((first in word and "after" in word) or word == f"ended({first})" for word in fake.jobs()[1]["words"])
    assert run_until(fake, 1, fake.warn) == 75
    assert len(fake.jobs()) == 2


def test_job_that_cannot_submit_itself_again_states_how_to_resume(tmp_path):
    fake = Pbs(tmp_path / "cluster")
    fake.submit("train", "--run.dir", "a run")
    (fake.bin / "qsub").unlink()
    assert run_until(fake, 1, fake.warn) == 75
    assert rf"this resumes the run: {SUBMIT} {ROOT}/jobs/train.pbs --run.dir a\ run" in fake.log()


def test_doctor_and_prepare_pass_their_exit_code(tmp_path):
    fake = Pbs(tmp_path / "cluster")
    (fake.bin / "stub").write_text("#!/bin/sh\nexit 3\n")
    for number, task in enumerate(("doctor", "prepare"), 1):
        fake.submit(task, "--megabytes", 1)
        assert fake.start(number).wait(30) == 3, fake.log()
        assert fake.launched()[-1]["words"][-4:] == ["-m", f"mpilm.{task}", "--megabytes", "1"]


def refuse(fake, *words, **variables):
    done = fake.call(*words, **variables)
    assert done.returncode == 78, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("jobs: ")]
    return line


def test_what_is_missing_is_named(tmp_path):
    fake = Pbs(tmp_path / "cluster")
    train, outside = ROOT / "jobs" / "train.pbs", {"MPILM_JOBS": str(ROOT / "jobs"), "PBS_O_WORKDIR": "/"}
    assert "is for LSF, but this machine has no bsub" in refuse(fake, SUBMIT, ROOT / "jobs" / "train.lsf")
    assert "is not a file" in refuse(fake, SUBMIT, "jobs/none.pbs")
    (fake.folder / "bad-hosts.json").write_text("{")
    assert "bad-hosts.json is not JSON" in refuse(fake, SUBMIT, train, "--run.dir", fake.folder)
    assert "is for Grid Engine, but this qsub is that of PBS" in refuse(fake, SUBMIT, ROOT / "jobs" / "train.sge")
    assert "no scheduler has started this script" in refuse(fake, "bash", train, **outside)
    inside = {**outside, "PBS_JOBID": "1", "PBS_NODEFILE": str(fake._hosts())}
    assert "MPILM_SITE=nowhere is neither a file nor one of" in refuse(fake, "bash", train, **inside, MPILM_SITE="nowhere")
    assert "no-mpirun not found: load the MPI of your site" in refuse(fake, "bash", train, **inside, MPILM_MPIRUN="no-mpirun")
    (fake.bin / "python").symlink_to("/usr/bin/python3")
    assert "has no mpilm: activate the environment" in refuse(fake, "bash", train, **inside, PYTHONPATH="")


def test_launcher_of_another_mpi_is_named(tmp_path):
    if not LAUNCHER.exists():
        pytest.skip(f"there is no {LAUNCHER}")
    fake = Pbs(tmp_path / "cluster")
    own = subprocess.run([LAUNCHER, "--version"], capture_output=True, text=True, check=True).stdout
    version = "HYDRA build details:" if "Open MPI" in own else "mpirun (Open MPI) 5.0.11"
    (fake.bin / "stub").write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else exit 16; fi\n')
    fake.submit("train")
    assert fake.start(1).wait(30) == 16
    assert re.search("jobs: .*fake-mpirun belongs to .*, but Python loads .*: load one MPI in .*site.sh, or set", fake.log())


def train_flags(data, run):
    flags = ("--train.steps", STEPS, "--run.eval-every", 0, "--checkpoint.every", 0)
    return train_arguments(data, run, *flags)[2:]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uncut")
    return run_serially(["-m", "mpilm.train", *train_flags(data, folder / "run")], folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAKES)
def test_job_cut_into_three_slices_has_the_bits_of_the_uncut_one(kind, tmp_path, data, uncut):
    """PBS, LSF and Flux state the end of the job; HTCondor and Kubernetes evict it."""
    if not LAUNCHER.exists():
        pytest.skip(f"there is no {LAUNCHER}")
    fake, run = FAKES[kind](tmp_path / "cluster", str(LAUNCHER)), tmp_path / "run"
    asked = kind in ("pbs", "lsf", "flux")
    fake.environment["MPILM_FAULT"] = sleep_in_steps(10, 50, 0.1)
    fake.submit("train", *train_flags(data, run))
    ends, seen = [], 0
    while len(ends) < 3:
        number = len(fake.jobs())
        job = fake.start(number, left_s=37.0 if asked and len(ends) < 2 else 3600.0)
        if len(ends) < 2 and not asked:
            wait_until(lambda seen=seen: logged_step(run) > max(seen, 10))
            fake.cancel(job)
        ends.append(job.wait(90))
        before, seen = seen, logged_step(run)
        assert before < seen, fake.log()
        if len(ends) < 3:
            assert fake.is_requeued(ends[-1], number) if asked else ends[-1] == 75, fake.log()
    assert ends[-1] == 0, fake.log()
    assert fake.log().count("its batch job ends; saved" if asked else "received SIGUSR1; saved") == 2, fake.log()
    assert read_outcome(run)[:2] == uncut[:2]


class GridEngine:
    """A real Grid Engine of one host."""

    def __init__(self, folder: Path, variables: dict[str, str]):
        self.folder, self.fake = folder, Pbs(folder / "fake")
        self.stub = str(self.fake.launcher)
        (self.fake.bin / "qsub").unlink()
        (self.fake.bin / "qstat").unlink()
        self.fake.environment |= variables

    def call(self, *words: object, **variables: str) -> str:
        done = self.fake.call(*words, **variables)
        assert done.returncode == 0, done
        return done.stdout.strip()

    def submit(self, flags: str, *words: object, **variables: str) -> str:
        flags = f"-pe mpi 8 -o {self.folder}/log {flags}"  # two ranks of four slots
        variables = {"MPILM_MPIRUN": str(LAUNCHER), **variables}
        return self.call(SUBMIT, f"{ROOT}/jobs/train.sge", *words, MPILM_FLAGS=flags, **variables)

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def state(self, job: str) -> str:
        """Return qstat's state of a job; "" once it has ended."""
        lines = self.fake.call("qstat", "-u", "*").stdout.splitlines()
        return next((line.split()[4] for line in lines if line.split()[:1] == [job]), "")

    def wait_for_end(self, job: str, limit_s: float = 280.0) -> None:
        end = time.monotonic() + limit_s
        while self.state(job):
            assert time.monotonic() < end, self.log()
            time.sleep(0.3)


@pytest.fixture(scope="module")
def grid_engine_cluster(tmp_path_factory):
    folder, here = tmp_path_factory.mktemp("grid-engine"), ROOT / "scripts" / "grid-engine-here"
    started = subprocess.run([here, "start", folder], capture_output=True, text=True, timeout=100, check=False)
    if "not found" in started.stderr:
        pytest.skip("Grid Engine is not installed here: scripts/grid-engine-here install")
    assert started.returncode == 0, started.stderr
    try:
        yield dict(re.findall(r"(SGE_\w+)=(\S+)", started.stdout))
    finally:
        subprocess.run([here, "stop", folder], timeout=100, check=True)


@pytest.fixture
def grid_engine(grid_engine_cluster, tmp_path):
    if not LAUNCHER.exists():
        pytest.skip(f"there is no {LAUNCHER}")
    return GridEngine(tmp_path, grid_engine_cluster)


def test_grid_engine_warns_a_job_which_goes_back(grid_engine):
    """Its soft limit sends SIGUSR1; code 99 returns the job to the queue, where it starts again."""
    (grid_engine.fake.folder / "hold").touch()
    job = grid_engine.submit("-l h_rt=60,s_rt=3", "--run.dir", "run", MPILM_MPIRUN=grid_engine.stub)
    wait_until(lambda: "goes back into the queue" in grid_engine.log())
    (grid_engine.fake.folder / "hold").unlink()
    grid_engine.wait_for_end(job)
    launched = grid_engine.fake.launched()
    assert launched
    for each in launched:
        assert each["hosts"] == ["localhost", "localhost"]
        assert each["words"][-3:] == ["mpilm.train", "--run.dir", "run"]


@pytest.mark.slow
def test_grid_engine_job_in_slices_has_the_bits_of_the_uncut_one(grid_engine, tmp_path, data, uncut):
    run = tmp_path / "run"
    job = grid_engine.submit("-l h_rt=300,s_rt=25", *train_flags(data, run), MPILM_FAULT=sleep_in_steps(5, 50, 0.7))
    grid_engine.wait_for_end(job)
    assert grid_engine.log().count("received SIGUSR1; saved") >= 1, grid_engine.log()
    assert grid_engine.log().count("goes back into the queue") >= 1
    assert "2 ranks" in grid_engine.log()
    assert read_outcome(run)[:2] == uncut[:2]


@pytest.mark.slow
def test_grid_engine_job_cancelled_saves_and_stays_away(grid_engine, tmp_path, data):
    run = tmp_path / "run"
    job = grid_engine.submit("-l h_rt=300", *train_flags(data, run), MPILM_FAULT=sleep_in_steps(5, STEPS, 0.3))
    wait_until(lambda: logged_step(run) >= 8)
    grid_engine.call("qdel", job)
    grid_engine.wait_for_end(job)
    assert list_checkpoints(run / "checkpoints"), grid_engine.log()
    assert "goes back" not in grid_engine.log()


@pytest.mark.slow
def test_grid_engine_states_the_end_of_a_job(grid_engine, tmp_path, data, uncut):
    """The run asks qstat, and saves half a minute before h_rt; a step takes most of the time of the first slice."""
    run, slow = tmp_path / "run", "kind=sleep rank=1 step=10 point=forward value=28"
    job = grid_engine.submit("-l h_rt=60,s_rt=300", *train_flags(data, run), MPILM_FAULT=slow)
    grid_engine.wait_for_end(job)
    assert grid_engine.log().count("its batch job ends; saved") >= 1, grid_engine.log()
    assert read_outcome(run)[:2] == uncut[:2]


@pytest.mark.slow
def test_grid_engine_excludes_hosts(grid_engine, tmp_path):
    """The only host has computed wrongly: the job waits for another one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad-hosts.json").write_text(json.dumps({"localhost": []}))
    job = grid_engine.submit("", "--run.dir", tmp_path / "run")
    time.sleep(4)
    assert grid_engine.state(job) == "qw"
    grid_engine.call("qdel", job)


def test_batch_scripts_are_clean_shell():
    """bash can parse every file; shellcheck finds nothing if it is installed."""
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *SCRIPTS], cwd=ROOT, check=True)
