"""A line that tells a waiting person how far the preparation of text is."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

QUIET_S = 3.0


@dataclass
class ProgressLine:
    """Called with bytes done and to do; silent for the first seconds, then a line now and then on `out`.

    Rank 0 shows its own share: shares are of about equal bytes, and so nothing needs to travel.
    """

    what: str = "preparing text"
    out: TextIO = field(default_factory=lambda: sys.stderr)
    every_s: float = QUIET_S
    _began_s: float = 0.0
    _shown_s: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._began_s:
            self._began_s = self._shown_s = now
        finished_after_showing = done == total and self._shown_s > self._began_s
        if now - self._shown_s < self.every_s and not finished_after_showing:
            return
        self._shown_s = now
        share, speed = 100 * done / max(1, total), done / 1e6 / max(1e-3, now - self._began_s)
        print(f"{self.what}: {share:3.0f}% of {total / 1e6:,.0f} MB on rank 0, {speed:.1f} MB/s", file=self.out, flush=True)
