"""Errors for the user, each with an exit code that scripts can rely on."""

import errno
import os
import resource
import socket
import sys
from types import TracebackType

OUT_OF_MEMORY_TEXTS = (  # of torch, on a CPU and a GPU, of the dynamic loader, and of Python
    "allocate memory", "out of memory", "Storage size calculation overflowed", "map segment", "start new thread",
)  # fmt: skip
MESSAGE_LENGTH = 4010  # most characters: names and values from files may be as long as the files
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "SLURM_PROCID")  # by launcher


def is_first_process() -> bool:
    """Return whether the launcher calls this process rank 0, so that it may print before MPI is up."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


class UserError(Exception):
    """A problem that the user can fix. The message says what is wrong, where, and what to write instead; at most a page."""

    code = 1

    def __init__(self, message: object = ""):
        text = str(message)
        super().__init__(text if len(text) < MESSAGE_LENGTH else f"{text[:3000]} [...] {text[-1000:]}")


class ConfigError(UserError):
    code = 78  # EX_CONFIG: a setting, or a combination of settings, that cannot work


class DataError(UserError):
    code = 65  # EX_DATAERR: text or tokens that cannot be used as they are


class FileError(UserError):
    code = 74  # EX_IOERR: a file or folder that cannot be read or written


class PreemptedError(UserError):
    code = 75  # EX_TEMPFAIL: no error; a run that was asked to stop has saved and waits to be restarted


class NonFiniteError(UserError):
    code = 87  # a loss or gradient that is infinite or NaN


class RanksDisagreeError(UserError):
    code = 88  # ranks that should hold the same values or make the same calls, but do not


class OutOfMemoryError(UserError):
    code = 71  # EX_OSERR: a memory allocation that failed on a rank


class LostRankError(UserError):
    code = 89  # ranks of the job have failed, and the others cannot continue without them


class NotReproducedError(UserError):
    code = 90  # a run whose records say something else than its recomputation, or two runs that differ


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the host or a GPU has run out of memory, or that a limit (ulimit -v) is reached."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    is_library_error = isinstance(error, (RuntimeError, ImportError, OSError))
    return is_library_error and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def to_user_error(error: BaseException) -> UserError | None:
    """Return a UserError itself; OutOfMemoryError or FileError (such as for a removed folder) for another error; else None."""
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC) and not is_out_of_memory(error):
        name = os.fsdecode(error.filename) if error.filename else "the output"
        return FileError(f"{name} cannot be used: {error.strerror} (on {socket.gethostname()})")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        return FileError("a path begins with ~ and a user who does not exist here; write it in full")
    if isinstance(error, UserError) or not is_out_of_memory(error):
        return error if isinstance(error, UserError) else None
    lines = str(error).strip().splitlines()
    reasons = [line for line in lines if any(text in line for text in OUT_OF_MEMORY_TEXTS)] or lines
    detail = "".join(f" ({line[:200]})" for line in reasons[:1])
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    allowed = f", of which ulimit -v allows this process {limit >> 20:,} MiB" if limit != resource.RLIM_INFINITY else ""
    advice = "raise the limit, start fewer ranks a node, or use a smaller model or input"
    return OutOfMemoryError(f"out of memory{detail}{allowed}; {advice}")


def print_uncaught_error(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    """Exit with one message if the user can fix the error, such as too little memory to import torch: an excepthook."""
    if (problem := to_user_error(error)) is not None:
        print(f"mpilm: error: {problem}", file=sys.stderr, flush=True)
        os._exit(problem.code)
    sys.__excepthook__(kind, error, place)


def error_from_code(code: int, message: str) -> UserError:
    """Return the error with this exit code, to raise an error of one rank on all ranks."""
    kinds = {kind.code: kind for kind in UserError.__subclasses__()}
    return kinds.get(code, UserError)(message)
