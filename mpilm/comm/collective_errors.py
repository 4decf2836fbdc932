"""Errors raised on all ranks alike: an error raised on one rank alone would leave the others waiting for ever."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mpilm.comm.base import Comm
from mpilm.errors import ConfigError, UserError, error_from_code, to_user_error
from mpilm.formatting import name_ranks

R = TypeVar("R")


class CollectiveError(Exception):
    """A UserError that every rank raises: rank 0 prints it, and all ranks exit with its code."""

    def __init__(self, error: UserError):
        super().__init__(str(error))
        self.error = error


def run_on_all_ranks(comm: Comm, action: Callable[[], R]) -> R:
    """Run `action` on every rank and return its result. Collective. If it raises a UserError on any rank, all ranks raise that
    error as a CollectiveError. For actions that may fail on one rank alone, such as opening a file."""
    result, failure = _catch(action)
    failures = comm.all_gather_json(failure)
    if failed := [rank for rank, failure in enumerate(failures) if failure]:
        code, message = failures[failed[0]]
        where = "" if len(failed) == comm.size else f" (on {name_ranks(failed)})"
        raise CollectiveError(error_from_code(code, (message + where).replace(") (on rank", ", rank")))  # (on HOST, rank 1)
    return result  # type: ignore[return-value]


def run_on_root(comm: Comm, action: Callable[[], R]) -> R | None:
    """Run `action` on rank 0 alone; all ranks raise its UserError. Returns None on the other ranks. Collective."""
    result, failure = _catch(action) if comm.rank == 0 else (None, None)
    if failure := comm.broadcast_json(failure):
        raise CollectiveError(error_from_code(*failure))
    return result


def _catch(action: Callable[[], R]) -> tuple[R | None, list[Any] | None]:
    """Return the result of `action`, or code and message of the UserError that it raises, also when memory runs out."""
    try:
        return action(), None
    except Exception as error:
        if (problem := to_user_error(error)) is None:
            raise
        return None, [problem.code, str(problem)]


def check_same_on_all_ranks(comm: Comm, what: str, settings: Mapping[str, Any]) -> None:
    """Raise on all ranks if a setting differs between them, naming each with its values. Collective."""
    everyone = comm.all_gather_json(dict(settings))
    if keys := [key for key in everyone[0] if any(other.get(key) != everyone[0][key] for other in everyone)]:
        rows = "".join(f"\n  {k}: " + ", ".join(f"{s.get(k)!r} on rank {r}" for r, s in enumerate(everyone)) for k in keys)
        raise CollectiveError(ConfigError(f"the ranks were started with different {what}:{rows}"))
