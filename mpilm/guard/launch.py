"""Start and end of every command: find the world, run, and make sure that all ranks end together."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.together import AgreedError, together
from mpilm.errors import ConfigError, LostRankError, PreemptedError, UserError

R = TypeVar("R")
Body = Callable[[Comm], None]
LET_FIRST_SPEAK_S = 0.5
START_S = 1800.0  # for all ranks to come together; thousands take minutes
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "SLURM_PROCID")


def run(prepare: Callable[[], Body]) -> NoReturn:
    """Run a command on every rank and exit.

    `prepare` parses and validates without any communication and returns what is to be done with the world.
    """
    faulthandler.enable()  # a fatal signal leaves the stack of this rank
    body: Body | None = None
    failure: BaseException | None = None
    try:
        body = prepare()
    except (UserError, SystemExit) as error:
        failure = error
    except KeyboardInterrupt:
        os._exit(130)
    faulthandler.dump_traceback_later(START_S, exit=True)  # where a launcher has not started all, or one of them hangs
    comm = world()
    _end_with_launcher()
    try:
        code = _main(comm, body, failure)
    except BaseException as error:  # whatever it is, the other ranks must not wait for this one
        _end_all(comm, error)
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(code)


def _main(comm: Comm, body: Body | None, failure: BaseException | None) -> int:
    """The exit code of a command that ends in good order on every rank."""
    try:
        mine = _printed(failure) if isinstance(failure, SystemExit) else None
        ending = next((theirs for theirs in comm.all_gather_json(mine) if theirs), None)
        together(comm, lambda: _raise(failure if not isinstance(failure, SystemExit) else None))
        faulthandler.cancel_dump_traceback_later()  # all are here
        if ending is not None:  # --help, or flags that cannot be read, on one rank at least: said once, and all end
            text, code = ending
            if comm.rank == 0:
                print(text, end="", file=sys.stderr if code else sys.stdout, flush=True)
            _wait_to_leave(comm)
            return int(code)
        assert body is not None
        body(comm)
        return 0
    except AgreedError as agreed:
        if comm.rank == 0:
            word = "" if isinstance(agreed.error, PreemptedError) else "error: "
            print(f"mpilm: {word}{agreed.error}", file=sys.stderr, flush=True)
        _wait_to_leave(comm)
        return agreed.error.code


def _wait_to_leave(comm: Comm) -> None:
    """Nobody leaves before the message is out, and each gives its own code: when the first one has gone with another than 0 a
    launcher ends the rest, srun with SIGTERM. Collective."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    comm.barrier()


def _printed(stop: SystemExit) -> list[str | int]:
    """What is to be printed, and the exit code: of cli.parse, or as Python itself reads the exception."""
    if len(stop.args) == 2:
        return list(stop.args)
    return [stop.code + "\n", 1] if isinstance(stop.code, str) else ["", stop.code or 0]


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def _end_all(comm: Comm, error: BaseException) -> NoReturn:
    """An error that the other ranks know nothing of: print it and end the job, or they would wait for ever."""
    if isinstance(error, BrokenPipeError) and comm.size == 1:
        os._exit(141)  # whoever read the output has gone, as in `| head`
    code = error.code if isinstance(error, UserError) else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        code = 130
        time.sleep(LET_FIRST_SPEAK_S if comm.rank else 0)  # a terminal interrupts all ranks: one of them says so
    if comm.lost(error):
        error = LostRankError(
            f"another rank is not there any more ({error}); the same command goes on from the newest checkpoint"
        )
        code = error.code
    where = f"rank {comm.rank} of {comm.size} on {socket.gethostname()}"
    if isinstance(error, UserError):
        text = f"mpilm: error on {where}: {error}\n"
    elif isinstance(error, KeyboardInterrupt):
        text = f"mpilm: interrupted ({where}); checkpoints are whole, and the same command goes on from the newest\n"
    else:
        text = f"mpilm: {where} failed:\n" + "".join(traceback.format_exception(error))
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    if comm.size > 1:
        comm.abort(code or 1)
    os._exit(code or 1)


def _leave(code: int) -> NoReturn:
    if "mpilm.comm.mpi" in sys.modules:
        sys.modules["mpilm.comm.mpi"].finalize(code)
    sys.exit(code)


def _end_with_launcher() -> None:
    """Let the kernel end this rank when what started it dies, which then cannot do it itself: a rank by itself would wait, or
    train, for ever (prctl(2), PR_SET_PDEATHSIG)."""
    if announced_ranks() is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def announced_ranks() -> int | None:
    """How many ranks a launcher says it has started; None where there was no launcher that we know."""
    return next((int(os.environ[v]) for v in SIZE_VARIABLES if os.environ.get(v, "").isdigit()), None)


def world() -> Comm:
    """The ranks of this job: MPI's world, or one rank where no MPI is installed and no launcher was used.

    Raises ConfigError when the launcher belongs to another MPI than the library: each rank would train by itself.
    """
    announced = announced_ranks() or 1
    try:
        from mpilm.comm.mpi import library, mpi_world
    except (ImportError, RuntimeError) as error:
        if announced > 1:
            raise SystemExit(f"mpilm: error: started as {announced} ranks, but no MPI library can be loaded: {error}") from None
        return SelfComm("world")
    comm = mpi_world()
    if announced != comm.size and comm.size == 1:
        mismatch = ConfigError(
            f"the launcher started {announced} ranks, but {library()} sees a world of 1: mpirun belongs to another MPI than "
            "the library that Python loads; use the mpirun that came with it (in a virtual environment: its bin/mpirun), "
            "or the type that srun --mpi=list names for it (pmi2 for MPICH, pmix for Open MPI)"
        )
        if next((os.environ[v] for v in RANK_VARIABLES if v in os.environ), "0") == "0":
            print(f"mpilm: error: {mismatch}", file=sys.stderr, flush=True)
        raise SystemExit(mismatch.code)
    return comm
