"""Stand-ins for schedulers that cannot run here: their commands, and the environment, signals and exit codes of their jobs, as
their public documentation describes them. A test starts each job itself, so that nothing waits in a queue.

Sources: PBS Professional User's Guide (qsub, qstat -f); IBM Spectrum LSF 10.1 Command Reference (bsub -Q, -wa, -wt; bjobs
time_left; bkill) and its environment variables; flux-core's manual pages (flux-batch, flux-run, flux-job, flux-hostlist,
flux-environment); HTCondor Manual (parallel applications, condor_submit) and its sshd.sh; the MPI Operator's v2beta1 API.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from helpers import OPEN_MPI
from training_jobs import ROOT

RECORD = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
folder = Path({folder!r})
name, words = Path(sys.argv[0]).name, sys.argv[1:]
"""
SUBMIT = """
if {answers}:
    sys.exit({version_code})
number = len(list(folder.glob("*.job"))) + 1
job = {{"words": words, "stdin": sys.stdin.read() if {reads} else "", "folder": os.getcwd(), "environment": dict(os.environ)}}
(folder / f"{{number}}.job").write_text(json.dumps(job))
print({printed})
"""
LAUNCHER = """
if words == ["--version"]:
    os.execv({program!r}, [{program!r}, *words])
with open(folder / "launched", "a") as file:
    hosts = Path(words[words.index("--hostfile") + 1]).read_text().split() if "--hostfile" in words else []
    file.write(json.dumps({{"words": words, "hosts": hosts}}) + "\\n")
if any((folder / f"{{host}}.down").exists() for host in hosts):
    sys.exit(255)
if words[-1] == "true":
    sys.exit(0)
if hosts:
    (folder / "local").write_text("localhost\\n" * len(hosts))
    words[words.index("--hostfile") + 1] = str(folder / "local")
os.execv({program!r}, [{program!r}, *words])
"""
STUB = """
import signal, time
if words == ["--version"]:
    sys.exit(print("HYDRA build details:"))
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
(folder / "running").touch()
end = time.monotonic() + 20
while not stop and (folder / "hold").exists():
    time.sleep(0.02)
    if (folder / "crash").exists():
        (folder / "crash").unlink()
        (folder / "hold").unlink()
        sys.exit(137)
    if time.monotonic() > end:
        sys.exit(1)
(folder / "running").unlink()
sys.exit(75 if stop else 0)
"""
"""A stand-in for mpirun and ranks, for tests of the scripts: it ends at once or, while a file `hold` exists, at SIGUSR1, or
with another code once there is a file `crash`."""


class FakeScheduler:
    """A scheduler of one user whose hosts are n1 and n2, with two ranks each."""

    suffix, submitter, printed = "", "", "number"
    answers, version_code, reads = "False", 0, False  # the words to which the command answers with its version

    def __init__(self, folder: Path, launcher: str = ""):
        """`launcher`: the real mpirun; without one, no ranks start."""
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        code = LAUNCHER.format(program=launcher or str(self._command("stub", STUB)))
        self.launcher = self._command("fake-mpirun", code)
        submit = SUBMIT.format(answers=self.answers, version_code=self.version_code, reads=self.reads, printed=self.printed)
        self._command(self.submitter, submit)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MPILM_"))}, **OPEN_MPI,
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "MPILM_SITE": "/dev/null", "MPILM_DOCTOR": "off", "MPILM_MPIRUN": str(self.launcher),
        }  # fmt: skip
        self.write_commands()

    def _command(self, name: str, code: str) -> Path:
        path = self.bin / name
        path.write_text(RECORD.format(folder=str(self.folder)) + code)
        path.chmod(0o755)
        return path

    def write_commands(self) -> None:
        """Create the other commands of the scheduler."""

    def script(self, task: str) -> list[str]:
        """Return the first words of jobs/submit for a task."""
        return [f"{ROOT}/jobs/{task}.{self.suffix}"]

    def call(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, words)], cwd=self.folder, env={**self.environment, **variables}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    def submit(self, task: str, *words: object, **variables: str) -> str:
        """Submit with jobs/submit and return the number of the job."""
        done = self.call(ROOT / "jobs" / "submit", *self.script(task), *words, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self) -> list[dict[str, Any]]:
        """Return what the submissions were, in their order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.job"), key=lambda path: int(path.stem))]

    def launched(self) -> list[dict[str, Any]]:
        """Return what each launcher was started with."""
        path = self.folder / "launched"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(self, number: int, left_s: float = 3600.0) -> subprocess.Popen[str]:
        """Start a job that the scheduler will end in `left_s` seconds."""
        (self.folder / "end").write_text(str(time.time() + left_s))
        job = self.jobs()[number - 1]
        words, variables, folder = self.command(number, job)
        with open(self.folder / "log", "a") as log:
            return subprocess.Popen(
                words, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                text=True,
            )  # fmt: skip

    def command(self, number: int, job: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
        """Return how the scheduler starts a job: words, environment and folder."""
        raise NotImplementedError

    def _script_words(self, number: int, text: str) -> list[str]:
        path = self.folder / f"{number}.script"  # schedulers copy the script into a spool folder
        path.write_text(text)
        return ["bash", str(path)]

    def _hosts(self) -> Path:
        path = self.folder / "hosts"
        path.write_text("n1\nn1\nn2\nn2\n")
        return path

    def warn(self, job: subprocess.Popen[str]) -> None:
        """Announce the end of a job's time."""
        os.killpg(job.pid, signal.SIGUSR1)

    def cancel(self, job: subprocess.Popen[str]) -> None:
        os.killpg(job.pid, signal.SIGTERM)

    def is_requeued(self, code: int, before: int) -> bool:
        """Return True if a job that ended with this code will start again; `before`: how many jobs there were."""
        return code == 99

    def excluded(self, job: dict[str, Any]) -> str:
        """Return the words of a submission that exclude hosts."""
        raise NotImplementedError

    def log(self) -> str:
        return (self.folder / "log").read_text()


