"""Faults brought about on purpose, for tests: a rank is killed, stopped, slowed down or led astray at a named point.

MPILM_FAULT="kind=kill rank=1 step=3 point=forward" in the environment; several are separated by semicolons. `rank` and `step`
may be left out (any); `after`: so many times the point is passed first; `value`: seconds of sleep. Every fault says that it
fires. A person has no use for this.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

VARIABLE = "MPILM_FAULT"
POINTS = (
    "data.next", "forward", "backward", "p2p.send", "p2p.receive", "reduce.before", "reduce.after", "optimizer", "eval",
    "checkpoint.open", "checkpoint.write", "checkpoint.fsync", "checkpoint.manifest", "checkpoint.rename",
    "checkpoint.cleanup", "recover.agree", "recover.give", "leaving",
)  # fmt: skip


def _loop(value: float) -> None:
    while True:
        pass


def _hold(value: float) -> None:
    """Sleep with the interpreter lock held; for ever where `value` is 0: a read goes on after a signal, where a sleep ends."""
    libc = ctypes.PyDLL(None)
    if value:
        libc.usleep(int(1e6 * value))
    else:
        libc.read(os.pipe()[0], ctypes.create_string_buffer(1), ctypes.c_size_t(1))


def _exit(value: float) -> None:
    sys.exit(3)


def _raise(value: float) -> None:
    raise ValueError("brought about on purpose")


def _os_error(number: int, value: float) -> None:
    raise OSError(number, os.strerror(number))


def _out_of_memory(value: float) -> None:
    """Let the rank have no more memory than it has, and ask for more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now, now))
    torch.empty(1 << 30)


KINDS: Mapping[str, Callable[[float], object]] = {
    "kill": lambda value: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda value: os.kill(os.getpid(), signal.SIGSTOP),
    "segv": lambda value: os.kill(os.getpid(), signal.SIGSEGV),
    "usr1": lambda value: os.kill(os.getpid(), signal.SIGUSR1),
    "hold": _hold,
    "loop": _loop,
    "sleep": time.sleep,
    "raise": _raise,
    "exit": _exit,
    "os_exit": lambda value: os._exit(3),
    "memory": _out_of_memory,
    **{name.lower(): partial(_os_error, getattr(errno, name)) for name in ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS")},
}


@dataclass
class Fault:
    """One that fires once, when its point has been passed `after` times on its rank in its step."""

    kind: str
    point: str
    rank: int | None = None
    step: int | None = None
    after: int = 0
    value: float = 0.0
    passed: int = field(default=0, init=False)

    def pass_by(self, rank: int, point: str, step: int) -> None:
        if point != self.point or self.rank not in (None, rank) or self.step not in (None, step):
            return
        self.passed += 1
        if self.passed == self.after + 1:
            os.write(2, f"fault: {self.kind} at {point} of step {step} on rank {rank}\n".encode())
            KINDS[self.kind](self.value)


def faults(rank: int) -> Callable[[str, int], None]:
    """What is to be called at every point, as the environment says."""
    found = [_parsed(words) for words in os.environ.get(VARIABLE, "").split(";") if words.strip()]

    def at(point: str, step: int) -> None:
        for fault in found:
            fault.pass_by(rank, point, step)

    return at


def _parsed(words: str) -> Fault:
    said = dict(word.split("=", 1) for word in words.split())
    if said["kind"] not in KINDS or said["point"] not in POINTS:
        raise ValueError(f"{VARIABLE}: {words}")
    numbers = {key: int(said[key]) for key in ("rank", "step", "after") if key in said}
    return Fault(said["kind"], said["point"], **numbers, value=float(said.get("value", 0)))
