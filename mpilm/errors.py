"""Errors meant for the person who made the mistake, each with the exit code that scripts can rely on."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can put right: one sentence that says what is wrong, where, and what to write instead."""

    code = 1


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot work (EX_CONFIG)."""

    code = 78


class DataError(UserError):
    """Text or tokens that cannot be used as they are (EX_DATAERR)."""

    code = 65


class FileError(UserError):
    """A file or folder that cannot be read or written (EX_IOERR)."""

    code = 74


class PreemptedError(UserError):
    """No error: a run that was asked to stop has saved, and waits to be started again (EX_TEMPFAIL)."""

    code = 75


class NonFiniteError(UserError):
    """A loss or gradient that is no longer a finite number."""

    code = 87


class RanksDisagreeError(UserError):
    """Ranks that should hold or do the same thing, and do not."""

    code = 88


class OutOfMemoryError(UserError):
    """A rank gets no more memory (EX_OSERR)."""

    code = 71


class LostRankError(UserError):
    """Ranks of the job are not there any more, and the others cannot go on without them."""

    code = 89


BY_CODE = {
    kind.code: kind
    for kind in (
        UserError,
        ConfigError,
        DataError,
        FileError,
        PreemptedError,
        NonFiniteError,
        RanksDisagreeError,
        OutOfMemoryError,
        LostRankError,
    )
}


def from_code(code: int, message: str) -> UserError:
    """The error of that exit code: how an error found on one rank is raised again on all of them."""
    return BY_CODE.get(code, UserError)(message)
