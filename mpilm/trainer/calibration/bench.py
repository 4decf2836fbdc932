"""Who measures, when, and for how long."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpilm.comm.base import Comm

POINT_S = 0.12  # of one measurement, and three calls at least


@dataclass(frozen=True)
class Bench:
    """Who measures, where, and how it is said. `alone`: only the first rank of each node works, the others wait."""

    comm: Comm
    node: Comm
    device: torch.device
    progress: Callable[[str], None]
    alone: bool = False

    def seconds(self, action: Callable[[], object]) -> float:
        """Of one call, the median over the calls of a rank, and over the ranks that measure. Collective."""
        working = not self.alone or self.node.rank == 0
        self.comm.barrier()
        mine = _median_s(action, self.device) if working else 0.0
        every = self.comm.all_gather_json(mine)
        return statistics.median([each for each in every if each > 0])

    def collective_s(self, action: Callable[[], object], comm: Comm, calls: int = 5) -> float:
        """Of one call that all ranks of `comm` make together: the slowest rank's, the median over the calls. Collective."""
        times = torch.zeros(calls, dtype=torch.float64, device="cpu")
        action()
        for i in range(calls):
            comm.barrier()
            start_s = time.perf_counter()
            action()
            times[i] = time.perf_counter() - start_s
        self.comm.all_reduce(times, "max")
        return float(times.median())


def _median_s(action: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start_s = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start_s

    once()
    times, until_s = list[float](), time.perf_counter() + POINT_S
    while len(times) < 3 or (time.perf_counter() < until_s and len(times) < 1000):
        times.append(once())
    return statistics.median(times)
