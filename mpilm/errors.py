"""Errors for the user, each with an exit code that scripts can rely on."""

import os

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "SLURM_PROCID")  # by launcher


def is_first_process() -> bool:
    """Return whether the launcher calls this process rank 0, so that it may print before MPI is up."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


class UserError(Exception):
    """A problem that the user can fix. The message says what is wrong, where, and what to write instead."""

    code = 1


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


def error_from_code(code: int, message: str) -> UserError:
    """Return the error with this exit code, to raise an error of one rank on all ranks."""
    kinds = {kind.code: kind for kind in UserError.__subclasses__()}
    return kinds.get(code, UserError)(message)
