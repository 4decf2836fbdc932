"""Training jobs of a few ranks that are watched, hit by faults and looked at afterwards."""

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
from helpers import OPEN_MPI

from mpilm.checkpoint.format import checkpoints
from mpilm.telemetry.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = (
    "--model.n-layers", 1, "--model.d-model", 32, "--model.n-heads", 2, "--model.context-length", 16, "--model.dropout", 0.1,
    "--train.global-batch", 8, "--train.micro-batch", 2, "--train.threads", 1, "--train.device", "cpu",
    "--train.lr-schedule", "constant", "--run.log-every", 1, "--run.eval-batches", 1, "--generate.max-tokens", 0,
)  # fmt: skip
"""A step of it takes a few milliseconds."""


def slow(*values: object) -> Any:
    """A case that scripts/test leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def command(data: Path, run: Path, *more: object) -> list[str]:
    """The words of a small training run; later ones win."""
    return ["-m", "mpilm.train", *map(str, SMALL), "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


class Job:
    """`mpirun -n RANKS python WORDS`, or plain python for 0 ranks, in a session of its own; `output` is complete once it has
    ended. `flags`: for mpirun, which is the one beside `python`; `within`: a command that runs it."""

    def __init__(
        self, ranks: int, words: list[str], folder: Path, python: str = sys.executable, flags: Sequence[str] = (),
        within: Sequence[str] = (), **variables: str,
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
                [*within, *launcher, python, *words], env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def members(self) -> list[int]:
        """The processes that are there: the launcher, its helpers, the ranks."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.token.encode() in (folder / "environ").read_bytes() and _state(folder) != "Z":
                    found.append(int(folder.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """The processes that train, by rank."""
        found = {}
        for pid in self.members():
            with contextlib.suppress(OSError, StopIteration):
                if "python" in os.readlink(f"/proc/{pid}/exe"):
                    words = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
                    said = dict(word.split("=", 1) for word in words if "=" in word)
                    found[int(next(said[v] for v in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if v in said))] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, what: Callable[[], Any], limit_s: float = 60.0) -> Any:
        """Until `what()` is true, while the job runs."""
        end = time.monotonic() + limit_s
        while not (found := what()):
            assert self.process.poll() is None, f"the job ended by itself with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < end, f"not within {limit_s} s:\n{self.output}"
            time.sleep(0.005)
        return found

    def end(self, limit_s: float = 60.0) -> int:
        """The exit code, once no process is left."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the job did not end within {limit_s} s:\n{self.output}")
        self.gone()
        return code

    def gone(self, limit_s: float = 10.0) -> None:
        """Every process of the job ends by itself."""
        end = time.monotonic() + limit_s
        while left := self.members():
            if time.monotonic() > end:
                self.kill()
                pytest.fail(f"processes {left} were left:\n{self.output}")
            time.sleep(0.02)

    def kill(self) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(ranks: int, words: list[str], folder: Path, **more: Any) -> Iterator[Job]:
    """A job; nothing of it is left behind."""
    job = Job(ranks, words, folder, **more)
    try:
        yield job
    finally:
        job.kill()


def finished(words: list[str], folder: Path) -> tuple[str, dict[str, bytes], list[list[Any]]]:
    """What a run in FOLDER/run leaves that one rank carries to its end."""
    with started(0, words, folder) as job:
        assert job.end() == 0, job.output
    return outcome(folder / "run")


def logged_step(run: Path) -> int:
    """The last step that has been written down."""
    try:
        return max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0)
    except OSError:
        return 0


def outcome(run: Path) -> tuple[str, dict[str, bytes], list[list[Any]]]:
    """The last checkpoint's bytes, and the numbers of every step."""
    newest = checkpoints(run / "checkpoints")[-1]
    files = {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "event" not in row]
    return newest.name, files, [[row.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")] for row in rows]


def _state(folder: Path) -> str:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]
