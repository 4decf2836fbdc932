"""Which layers go to which stage: contiguous, and as even as they can be. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import itemgetter

from mpilm.errors import ConfigError

SAME = 1 + 1e-9  # costs that differ by less are one cost with another rounding


def partition(
    layers: int,
    stages: int,
    first_s: float = 0.0,
    last_s: float = 0.0,
    layer_s: float | Sequence[float] = 1.0,
    speeds: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Layers of each stage, at least one, such that the slowest stage is as fast as can be.

    Stage 0 also bears `first_s` seconds (the embedding), the last one `last_s` (norm, head and loss); `layer_s` is the
    cost of a layer, or of each; a stage of speed 2 takes half the seconds. Among equals the smallest sum of squares wins,
    then fewer layers in the first stages, which keep the most microbatches alive. Exact, by dynamic programming.
    Raises ConfigError when there are fewer layers than stages.
    """
    if not 1 <= stages <= layers:
        raise ConfigError(
            f"{layers} layers cannot be cut into {stages} stages (--parallel.pipeline times --parallel.chunks): "
            f"each needs one; at most {layers}"
        )
    each_s = [layer_s] * layers if isinstance(layer_s, (int, float)) else list(layer_s)
    until_s = list(accumulate(each_s, initial=0.0))

    def cost(stage: int, start: int, stop: int) -> float:
        extra_s = (first_s if stage == 0 else 0.0) + (last_s if stage == stages - 1 else 0.0)
        return (until_s[stop] - until_s[start] + extra_s) / (speeds[stage] if speeds else 1.0)

    slowest_s, _ = _cheapest(layers, stages, cost, max)
    limit_s = slowest_s * SAME

    def square(stage: int, start: int, stop: int) -> float:
        seconds = cost(stage, start, stop)
        return seconds**2 if seconds <= limit_s else float("inf")

    return _cheapest(layers, stages, square, lambda before, stage: before + stage)[1]


def _cheapest(
    layers: int, stages: int, cost: Callable[[int, int, int], float], combine: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least combined cost of a cut, and that cut; cost(stage, start, stop) is one of layers start to stop - 1."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the layers that are given out
    for stage in range(stages):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        left = stages - 1 - stage  # stages that still want a layer
        for stop in range(stage + 1, layers - left + 1) if left else (layers,):
            reached[stop] = min(
                (
                    (combine(before, cost(stage, start, stop)), (*cut, stop - start))
                    for start, (before, cut) in best.items()
                    if start < stop
                ),
                key=itemgetter(0),
            )
        best = reached
    return best[layers]


def stated(cut: Sequence[int], layers: int, stages: int) -> tuple[int, ...]:
    """A cut that the user states, once it fits; raises ConfigError with the balanced one where it does not."""
    balanced, said = (" ".join(map(str, each)) for each in (partition(layers, stages), cut))  # as flags are written
    wrong = ""
    if len(cut) != stages:
        wrong = f"has {len(cut)} stages, but there are {stages} (--parallel.pipeline times --parallel.chunks)"
    elif min(cut) < 1:
        wrong = f"leaves stage {min(range(stages), key=lambda stage: cut[stage])} without a layer"
    elif sum(cut) != layers:
        wrong = f"adds up to {sum(cut)} layers, but --model.n-layers is {layers}"
    if wrong:
        raise ConfigError(f"--parallel.cut {said} {wrong}; the balanced one is {balanced}")
    return tuple(cut)
