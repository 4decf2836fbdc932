"""Shared parts of the scripts that run a scheduler of emulated nodes on this machine (slurm-here, grid-engine-here)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin:/usr/lib/gridengine"}
SCRIPT = Path(sys.argv[0]).name


def install(programs: tuple[str, ...], packages: tuple[str, ...]) -> int:
    """Install the packages (Debian, Ubuntu; as root) if a program is missing; return the exit code."""
    if not find_missing_programs(programs):
        return 0
    if shutil.which("apt-get") is None or os.geteuid():
        print(f"{SCRIPT}: install these packages as root: apt-get install {' '.join(packages)}", file=sys.stderr)
        return 1
    environment = {**ENVIRONMENT, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{SCRIPT}: {done.stderr.strip()[-1000:]}", file=sys.stderr)
    return done.returncode


def find_missing_programs(programs: tuple[str, ...]) -> list[str]:
    return [program for program in programs if shutil.which(program, path=ENVIRONMENT["PATH"]) is None]


def find_start_problem(folder: Path, programs: tuple[str, ...]) -> str:
    """Return why no cluster can start in `folder`, and what to do instead; "" if one can."""
    if missing := find_missing_programs(programs):
        return f"{', '.join(missing)} not found; install them: scripts/{SCRIPT} install"
    if find_daemons(folder, programs):
        return f"a cluster already runs in {folder}; end it: scripts/{SCRIPT} stop {folder}"
    if "%" in str(folder) or " " in str(folder):
        return f"the scheduler's settings cannot contain {folder}; use a folder without % and spaces"
    return ""


def find_free_ports(count: int) -> int:
    """Return the first of `count` consecutive ports that are free."""
    for first in range(16817, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise SystemExit(f"{SCRIPT}: no free ports")


def start_daemon(folder: Path, variables: dict[str, str], name: str, *words: str) -> None:
    with open(folder / "log" / f"{name}.out", "ab") as output:
        daemon = subprocess.Popen(
            words, env=ENVIRONMENT | variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    (folder / "run" / f"{name}.started").write_text(f"{daemon.pid}\n")


def run_client(variables: dict[str, str], words: list[str], quiet: bool = False) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(words, env={**ENVIRONMENT, **variables}, capture_output=quiet, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{SCRIPT}: command not found: {words[0]}") from None


def find_daemons(folder: Path, programs: tuple[str, ...]) -> dict[str, int]:
    """Return the process ids of a cluster's running daemons, by name; without ids that another program has by now."""
    found = {}
    for file in (folder / "run").glob("*.started"):
        pid = int(file.read_text())
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() in programs:
                found[file.stem] = pid
    return found


def stop_daemons(folder: Path, programs: tuple[str, ...], grace_s: float = 10.0) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in find_daemons(folder, programs).values():
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        if wait_for(lambda: not find_daemons(folder, programs), grace_s):
            break
    for file in (folder / "run").glob("*.started"):
        file.unlink()


def wait_for(condition, limit_s: float) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
