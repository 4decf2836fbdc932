"""Fault injection: kill, stop, slow down or mislead a rank at a named point of the program.

The environment variable MPILM_FAULT describes the faults, separated by semicolons:

    MPILM_FAULT="kind=sleep rank=1 step=7 point=checkpoint.write value=80"

`rank` and `step` may be omitted (any). `after`: how often the point is passed first; `value`: seconds to sleep. Every fault
prints a line when it fires. The code under test contains no fault points: `install_faults` wraps the functions in POINTS.
"""

import ctypes
import errno
import functools
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGE = "mpilm.parallel.pipeline.stage:ModelStage"
POINTS: Mapping[str, Sequence[str]] = {
    "data.next": [f"{STAGE}.fetch_batch"],
    "forward": [f"{STAGE}.forward"],
    "backward": [f"{STAGE}.backward", f"{STAGE}.backward_input"],
    "p2p.send": ["mpilm.comm.instrumented:InstrumentedComm._isend"],
    "reduce.before": [f"{STAGE}.reduce"],
    "reduce.after": [f"{STAGE}.reduce"],
    "optimizer": ["mpilm.optim.optimizer:Optimizer.step"],
    "eval": ["mpilm.trainer.hooks:validation_loss"],
    "checkpoint.open": ["mpilm.checkpoint.save:PendingCheckpoint.__init__"],
    "checkpoint.write": ["mpilm.checkpoint.save:FileBlockWriter.write"],
    "checkpoint.fsync": ["mpilm.checkpoint.save:FileBlockWriter.close"],
    "checkpoint.manifest": ["mpilm.checkpoint.format:CheckpointFolder.commit"],
    "checkpoint.rename": ["mpilm.checkpoint.format:CheckpointFolder.rename"],
    "checkpoint.cleanup": ["mpilm.checkpoint.manager:CheckpointManager._start_pruning"],
    "recover.agree": ["mpilm.trainer.recovery.elastic:agree_on_survivors"],
    "recover.give": ["mpilm.trainer.recovery.memory_checkpoint:RecoveredState.broadcast_range"],
    "leaving": ["mpilm.trainer.loop:exit_barrier"],
    "mpi": ["mpilm.launch.run:connect_world"],
    "command": ["mpilm.launch.run:_run_command"],
    "prepare": ["mpilm.trainer.build:open_training_data"],
    "tokenizer": ["mpilm.data.tokenizer:train_bpe"],
    "build": ["mpilm.trainer.build:partition_model"],
    "load": ["mpilm.trainer.build:load_state"],
    "sample": ["mpilm.trainer.loop:_sample_text"],
    "report": ["mpilm.trainer.loop:_write_report"],
}
"""Point -> the functions (module:qualified name) before which it lies; reduce.after lies behind its function."""


def _loop_forever(value: float) -> None:
    while True:
        pass


def _hold_interpreter_lock(value: float) -> None:
    """Sleep with the interpreter lock held; for ever if `value` is 0 (a read resumes after a signal, a sleep would end)."""
    libc = ctypes.PyDLL(None)
    if value:
        libc.usleep(int(1e6 * value))
    else:
        libc.read(os.pipe()[0], ctypes.create_string_buffer(1), ctypes.c_size_t(1))


def _work_slowly(value: float) -> None:
    """Read a little each half second, for so many seconds."""
    end = time.monotonic() + value
    while time.monotonic() < end:
        time.sleep(0.5)
        Path("/proc/self/stat").read_bytes()


def _raise(error: Exception, value: float) -> None:
    raise error


def _exhaust_memory(value: float) -> None:
    """Limit the address space of the rank to its present size and allocate more."""
    import torch

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now, now))
    torch.empty(1 << 30)


KINDS: Mapping[str, Callable[[float], object]] = {
    "kill": lambda value: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda value: os.kill(os.getpid(), signal.SIGSTOP),
    "segv": lambda value: os.kill(os.getpid(), signal.SIGSEGV),
    "hold": _hold_interpreter_lock,
    "loop": _loop_forever,
    "sleep": time.sleep,
    "slow": _work_slowly,
    "raise": functools.partial(_raise, ValueError("injected by MPILM_FAULT")),
    "exit": lambda value: sys.exit(3),
    "os_exit": lambda value: os._exit(3),
    "memory": _exhaust_memory,
    "enospc": functools.partial(_raise, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
}


@dataclass
class InjectedFault:
    """A fault that fires once, when its point has been passed `after` times on its rank in its step."""

    kind: str
    point: str
    rank: int | None = None
    step: int | None = None
    after: int = 0
    value: float = 0.0
    passed: int = field(default=0, init=False)

    def maybe_fire(self, rank: int, step: int) -> None:
        if self.rank not in (None, rank) or self.step not in (None, step):
            return
        self.passed += 1
        if self.passed == self.after + 1:
            os.write(2, f"fault: {self.kind} at {self.point} of step {step} on rank {rank}\n".encode())
            KINDS[self.kind](self.value)


def install_faults(description: str, rank: int) -> None:
    """Wrap the functions at the points of the described faults, in this process. `rank`: its world rank at the start."""
    from mpilm.comm.flight_recorder import FlightRecorder

    step = [0]
    _wrap(FlightRecorder, "enter", lambda recorder, phase, number=-1: step.__setitem__(0, number))
    for fault in [_parse_fault(text) for text in description.split(";") if text.strip()]:
        for target in POINTS[fault.point]:
            module, _, name = target.partition(":")
            *outer, attribute = name.split(".")
            owner = functools.reduce(getattr, outer, importlib.import_module(module))
            _wrap(owner, attribute, lambda *_, fault=fault: fault.maybe_fire(rank, step[0]), fault.point.endswith(".after"))


def _wrap(owner: Any, attribute: str, notify: Callable[..., object], after: bool = False) -> None:
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if not after:
            notify(*arguments)
        result = function(*arguments, **options)
        if after:
            notify(*arguments)
        return result

    setattr(owner, attribute, wrapper)


def _parse_fault(text: str) -> InjectedFault:
    values = dict(part.split("=", 1) for part in text.split())
    if values["kind"] not in KINDS or values["point"] not in POINTS:
        raise ValueError(f"MPILM_FAULT: {text}")
    numbers = {key: int(values[key]) for key in ("rank", "step", "after") if key in values}
    return InjectedFault(values["kind"], values["point"], **numbers, value=float(values.get("value", 0)))
