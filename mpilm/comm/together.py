"""Errors that every rank knows of: an error found on one rank alone would leave the others waiting for ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mpilm.comm.base import Comm
from mpilm.errors import ConfigError, UserError, from_code

R = TypeVar("R")


class AgreedError(Exception):
    """A user's error that every rank knows of: rank 0 prints it, and all leave with its code."""

    def __init__(self, error: UserError):
        super().__init__(str(error))
        self.error = error


def together(comm: Comm, action: Callable[[], R]) -> R:
    """Do `action` on every rank; if it raises a UserError on any, raise that error on all. Collective.

    For steps that fail on one rank alone, such as opening a file, after which the others would wait for ever.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = [error.code, str(error)]
    failures = comm.all_gather_json(failure)
    failed = [rank for rank, theirs in enumerate(failures) if theirs]
    if failed:
        code, message = failures[failed[0]]
        where = "" if len(failed) == comm.size else f" (on rank{'s' * (len(failed) > 1)} {', '.join(map(str, failed))})"
        raise AgreedError(from_code(code, message + where))
    return result  # type: ignore[return-value]


def on_root(comm: Comm, action: Callable[[], R]) -> R | None:
    """Do `action` on rank 0 alone; if it raises a UserError, raise it on all. None on the other ranks. Collective."""
    result, failure = None, None
    if comm.rank == 0:
        try:
            result = action()
        except UserError as error:
            failure = [error.code, str(error)]
    failure = comm.broadcast_json(failure)
    if failure:
        raise AgreedError(from_code(*failure))
    return result


def same_everywhere(comm: Comm, what: str, settings: Mapping[str, Any]) -> None:
    """Raise on all ranks when a setting differs between them, naming each with its values. Collective."""
    everyone = comm.all_gather_json(dict(settings))
    keys = [key for key in everyone[0] if any(theirs.get(key) != everyone[0][key] for theirs in everyone)]
    if keys:
        rows = "".join(f"\n  {k}: " + ", ".join(f"{t.get(k)!r} on rank {r}" for r, t in enumerate(everyone)) for k in keys)
        raise AgreedError(ConfigError(f"the ranks were started with different {what}:{rows}"))