class Pbs(FakeScheduler):
    """PBS: passes only the named variables, starts in the home folder, and sends no warning."""

    suffix, submitter, printed, reads = "pbs", "qsub", "f'{number}.server'", True
    answers = "words == ['--version']"
    QSTAT = """
import time
end = float((folder / "end").read_text())
start = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(end - 3600))
print(f"Job Id: {words[-1]}\\n    Job_Name = mpilm-train\\n    resources_used.walltime = 00:00:01\\n    job_state = R")
print(f"    Resource_List.walltime = 01:00:00\\n    stime = {start}\\n    substate = 42")
"""

    def write_commands(self) -> None:
        self._command("qstat", self.QSTAT)

    def command(self, number: int, job: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
        names = job["words"][job["words"].index("-v") + 1].split(",")
        variables = {name: job["environment"][name] for name in names}
        variables |= {name: self.environment[name] for name in ("PATH", "PYTHONPATH", "HOME", *OPEN_MPI)}
        variables |= {"PBS_JOBID": f"{number}.server", "PBS_NODEFILE": str(self._hosts()), "PBS_O_WORKDIR": job["folder"]}
        return self._script_words(number, job["stdin"]), variables, "/"

    def is_requeued(self, code: int, before: int) -> bool:
        return len(self.jobs()) == before + 1

    def excluded(self, job: dict[str, Any]) -> str:
        return ""  # `select` cannot exclude hosts


class Lsf(FakeScheduler):
    """LSF: -wa USR1 is the warning; bkill sends SIGINT, then SIGTERM; -Q lists the codes that return a job."""

    suffix, submitter, printed, reads = "lsf", "bsub", "f'Job <{number}> is submitted to default queue <normal>.'", True
    BJOBS = """
import time
left = float((folder / "end").read_text()) - time.time()
print(f"{int(left // 3600)}:{int(left // 60) % 60} L")
"""

    def write_commands(self) -> None:
        self._command("bjobs", self.BJOBS)

    def command(self, number: int, job: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
        variables = {"LSB_JOBID": str(number), "LSB_DJOB_HOSTFILE": str(self._hosts())}
        return self._script_words(number, job["stdin"]), {**job["environment"], **variables}, job["folder"]

    def cancel(self, job: subprocess.Popen[str]) -> None:
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(0.1)
        os.killpg(job.pid, signal.SIGTERM)

    def is_requeued(self, code: int, before: int) -> bool:
        codes = re.search(r'^#BSUB -Q "(.*)"', self.jobs()[-1]["stdin"], re.M)
        return codes is not None and str(code) in codes[1].split()

    def excluded(self, job: dict[str, Any]) -> str:
        return job["words"][job["words"].index("-R") + 1]


class Flux(FakeScheduler):
    """Flux: the script is the first program of an instance, where `flux run` starts the ranks."""

    suffix, submitter = "flux", "flux"
    FLUX = """
import signal, time
if words[:1] == ["--parent"]:
    words = words[1:]
if words[0] == "batch":
    number = len(list(folder.glob("*.job"))) + 1
    job = {"words": words, "stdin": "", "folder": os.getcwd(), "environment": dict(os.environ)}
    (folder / f"{number}.job").write_text(json.dumps(job))
    print(f"f{number}")
elif words[0] == "getattr":
    print("f1")
elif words[0] == "hostlist":
    print("n1\\nn2")
elif words[:2] == ["job", "timeleft"]:
    print(int(float((folder / "end").read_text()) - time.time()))
elif words[:2] == ["job", "last"]:
    print("f2")
elif words[:2] == ["job", "kill"]:
    os.kill(int((folder / "ranks").read_text()), signal.SIGUSR1)
elif words[0] == "run":
    (folder / "ranks").write_text(str(os.getpid()))
    without = next((word.split(":")[1].split(",") for word in words if word.startswith("--requires=-host:")), [])
    only = next((word.split(":")[1] for word in words if word.startswith("--requires=host:")), "")
    hosts = [only] if only else [host for host in ("n1", "n1", "n2", "n2") if host not in without]
    with open(folder / "launched", "a") as file:
        file.write(json.dumps({"words": words, "hosts": hosts}) + "\\n")
    if any((folder / f"{host}.down").exists() for host in hosts):
        sys.exit(255)
    if words[-1] == "true":
        sys.exit(0)
    flags = [word for word in words[1:] if word.startswith("--") and words.index(word) < words.index("python")]
    count = next(flag.split("=")[1] for flag in flags if flag.startswith("--ntasks="))
    os.execv(os.environ["FAKE_LAUNCHER"], [os.environ["FAKE_LAUNCHER"], "-n", count, *words[words.index("python"):]])
else:
    sys.exit(f"unknown: {words}")
"""

    def __init__(self, folder: Path, launcher: str = ""):
        super().__init__(folder, launcher)
        self._command("flux", self.FLUX)
        self.environment["FAKE_LAUNCHER"] = launcher or str(self.bin / "stub")

    def command(self, number: int, job: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
        words = job["words"][1:]
        script = next(index for index, word in enumerate(words) if word.endswith(".flux"))
        text = Path(words[script]).read_text()
        sizes = "MPILM_RANKS_PER_NODE=2 MPILM_CORES_PER_RANK=1"
        text = re.sub("MPILM_RANKS_PER_NODE=.*", sizes, text)
        variables = {**job["environment"], "FLUX_URI": "local:///tmp/fake"}
        return [*self._script_words(number, text), *words[script + 1 :]], variables, job["folder"]

    def is_requeued(self, code: int, before: int) -> bool:
        return len(self.jobs()) == before + 1

    def excluded(self, job: dict[str, Any]) -> str:
        return next(word for word in job["words"] if word.startswith("--requires"))


class Htcondor(FakeScheduler):
    """HTCondor: on node 0, sshd.sh has written a contact file; SIGTERM announces an eviction or a removal."""

    suffix, submitter, printed = "condor", "condor_submit", "f'{number}.0 - {number}.0'"

    def script(self, task: str) -> list[str]:
        return [f"{ROOT}/jobs/htcondor.condor", task]

    def write_commands(self) -> None:
        libexec = self.folder / "libexec"
        libexec.mkdir()
        (libexec / "sshd.sh").write_text(
            'printf "1 n2 4445 user\\n0 n1 4444 user\\n" > "$_CONDOR_SCRATCH_DIR/contact"\nsshd_cleanup() { :; }\n'
        )
        self._command("condor_config_val", f"print({str(libexec)!r})\n")

    def command(self, number: int, job: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
        line = next(word for word in job["words"] if word.startswith("arguments = "))
        text = line.removeprefix('arguments = "').removesuffix('"').replace('""', '"')
        words = [word.replace("''", "'") for word in re.findall(r"'((?:[^']|'')*)'", text)]
        (self.folder / "ad").write_text(f"ClusterId = {number}\nJobCurrentStartDate = {int(time.time())}\nNumJobStarts = 0\n")
        variables = {
            "_CONDOR_PROCNO": "0", "_CONDOR_NPROCS": "2", "_CONDOR_SCRATCH_DIR": str(self.folder),
            "_CONDOR_JOB_AD": str(self.folder / "ad"), "MPILM_RANKS_PER_NODE": "2",
        }  # fmt: skip
        return ["bash", *words], {**job["environment"], **variables}, job["folder"]

    def excluded(self, job: dict[str, Any]) -> str:
        return next(word for word in job["words"] if word.startswith("requirements"))


class Kubernetes(FakeScheduler):
    """The MPI Operator: the launcher's command, with the file of workers; every code but 0 starts it again."""

    suffix, submitter, printed, reads = "yaml", "kubectl", "f'mpijob.kubeflow.org/mpilm-{number}'", True

    def script(self, task: str) -> list[str]:
        return [f"{ROOT}/jobs/kubernetes.yaml", task]

    def command(self, number: int, job: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
        replicas = yaml.safe_load(job["stdin"])["spec"]["mpiReplicaSpecs"]
        (container,) = replicas["Launcher"]["template"]["spec"]["containers"]
        (self.folder / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
        variables = {
            **{entry["name"]: entry["value"] for entry in container["env"]}, "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "HOSTNAME": "mpilm-launcher", "OMPI_MCA_orte_default_hostfile": str(self.folder / "hosts"),
        }  # fmt: skip
        words = [*container["command"], *container["args"]]
        words = [word.replace("jobs/run", f"{ROOT}/jobs/run") for word in words]
        return words, {**self.environment, **variables}, job["folder"]

    def is_requeued(self, code: int, before: int) -> bool:
        return code != 0

    def excluded(self, job: dict[str, Any]) -> str:
        worker = yaml.safe_load(job["stdin"])["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
        affinity = worker["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return json.dumps(affinity["nodeSelectorTerms"][0]["matchExpressions"][0])


FAKES = {"pbs": Pbs, "lsf": Lsf, "flux": Flux, "htcondor": Htcondor, "kubernetes": Kubernetes}
