"""Start and end of every command: find the world, run, and exit on all ranks alike."""

import contextlib
import ctypes
import faulthandler
import io
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.errors import RANK_VARIABLES, ConfigError, LostRankError, PreemptedError, UserError, is_first_process, to_user_error
from mpilm.launch.start import detect_lost_hosts, watch_start
from mpilm.launch.watchdog import MIN_LIMIT_S, Watchdog

Body = Callable[[Comm], None]
ROOT_FIRST_S = 0.5  # delay of the other ranks when a terminal interrupts all of them
START_TIMEOUT_S = 1800.0  # for all ranks to start; thousands take minutes
FAULT_VARIABLE = "MPILM_FAULT"  # set by tests (mpilm/testing/faults.py)
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")


def run(parse: Callable[[], Body]) -> NoReturn:
    """Run a command on every rank and exit. `parse` validates the arguments without communication and returns the function to
    call with the world; its attribute `step_timeout_s`, if any, is the limit of the watchdog."""
    sys.stdout, sys.stderr = (each or open(os.devnull, "w") for each in (sys.stdout, sys.stderr))  # noqa: SIM115 - if closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    faulthandler.enable()  # a fatal signal prints the stack of this rank
    faulthandler.dump_traceback_later(START_TIMEOUT_S, exit=True)  # if MPI does not start, which holds the interpreter lock
    if FAULT_VARIABLE in os.environ:
        from mpilm.testing.faults import install_faults

        install_faults(os.environ[FAULT_VARIABLE], launcher_rank())
    recorder, outcome = FlightRecorder(), _parse_or_stop(parse)
    recorder.step_timeout_s = getattr(outcome[0], "step_timeout_s", 0.0)
    with watch_start(launcher_rank(), launcher_world_size() or 1, recorder.step_timeout_s or MIN_LIMIT_S):
        detect_lost_hosts()
        comm = InstrumentedComm(connect_world(), recorder=recorder)
        watchdog = Watchdog(recorder, comm)
    faulthandler.cancel_dump_traceback_later()
    _exit_with_launcher()
    try:
        code = _run_command(comm, *outcome)
    except BaseException as error:  # of any kind: the other ranks must not wait for this one
        _abort_job(comm, error)
    watchdog.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpilm.comm.mpi" in sys.modules:
        sys.modules["mpilm.comm.mpi"].finalize(code)
    sys.exit(code)


def _run_command(comm: Comm, body: Body | None, stop: Any, error: UserError | None) -> int:
    """Return the exit code of a command that ends in an orderly way on every rank, from what `_parse_or_stop` has returned."""
    try:
        run_on_all_ranks(comm, lambda: _raise_if(error))
        stops = [stop for stop in comm.all_gather_json(stop) if stop]
        if not stops:
            assert body is not None
            body(comm)
            return 0
        text, code = stops[0]  # --help on one rank at least: printed once, and all ranks exit
        if comm.rank == 0:
            print(text, end="", file=sys.stderr if code else sys.stdout, flush=True)
    except CollectiveError as error:
        code = error.error.code
        if comm.rank == 0:
            prefix = "" if isinstance(error.error, PreemptedError) else "error: "
            print(f"mpilm: {prefix}{error}", file=sys.stderr, flush=True)
    # Wait until the message is printed: when the first rank exits with a code other than 0, a launcher ends the others
    # (srun with SIGTERM). Every rank then exits with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    comm.barrier()
    return int(code)


def _parse_or_stop(parse: Callable[[], Body]) -> tuple[Body | None, Any, UserError | None]:
    """Return the function to call, or the text and exit code of a SystemExit, or the error of the arguments. The parser's
    SystemExit has text and code as arguments."""
    try:
        return parse(), None, None
    except SystemExit as stop:
        if len(stop.args) == 2:
            return None, stop.args, None
        return None, (f"{stop.code}\n", 1) if isinstance(stop.code, str) else ("", stop.code or 0), None
    except Exception as error:
        if (problem := to_user_error(error)) is None:
            raise
        return None, None, problem


def _raise_if(error: UserError | None) -> None:
    if error is not None:
        raise error


def _abort_job(comm: Comm, error: BaseException) -> NoReturn:
    """Print an error raised on this rank alone and end the job; the other ranks would wait for ever."""
    if isinstance(error, BrokenPipeError) and comm.size == 1:
        os._exit(141)  # the reader of the output has exited, as in `| head`
    if comm.is_rank_failure(error):
        error = LostRankError(f"another rank has failed ({error}); the same command resumes from the newest checkpoint")
    error = to_user_error(error) or error
    where = f"rank {comm.rank} of {comm.size} on {socket.gethostname()}"
    if isinstance(error, UserError):
        code, text = error.code, f"mpilm: error on {where}: {error}\n"
    elif isinstance(error, KeyboardInterrupt):
        time.sleep(ROOT_FIRST_S if comm.rank else 0)  # a terminal interrupts all ranks: one message is enough
        code = 130
        text = f"mpilm: interrupted ({where}); checkpoints are complete, and the same command resumes from the newest\n"
    else:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        text = f"mpilm: {where} failed:\n" + "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(text, end="", file=sys.stderr, flush=True)
    if comm.size > 1:
        comm.abort(code or 1)
    os._exit(code or 1)


def _exit_with_launcher() -> None:
    """Let the kernel kill this rank when its parent dies (PR_SET_PDEATHSIG): an orphan would wait, or train, for ever."""
    if launcher_world_size() is not None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def launcher_rank() -> int:
    """Return the rank that a launcher has given to this process; 0 without a known launcher."""
    return next((int(os.environ[v]) for v in RANK_VARIABLES if os.environ.get(v, "").isdigit()), 0)


def launcher_world_size() -> int | None:
    """Return the number of ranks that a launcher says it has started; None without a known launcher."""
    return next((int(os.environ[v]) for v in SIZE_VARIABLES if os.environ.get(v, "").isdigit()), None)


def connect_world() -> Comm:
    """Return MPI's world, or one rank if no MPI is installed and no launcher was used. Exits when the launcher belongs to
    another MPI than the library: each rank would train by itself."""
    announced = launcher_world_size() or 1
    try:
        from mpilm.comm.mpi import mpi_library_name, mpi_world
    except (ImportError, RuntimeError) as error:
        if announced > 1:
            problem = f"mpilm: error: started as {announced} ranks, but no MPI library can be loaded: {error}"
            raise SystemExit(problem if is_first_process() else 1) from None
        return SelfComm("world")
    comm = mpi_world()
    if announced != comm.size and comm.size == 1:
        mismatch = ConfigError(
            f"the launcher started {announced} ranks, but {mpi_library_name()} sees a world of 1: mpirun belongs to another "
            "MPI than the library that Python loads; use the mpirun that came with it (in a virtual environment: "
            "its bin/mpirun), or the type that srun --mpi=list names for it (pmi2 for MPICH, pmix for Open MPI)"
        )
        if is_first_process():
            print(f"mpilm: error: {mismatch}", file=sys.stderr, flush=True)
        raise SystemExit(mismatch.code)
    return comm
