"""The factor by which losses are multiplied in float16, so that small gradients do not vanish (Micikevicius et al., arXiv
1710.03740, section 3.2), and which falls when large ones overflow.

It depends on nothing but the steps that have overflowed, so a resumed or recomputed run has the same. It is a power of two: it
changes no bit of a gradient that neither vanishes nor overflows.
"""

from collections.abc import Sequence

FIRST, LEAST, LARGEST = 2.0**16, 1.0, 2.0**24
GROWTH_STEPS = 2000  # without an overflow, after which it doubles


def loss_scale(dtype: str, overflows: Sequence[int], step: int) -> float:
    """Return the factor of step `step`, counted from 0. `overflows`: the steps, counted from 1, that have overflowed."""
    if dtype != "float16":
        return 1.0
    scale, last = FIRST, 0
    for done in overflows:
        if done <= step:
            scale = max(LEAST, _grow(scale, done - 1 - last) / 2)
            last = done
    return _grow(scale, step - last)


def _grow(scale: float, good_steps: int) -> float:
    return min(LARGEST, scale * 2.0 ** min(64, good_steps // GROWTH_STEPS))
