"""The end of a job when something is wrong: in time, with one message, and with the exit code that was promised."""

import os
import re
import textwrap
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import NoReturn

import pytest
from helpers import messages, mpirun

from mpilm.launch.run import SIZE_VARIABLES, _parse_or_stop, connect_world

OTHERS_WAIT = "comm.barrier()  # the other ranks wait here"


def run_script(folder: Path, body: str, parse: str = "pass", ranks: int = 2, **variables: str) -> CompletedProcess[str]:
    """Run a script whose command does `parse`, then `body` with `comm`, on every rank."""
    script = folder / "script.py"
    parts = [
        "import os, sys, time",
        "from pathlib import Path",
        "from mpilm.comm.collective_errors import run_on_all_ranks",
        "from mpilm.errors import *",
        "from mpilm.launch.run import run",
        "def main(comm):",
        f"    Path({str(folder)!r}, f'{{os.getpid()}}.pid').touch()",
        "    print(f'hello from {comm.rank} of {comm.size}', flush=True)",
        "    comm.barrier()",
        textwrap.indent(textwrap.dedent(body), "    "),
        "def parse():",
        textwrap.indent(textwrap.dedent(parse), "    "),
        "    return main",
        "run(parse)",
    ]
    script.write_text("\n".join(parts))
    return mpirun(ranks, script, **variables)


def assert_no_process_left(folder: Path, ranks: int = 2) -> None:
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) == ranks
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if _is_running(pid)]}"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def test_job_without_errors_exits_with_0(tmp_path: Path) -> None:
    done = run_script(tmp_path, "print(f'{comm.all_gather_json(comm.rank)} on {comm.rank}', flush=True)", ranks=3)
    assert done.returncode == 0
    for rank in range(3):  # a launcher may join the lines of its ranks
        assert done.stdout.count(f"hello from {rank} of 3") == 1
        assert done.stdout.count(f"[0, 1, 2] on {rank}") == 1
    assert messages(done) == []
    assert_no_process_left(tmp_path, 3)


def test_exception_on_one_rank_ends_the_job_with_its_traceback(tmp_path: Path) -> None:
    done = run_script(tmp_path, f"if comm.rank == 1: raise ValueError('boom')\n{OTHERS_WAIT}", ranks=3)
    assert done.returncode != 0
    assert done.stderr.count("mpilm:") == 1
    head = r"mpilm: rank 1 of 3 on \S+ failed:\nTraceback \(most recent call last\):\n"
    assert re.match(head + r"(  .*\n)+ValueError: boom\n", done.stderr[done.stderr.index("mpilm:") :])
    assert_no_process_left(tmp_path, 3)


@pytest.mark.parametrize(("statement", "code"), [("sys.exit(3)", 3), ("raise NonFiniteError('loss is nan')", 87)])
def test_exit_code_of_one_rank_is_that_of_the_job(tmp_path: Path, statement: str, code: int) -> None:
    done = run_script(tmp_path, f"if comm.rank == 1: {statement}\n{OTHERS_WAIT}")
    if done.returncode != code:  # MPICH's launcher may kill the aborting rank before it has exited with its code
        assert done.returncode == 9
        assert f"Abort({code})" in done.stderr
    assert "rank 1 of 2" in done.stderr
    assert_no_process_left(tmp_path)


def test_user_error_raised_on_all_ranks_is_printed_once(tmp_path: Path) -> None:
    body = """
        def read():
            if comm.rank == 1:
                raise FileError("/data: cannot be read")
        run_on_all_ranks(comm, read)
        print("not reached", flush=True)
    """
    done = run_script(tmp_path, body)
    assert done.returncode == 74
    assert messages(done) == ["mpilm: error: /data: cannot be read (on rank 1)"]
    assert "not reached" not in done.stdout
    assert "Traceback" not in done.stderr
    assert_no_process_left(tmp_path)


def test_config_error_while_parsing_is_printed_once(tmp_path: Path) -> None:
    done = run_script(tmp_path, "pass", parse="raise ConfigError('--train.steps must be above zero')")
    assert done.returncode == 78
    assert messages(done) == ["mpilm: error: --train.steps must be above zero"]
    assert "hello" not in done.stdout


def test_unknown_flag_is_printed_once(tmp_path: Path) -> None:
    done = run_script(tmp_path, "pass", parse="raise SystemExit('unknown flag\\n', 2)")
    assert (done.returncode, done.stderr.count("unknown flag\n")) == (2, 1)
    assert "unknown flag" not in done.stdout
    assert "hello" not in done.stdout


def test_help_on_one_rank_ends_all_and_is_printed_once(tmp_path: Path) -> None:
    parse = """
        if not is_first_process():
            raise SystemExit("usage: train [-h]\\n", 0)
    """
    done = run_script(tmp_path, "pass", parse=parse)
    assert (done.returncode, done.stdout.count("usage: train [-h]\n")) == (0, 1)
    assert "usage" not in done.stderr
    assert "hello" not in done.stdout


@pytest.mark.parametrize(
    ("stop", "printed"),
    [
        (SystemExit("usage\n", 0), ("usage\n", 0)), (SystemExit("no such thing"), ("no such thing\n", 1)),
        (SystemExit(3), ("", 3)), (SystemExit(), ("", 0)),
    ],
    ids=repr,
)  # fmt: skip
def test_system_exit_is_read_as_python_does(stop: SystemExit, printed: tuple[str, int]) -> None:
    def parse() -> NoReturn:
        raise stop

    assert _parse_or_stop(parse) == (None, printed, None)


@pytest.mark.parametrize("ranks", [0, 2])
def test_interrupted_job_prints_one_line(tmp_path: Path, ranks: int) -> None:
    """All ranks raise, as when a terminal interrupts them."""
    done = run_script(tmp_path, "raise KeyboardInterrupt", ranks=ranks)
    assert done.returncode in (130, 9)  # 9: MPICH's launcher may kill a rank that has not exited yet
    assert done.stderr.count("mpilm: interrupted") == 1
    assert "Traceback" not in done.stderr
    assert_no_process_left(tmp_path, max(1, ranks))


def test_script_without_a_launcher_is_one_rank(tmp_path: Path) -> None:
    done = run_script(tmp_path, "raise KeyError('boom')", ranks=0)
    assert done.returncode == 1
    assert done.stdout == "hello from 0 of 1\n"
    assert done.stderr.endswith("KeyError: 'boom'\n")
    assert "rank 0 of 1" in done.stderr


def test_launcher_of_another_mpi_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for variable in SIZE_VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "4")
            with pytest.raises(SystemExit) as caught:
                connect_world()
        assert caught.value.code == 78
        error = capfd.readouterr().err
        assert "mpilm: error: the launcher started 4 ranks, but" in error
        assert "sees a world of 1: mpirun belongs to another MPI" in error
