#!/usr/bin/env python3
"""A fuzz test: seeded mutations of everything that a user, a download or an older run gives to mpilm.

Each case changes one valid input at random places: a bit, a byte, a span, or a value of its JSON, which becomes something
absurd (10^30, NaN, lists nested 100,000 deep). mpilm then reads it in this process, and must either refuse it with one message,
or accept something that makes sense. A case fails if it

  raises anything but a UserError,
  takes more than 20 seconds,
  takes more than 1.5 GiB of memory, or
  is accepted although it should not be, by the rule of its kind: a damaged manifest, say, or a shape beyond the limits.

  scripts/fuzz.py                               200 cases of each kind
  scripts/fuzz.py --count 2000 --only config.json index
  scripts/fuzz.py --only config.json --first 137 --count 1      one case again, with its traceback

It prints the number of cases refused and accepted, and the seed of each failure, and exits with 1 if there are any. It requires
the environment that scripts/test creates.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from fuzzing.kinds import KINDS  # noqa: E402

from mpilm.comm.collective_errors import CollectiveError  # noqa: E402
from mpilm.errors import UserError  # noqa: E402

LIMIT_S, LIMIT_BYTES = 20, 3 * 2**29


class HangError(BaseException):
    """The alarm of a case that takes too long; no code under test catches it."""


@dataclass(frozen=True)
class Outcome:
    """The end of a case."""

    verdict: str  # refused, accepted, unchanged or failed
    text: str = ""  # the refusal, or the reason of the failure


@contextlib.contextmanager
def alarm(limit_s: int) -> Iterator[None]:
    """Raise HangError inside after this time."""

    def ring(number: int, frame: object) -> None:
        raise HangError(f"more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def run_case(name: str, number: int, folder: Path, seed: int = 0) -> Outcome:
    """Make the valid input in an empty folder, mutate it, and use it."""
    kind = KINDS[name]
    kind.make(folder)
    path = folder / kind.name
    before = path.read_bytes()
    after = kind.mutate(Random(f"{name} {seed} {number}"), before)
    if after == before:
        return Outcome("unchanged")
    path.write_bytes(after)
    reset_peak_memory()
    start = memory_bytes("VmRSS")
    try:
        with alarm(LIMIT_S), mock.patch("mpilm.data.chat.RENDER_S", 0.5):
            kind.use(path, before)
        outcome = Outcome("accepted")
    except (UserError, CollectiveError) as error:
        outcome = Outcome("refused", str(error))
        if not str(error).strip() or len(str(error)) > 4010:
            outcome = Outcome("failed", f"a message of {len(str(error))} characters: {str(error)[:200]}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = Outcome("failed", "".join(traceback.format_exception(error))[-3000:])
    taken = memory_bytes("VmHWM") - start
    return outcome if taken < LIMIT_BYTES else Outcome("failed", f"{taken >> 20} MiB of memory; {outcome}")


def run_kind(name: str, numbers: range, seed: int = 0, verbose: bool = False) -> tuple[Counter[str], dict[int, str]]:
    """Run cases of a kind; return how many ended how, and the reasons of failures by number."""
    counts, failures = Counter[str](), dict[int, str]()
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix="mpilm-fuzz-"))
        try:
            outcome = run_case(name, number, folder, seed)
        finally:
            shutil.rmtree(folder)
        counts[outcome.verdict] += 1
        if verbose:
            print(f"{name} {number}: {outcome.verdict}: {outcome.text}", flush=True)
        if outcome.verdict == "failed":
            failures[number] = outcome.text
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other cases")
    parser.add_argument("--verbose", action="store_true", help="print the outcome of each case")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds to run")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    failed = 0
    for name in arguments.only:
        started = time.monotonic()
        numbers = range(arguments.first, arguments.first + arguments.count)
        counts, failures = run_kind(name, numbers, arguments.seed, arguments.verbose)
        failed += len(failures)
        texts = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ("refused", "accepted", "unchanged", "failed"))
        print(f"{name:<22} {texts}; {time.monotonic() - started:.0f} s", flush=True)
        for number, text in list(failures.items())[:5]:
            print(
                f"  --only {name} --seed {arguments.seed} --first {number} --count 1:\n    " + text.replace("\n", "\n    "),
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
