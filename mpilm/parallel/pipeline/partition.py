"""The partition of layers into pipeline stages: contiguous and as even as possible. Pure arithmetic."""

from collections.abc import Callable, Sequence
from operator import itemgetter

from mpilm.errors import ConfigError

EQUAL_COST = 1 + 1e-9  # costs whose ratio is below differ by rounding only


def partition_layers(
    layers: int, stages: int, first_s: float = 0.0, last_s: float = 0.0, layer_s: float = 1.0, speeds: Sequence[float] = ()
) -> tuple[int, ...]:
    """Return the layers of each stage, at least one, that make the slowest stage as fast as possible. A layer costs `layer_s`
    seconds, stage 0 also `first_s` (the embedding), the last one `last_s` (norm, head and loss); a stage of speed 2 takes half
    the seconds. Among equals the smallest sum of squares wins, then fewer layers in the first stages, which keep the most
    microbatches alive. Exact, by dynamic programming. Raises ConfigError if there are fewer layers than stages."""
    if not 1 <= stages <= layers:
        problem = f"{layers} layers cannot be divided into {stages} stages (--parallel.pipeline times --parallel.chunks)"
        raise ConfigError(f"{problem}: each needs one; at most {layers}")

    def cost(stage: int, start: int, stop: int) -> float:
        extra_s = (first_s if stage == 0 else 0.0) + (last_s if stage == stages - 1 else 0.0)
        return (layer_s * (stop - start) + extra_s) / (speeds[stage] if speeds else 1.0)

    slowest_s, _ = _cheapest(layers, stages, cost, max)
    limit_s = slowest_s * EQUAL_COST

    def square(stage: int, start: int, stop: int) -> float:
        seconds = cost(stage, start, stop)
        return seconds**2 if seconds <= limit_s else float("inf")

    return _cheapest(layers, stages, square, lambda before, stage: before + stage)[1]


def _cheapest(
    layers: int, stages: int, cost: Callable[[int, int, int], float], combine: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Return the least combined cost of a partition, and that partition. cost(stage, start, stop): of layers as a stage."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the number of layers assigned
    for stage in range(stages):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        later = stages - 1 - stage  # stages that still need a layer
        for stop in range(stage + 1, layers - later + 1) if later else (layers,):
            extended = [
                (combine(before, cost(stage, start, stop)), (*counts, stop - start))
                for start, (before, counts) in best.items()
                if start < stop
            ]
            reached[stop] = min(extended, key=itemgetter(0))
        best = reached
    return best[layers]


def validate_partition(cut: Sequence[int], layers: int, stages: int) -> tuple[int, ...]:
    """Return the partition that the user states; raise ConfigError with the balanced one if it does not fit."""
    balanced, stated = (" ".join(map(str, counts)) for counts in (partition_layers(layers, stages), cut))  # as flags
    problem = ""
    if len(cut) != stages:
        problem = f"has {len(cut)} stages, but --parallel.pipeline times --parallel.chunks is {stages}"
    elif min(cut) < 1:
        problem = f"leaves stage {min(range(stages), key=lambda stage: cut[stage])} without a layer"
    elif sum(cut) != layers:
        problem = f"adds up to {sum(cut)} layers, but --model.n-layers is {layers}"
    if problem:
        raise ConfigError(f"--parallel.cut {stated} {problem}; the balanced one is {balanced}")
    return tuple(cut)
