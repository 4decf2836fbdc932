"""Training jobs of a few ranks for tests that watch them, inject faults and read what they leave."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import OPEN_MPI, read_metrics

from mpilm.checkpoint.format import list_checkpoints

ROOT = Path(__file__).parents[1]
SMALL = (
    "--model.n-layers", 1, "--model.d-model", 32, "--model.n-heads", 2, "--model.context-length", 16, "--model.dropout", 0.1,
    "--train.global-batch", 8, "--train.micro-batch", 2, "--train.threads", 1, "--train.device", "cpu",
    "--train.lr-schedule", "constant", "--run.log-every", 1, "--run.eval-batches", 1, "--generate.max-tokens", 0,
)  # fmt: skip
"""Flags of a run whose steps take a few milliseconds."""


PHASES = {
    "start-up": "point=mpi",
    "preparation": "point=prepare",
    "tokenizer training": "point=tokenizer",
    "model building": "point=build",
    "loading": "point=load",
    "first step": "step=0 point=forward",
    "later step": "step=3 point=backward",
    "first evaluation": "point=eval",
    "later evaluation": "point=eval after=1",
    "first save": "point=checkpoint.fsync",  # which ranks without a block to write pass too
    "later save": "step=5 point=checkpoint.fsync",
    "sample": "point=sample",
    "report": "point=report",
    "leaving": "point=leaving",
}
"""Phase -> where the rank stops. tests/faults/test_hanging.py has more of the steps."""


def slow_case(*values: object) -> Any:
    """Return a case that scripts/test leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def train_arguments(data: Path, run: Path, *more: object) -> list[str]:
    """Return Python's arguments for a small training run; later flags win."""
    return ["-m", "mpilm.train", *map(str, SMALL), "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def sleep_in_steps(first: int, last: int, seconds: float, rank: int = 1) -> str:
    """Return the faults that make a rank sleep in each of these steps, so that a test has time to act between them."""
    return ";".join(
        f"kind=sleep rank={rank} step={step} point=forward value={seconds}" for step in range(first, last + 1)
    )  # fmt: skip


class Job:
    """`mpirun -n RANKS python ARGUMENTS`, or plain python for 0 ranks, in a session of its own.

    `output` is complete once the job has ended. `flags`: of the mpirun next to `python`; `wrapper`: a command that runs it.
    """

    def __init__(
        self, ranks: int, arguments: Sequence[str], folder: Path, python: str = sys.executable, flags: Sequence[str] = (),
        wrapper: Sequence[str] = (), **variables: str,
    ):  # fmt: skip
        mpirun = Path(python).with_name("mpirun")
        if ranks and not mpirun.exists():
            pytest.skip(f"there is no {mpirun}")
        self.token = uuid.uuid4().hex
        self._output = folder / f"{self.token}.log"
        environment = {
            **os.environ, **OPEN_MPI, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPILM_TEST_TOKEN": self.token,
            **variables,
        }  # fmt: skip
        launcher = [str(mpirun), *flags, "-n", str(ranks)] if ranks else []
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [*wrapper, *launcher, python, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Return the process ids of the launcher, its helpers and the ranks that still run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.token.encode() in (folder / "environ").read_bytes() and _process_state(folder) != "Z":
                    found.append(int(folder.name))
        return sorted(found)

    def rank_processes(self) -> list[int]:
        """Return the process ids of the ranks, by rank."""
        found = {}
        for pid in self.processes():
            with contextlib.suppress(OSError, StopIteration):
                if "python" in os.readlink(f"/proc/{pid}/exe"):
                    lines = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
                    variables = dict(line.split("=", 1) for line in lines if "=" in line)
                    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
                    found[int(next(variables[name] for name in names if name in variables))] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_until(self, condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
        """Return the value of `condition` once it is true; fail if the job ends before."""
        deadline = time.monotonic() + limit_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the job ended by itself with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {limit_s} s:\n{self.output}"
            time.sleep(0.005)
        return value

    def wait(self, limit_s: float = 60.0) -> int:
        """Return the exit code once every process has ended."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the job did not end within {limit_s} s:\n{self.output}")
        self.wait_for_processes()
        return code

    def wait_for_processes(self, limit_s: float = 10.0) -> None:
        """Return once every process has ended; fail if one does not."""
        deadline = time.monotonic() + limit_s
        while running := self.processes():
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"processes {running} still run:\n{self.output}")
            time.sleep(0.02)

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def start_job(ranks: int, arguments: Sequence[str], folder: Path, **more: Any) -> Iterator[Job]:
    """Yield a running job; kill what is left of it afterwards."""
    job = Job(ranks, arguments, folder, **more)
    try:
        yield job
    finally:
        job.kill()


def run_serially(arguments: Sequence[str], folder: Path) -> tuple[str, dict[str, bytes], list[list[Any]]]:
    """Run a training job in FOLDER/run on one rank, to its end; return its outcome."""
    with start_job(0, arguments, folder) as job:
        assert job.wait(150) == 0, job.output
    return read_outcome(folder / "run")


def logged_step(run: Path) -> int:
    """Return the last step in metrics.jsonl; 0 if it does not exist yet."""
    try:
        return max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0)
    except OSError:
        return 0


def read_outcome(run: Path) -> tuple[str, dict[str, bytes], list[list[Any]]]:
    """Return name and bits of the newest checkpoint, and the numbers of every step."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    files = {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "event" not in row]
    return newest.name, files, [[row.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")] for row in rows]


def _process_state(folder: Path) -> str:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]
