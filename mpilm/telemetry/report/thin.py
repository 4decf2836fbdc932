"""Fewer points that draw the same curve."""

from __future__ import annotations

import numpy as np


def m4(y: np.ndarray, buckets: int) -> np.ndarray:
    """Indices of the first, smallest, largest and last value of each of `buckets` stretches of y, in order.

    As many stretches as the picture has columns draw the same pixels as all values do (M4: Jugel, Jerzak, Hackenbroich and
    Markl, "M4: a visualization-oriented time series data aggregation", VLDB 2014); a spike of one step is always there.
    """
    if len(y) <= 4 * buckets:
        return np.arange(len(y))
    starts = np.linspace(0, len(y), buckets + 1).astype(int)
    width = int(np.diff(starts).max())
    inside = np.minimum(starts[:-1, None] + np.arange(width), starts[1:, None] - 1)  # the last one again in shorter ones
    rows = np.arange(buckets)
    values = y[inside]
    picked = [inside[:, 0], inside[rows, values.argmin(1)], inside[rows, values.argmax(1)], inside[:, -1]]
    return np.unique(np.concatenate(picked))


def means(x: np.ndarray, y: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of x and of y over each of `buckets` stretches: the trend below the noise."""
    starts = np.linspace(0, len(y), min(buckets, len(y)) + 1).astype(int)
    sizes = np.diff(starts)
    return np.add.reduceat(x, starts[:-1]) / sizes, np.add.reduceat(y, starts[:-1]) / sizes
