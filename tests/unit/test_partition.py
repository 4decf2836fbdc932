"""The partition of layers into stages, against all possible ones."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.errors import ConfigError
from mpilm.parallel.pipeline.partition import partition_layers, validate_partition

SECONDS = st.floats(0, 8, width=16)


def stage_costs(partition, first_s, last_s, layer_s, speeds):
    costs = [layer_s * n for n in partition]
    costs[0] += first_s
    costs[-1] += last_s
    return [cost / speed for cost, speed in zip(costs, speeds)]


def all_partitions(layers, stages):
    for ends in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *ends, layers)))


@given(st.data())
def test_partition_is_the_best_of_all(data):
    layers = data.draw(st.integers(1, 9))
    stages = data.draw(st.integers(1, layers))
    first_s, last_s, layer_s = (data.draw(SECONDS) for _ in range(3))
    speeds = data.draw(st.lists(st.floats(0.25, 4, width=16), min_size=stages, max_size=stages))

    def value(partition):
        costs = stage_costs(partition, first_s, last_s, layer_s, speeds)
        return max(costs), sum(cost**2 for cost in costs)

    partition = partition_layers(layers, stages, first_s, last_s, layer_s, speeds)
    assert len(partition) == stages
    assert min(partition) >= 1
    assert sum(partition) == layers
    slowest_s = min(value(other)[0] for other in all_partitions(layers, stages))
    squares = min(value(other)[1] for other in all_partitions(layers, stages) if value(other)[0] <= slowest_s * (1 + 1e-9))
    assert value(partition) == pytest.approx((slowest_s, squares), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "partition"),
    [
        ((8, 1), (8,)),
        ((8, 4), (2, 2, 2, 2)),
        ((5, 2), (2, 3)),  # the first stage has the most microbatches in flight
        ((7, 3), (2, 2, 3)),
        ((8, 2, 2.0), (3, 5)),
        ((8, 2, 0.0, 2.0), (5, 3)),
        ((22, 8, 0.0, 2.0), (3, 3, 3, 3, 3, 3, 3, 1)),
        ((9, 2, 0.0, 0.0, 1.0, [1.0, 2.0]), (3, 6)),  # the second is twice as fast
        ((4, 2, 0.0, 100.0), (3, 1)),  # every stage has a layer
        ((6, 3, 0.0, 0.0, 0.0), (2, 2, 2)),
    ],
)
def test_partition_equals_the_one_worked_out_by_hand(arguments, partition):
    if arguments[4:5] == (0.0,):  # layers without cost: any partition, but always the same
        assert partition_layers(*arguments) == partition_layers(*arguments)
    else:
        assert partition_layers(*arguments) == partition


def test_partition_ignores_rounding_errors_of_costs():
    assert partition_layers(12, 4, layer_s=0.1) == partition_layers(12, 4, layer_s=1e-9) == (3, 3, 3, 3)


def test_partition_of_many_layers_is_quick():
    start_s = time.process_time()
    partition = partition_layers(128, 64, first_s=0.3, last_s=2.7)
    assert time.process_time() - start_s < 5
    assert (sum(partition), len(partition), max(partition[:-1]), partition[-1]) == (128, 64, 3, 1)


@pytest.mark.parametrize(("layers", "stages"), [(3, 4), (0, 1), (3, 0)])
def test_partition_into_more_stages_than_layers_is_refused(layers, stages):
    with pytest.raises(ConfigError, match=f"{layers} layers cannot be divided into {stages} stages"):
        partition_layers(layers, stages)


def test_stated_partition_that_fits_is_returned():
    assert validate_partition([3, 5], 8, 2) == (3, 5)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ([3, 4], "--parallel.cut 3 4 adds up to 7 layers, but --model.n-layers is 8; the balanced one is 4 4"),
        ([3, 4, 1], "--parallel.cut 3 4 1 has 3 stages, but --parallel.pipeline times --parallel.chunks is 2"),
        ([8, 0], "--parallel.cut 8 0 leaves stage 1 without a layer; the balanced one is 4 4"),
        ([-1, 9], "--parallel.cut -1 9 leaves stage 0 without a layer"),
    ],
)
def test_stated_partition_that_does_not_fit_is_refused_with_the_balanced_one(partition, message):
    with pytest.raises(ConfigError) as caught:
        validate_partition(partition, 8, 2)
    assert str(caught.value).startswith(message)
