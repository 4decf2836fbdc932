"""How a job ends when something is wrong: always, with one message, and with the code that was promised."""

import os
import re
import textwrap
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from helpers import mpirun

RANKS = 3
OTHERS_WAIT = "comm.barrier()  # the others wait here for a rank that never comes"


def job(folder: Path, body: str, prepare: str = "pass", ranks: int = RANKS, **variables: str) -> CompletedProcess[str]:
    """Run a script whose command does `prepare`, then `body` with `comm`, on every rank."""
    script = folder / "script.py"
    parts = [
        "import os, sys, time",
        "from pathlib import Path",
        "from mpilm.errors import *",
        "from mpilm.launch.run import run, together",
        "def main(comm):",
        f"    Path({str(folder)!r}, f'{{os.getpid()}}.pid').touch()",
        "    print(f'hello from {comm.rank} of {comm.size}', flush=True)",
        "    comm.barrier()",
        textwrap.indent(textwrap.dedent(body), "    "),
        "def prepare():",
        textwrap.indent(textwrap.dedent(prepare), "    "),
        "    return main",
        "run(prepare)",
    ]
    script.write_text("\n".join(parts))
    return mpirun(ranks, script, **variables)


def assert_no_orphans(folder: Path, ranks: int = RANKS) -> None:
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) == ranks
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if _runs(pid)]}"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def test_a_job_that_ends_well(tmp_path: Path) -> None:
    done = job(tmp_path, "print(f'{comm.all_gather_json(comm.rank)} on {comm.rank}', flush=True)")
    assert done.returncode == 0
    for rank in range(RANKS):  # a launcher may run the lines of its ranks together
        assert done.stdout.count(f"hello from {rank} of {RANKS}") == 1
        assert done.stdout.count(f"[0, 1, 2] on {rank}") == 1
    assert "mpilm" not in done.stderr
    assert_no_orphans(tmp_path)


def test_a_rank_that_raises_ends_the_job(tmp_path: Path) -> None:
    done = job(tmp_path, f"if comm.rank == 1: raise ValueError('boom')\n{OTHERS_WAIT}")
    assert done.returncode != 0
    assert done.stderr.count("mpilm:") == 1
    said = done.stderr[done.stderr.index("mpilm:") :]
    head = rf"mpilm: rank 1 of {RANKS} on \S+ failed:\nTraceback \(most recent call last\):\n"
    assert re.match(head + r"(  .*\n)+ValueError: boom\n", said)
    assert_no_orphans(tmp_path)


def test_all_ranks_raising_ends_the_job(tmp_path: Path) -> None:
    done = job(tmp_path, "raise ValueError('boom')")
    assert done.returncode != 0
    assert "ValueError: boom" in done.stderr
    assert_no_orphans(tmp_path)


@pytest.mark.parametrize(("way", "code"), [("sys.exit(3)", 3), ("raise NonFiniteError('loss is nan')", 87)])
def test_the_code_of_one_rank_ends_the_job(tmp_path: Path, way: str, code: int) -> None:
    done = job(tmp_path, f"if comm.rank == {RANKS - 1}: {way}\n{OTHERS_WAIT}")
    if done.returncode != code:  # MPICH's launcher may kill the aborting rank before it has left: the code we gave it counts
        assert done.returncode == 9
        assert f"Abort({code})" in done.stderr
    assert f"rank {RANKS - 1} of {RANKS}" in done.stderr
    assert_no_orphans(tmp_path)


def test_an_error_of_one_rank_found_together_is_said_once(tmp_path: Path) -> None:
    body = """
        def act():
            if comm.rank == 1:
                raise FileError("/data: cannot be read")
        together(comm, act)
        print("not reached", flush=True)
    """
    done = job(tmp_path, body)
    assert done.returncode == 74
    assert [line for line in done.stderr.splitlines() if "mpilm" in line] == ["mpilm: error: /data: cannot be read (on rank 1)"]
    assert "not reached" not in done.stdout
    assert "Traceback" not in done.stderr
    assert_no_orphans(tmp_path)


def test_a_wrong_config_is_said_once(tmp_path: Path) -> None:
    done = job(tmp_path, "pass", prepare="raise ConfigError('--train.steps must be above zero')")
    assert done.returncode == 78
    assert [line for line in done.stderr.splitlines() if "mpilm" in line] == ["mpilm: error: --train.steps must be above zero"]
    assert "hello" not in done.stdout


@pytest.mark.parametrize(
    ("leave", "code", "text"),
    [
        ("SystemExit('usage: train [-h]\\n', 0)", 0, "usage: train [-h]\n"),
        ("SystemExit('unknown flag\\n', 2)", 2, "unknown flag\n"),
        ("SystemExit('no such thing')", 1, "no such thing\n"),
    ],
    ids=["help", "flag", "text"],
)
def test_help_and_wrong_flags_are_printed_once(tmp_path: Path, leave: str, code: int, text: str) -> None:
    done = job(tmp_path, "pass", prepare=f"raise {leave}", ranks=2)
    assert done.returncode == code
    said, other = (done.stderr, done.stdout) if code else (done.stdout, done.stderr)
    assert said.count(text) == 1
    assert text not in other
    assert "hello" not in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_help_on_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    prepare = f"""
        from mpilm.errors import RANK_VARIABLES
        import os
        if next(os.environ[name] for name in RANK_VARIABLES if name in os.environ) == "{rank}":
            raise SystemExit("usage: train [-h]\\n", 0)
    """
    done = job(tmp_path, "pass", prepare=prepare, ranks=2)
    assert (done.returncode, done.stdout.count("usage: train [-h]")) == (0, 1)
    assert "hello" not in done.stdout


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_interrupted_job_says_so_in_one_line(tmp_path: Path, ranks: int) -> None:
    done = job(tmp_path, "raise KeyboardInterrupt", ranks=ranks)
    assert done.returncode in (130, 9)  # 9: of MPICH's launcher, which may kill a rank that has not left yet
    assert done.stderr.count("mpilm: interrupted") == 1
    assert "Traceback" not in done.stderr
    assert_no_orphans(tmp_path, max(1, ranks))


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_the_launcher_of_another_mpi_is_noticed(tmp_path: Path, variable: str) -> None:
    done = job(tmp_path, "pass", ranks=0, **{variable: "4"})
    assert done.returncode == 78
    assert "the launcher started 4 ranks, but" in done.stderr
    assert "sees a world of 1: mpirun belongs to another MPI" in done.stderr
    assert "hello" not in done.stdout


def test_without_a_launcher_a_job_is_one_rank(tmp_path: Path) -> None:
    done = job(tmp_path, "raise KeyError('boom')", ranks=0)
    assert done.returncode == 1
    assert done.stdout == "hello from 0 of 1\n"
    assert done.stderr.endswith("KeyError: 'boom'\n")
    assert "rank 0 of 1" in done.stderr
