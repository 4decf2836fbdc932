"""Numbers, durations, byte counts and progress as people read them."""

import math
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path


def format_value(value: object) -> str:
    """Return a value from a file or a flag for a message; at most a line of it."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists
        return "a value too large to print"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"


def format_duration(seconds: float) -> str:
    """Return seconds as 12s, 2m31s, 1h02m or, from two days on, 9.1 days."""
    total = round(seconds)
    if total >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if total >= 3600:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 60}m{total % 60:02d}s" if total >= 60 else f"{total}s"


def format_mebibytes(nbytes: float) -> str:
    """Return bytes in one unit, so that the parts of a sum compare: 1,234 MiB."""
    return f"{nbytes / 2**20:,.0f} MiB"


def format_bytes(nbytes: float) -> str:
    """Return bytes in the largest unit that fits: 1.5 GiB, 12.0 MiB, 3.1 KiB, 12 bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:,.0f} bytes"


def format_number(value: float) -> str:
    """Return a number for an axis, a tile or a table: 0, 3e-4, 0.25, 1,250, 12.5k, 3.2M."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def round_up_to_tick(at_least: float) -> float:
    """Return the smallest of 1, 2, 5, 10 times a power of ten that is not below `at_least`."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= at_least * 0.999)


def count_noun(number: int, noun: str) -> str:
    """Return the number with its noun, in the plural where it is not one: 1 rank, 1,024 ranks, 2 batches."""
    plural = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{plural}"


def name_some(names: Sequence[str], most: int = 4) -> str:
    """Return the first names as text, and how many there are besides: a, b, c, d and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def name_ranks(ranks: Collection[int]) -> str:
    """Return the ranks as text: rank 3, or ranks 0, 2."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def command_text(name: str) -> str:
    """Return how the user calls a command: mpilm NAME where the console command was called, else python -m mpilm.NAME."""
    is_console_command = any(Path(word).name == "mpilm" for word in sys.orig_argv[1:2])
    return f"{'mpilm ' if is_console_command else 'python -m mpilm.'}{name}"


class ProgressLine:
    """Prints the progress of a task on standard error every few seconds. Rank 0 stands for all ranks."""

    def __init__(self, task: str, unit: str, enabled: bool = True, interval_s: float = 3.0):
        self.task, self.unit, self.enabled, self.interval_s = task, unit, enabled, interval_s
        self.started_s = self.printed_s = time.monotonic()

    def __call__(self, done: float, total: float) -> None:
        now_s = time.monotonic()
        is_end = done == total and self.printed_s > self.started_s
        if self.enabled and (is_end or now_s - self.printed_s >= self.interval_s):
            self.printed_s = now_s
            percent, speed = 100 * done / max(1, total), done / max(1e-3, now_s - self.started_s)
            text = f"{percent:3.0f}% of {total:,.0f} {self.unit} on rank 0, {speed:.1f} {self.unit}/s"
            print(f"{self.task}: {text}", file=sys.stderr, flush=True)
