"""Numbers as a person reads them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

SLOW = 1.2  # times the median


def duration(seconds: float) -> str:
    """Seconds as 1h02m, 2m31s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def slowest(compute_s: Sequence[float]) -> str:
    """The rank that computes longest, where it is clearly slower than most."""
    middle, most = statistics.median_low(compute_s), max(compute_s)
    if len(compute_s) < 2 or most <= SLOW * middle:
        return ""
    return f"rank {compute_s.index(most)} computes {most / middle:.1f} times as long as most"
