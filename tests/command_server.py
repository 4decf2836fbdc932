"""Runs commands of mpilm, each in a process forked from this one, which has imported the package already. Ranks are threads.

Reads a JSON object per line, {"words": ["mpirun", "-n", "2", "python", "-m", "mpilm.train", ...], "folder": F, "output": O},
runs the command in the folder F with its output in the file O, and answers with a line: the exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from thread_ranks import run_ranks

import mpilm.evaluate
import mpilm.generate
import mpilm.prepare
import mpilm.report
import mpilm.trainer.loop  # noqa: F401
from mpilm.comm.collective_errors import CollectiveError
from mpilm.errors import UserError
from mpilm.launch import run as launch

LIMIT_S = 60


def run_on_threads(ranks: int) -> Callable[[Callable], None]:  # type: ignore[type-arg]
    """Return a replacement of launch.run.run, which starts `ranks` ranks as threads of this process."""

    def run(parse: Callable) -> None:  # type: ignore[type-arg]
        try:
            run_ranks(ranks, parse())
        except (CollectiveError, UserError) as error:
            print(f"mpilm: error: {error}")
            sys.exit(getattr(error, "error", error).code)
        except SystemExit as stop:
            if len(stop.args) == 2:  # --help: text and code
                print(stop.args[0])
                sys.exit(stop.args[1])
            raise

    return run


def run_command(words: list[str], folder: str, output: str) -> NoReturn:
    """Run the command and exit."""
    signal.alarm(LIMIT_S)
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    ranks, words = (int(words[2]), words[3:]) if words[0] == "mpirun" else (1, words)
    words = ["python", "-m", *words] if words[0] == "mpilm" else words
    assert words[:2] == ["python", "-m"], words
    launch.run = run_on_threads(ranks)
    sys.argv = words[2:]
    code = 0
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    for line in sys.stdin:
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            run_command(**json.loads(line))


if __name__ == "__main__":
    main()
