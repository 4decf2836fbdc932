"""A cut that is measured: slow ranks get fewer blocks, and all ranks the same answer."""

from unittest import mock

import pytest
import torch
from runs import layout, small_config

from mpilm.comm.threads import run_ranks
from mpilm.mesh.mesh import Mesh
from mpilm.parallel.feasible import mesh_shape
from mpilm.trainer import auto_layout as balance

CPU = torch.device("cpu")
V = 61


def cuts(size, config):
    return run_ranks(size, lambda comm: balance.partition_model(config, Mesh.build(mesh_shape(config, size), comm), V, CPU))


def cut_of(size, seconds, **changes):
    """`seconds(rank, part)`: what the rank takes for embedding, block, and head."""
    config = small_config(model__n_layers=12, parallel__balance="measured", **changes)

    def measured(_config, _vocab_size, _device, part, world):
        world.barrier()  # as in the measurement: the call is collective
        return seconds(world.rank, part)

    with mock.patch.object(balance, "_time_part", measured):
        first, *others = cuts(size, config)
    assert others == [first] * (size - 1)
    assert sum(first) == 12
    return first


def test_ranks_of_one_speed_share_the_blocks():
    assert cut_of(2, lambda rank, part: (0.0, 1.0, 0.0)[part], **layout(2)) == (6, 6)
    assert cut_of(4, lambda rank, part: (0.0, 1.0, 0.0)[part], **layout(4)) == (3, 3, 3, 3)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_rank_of_half_the_speed_gets_half_the_blocks(slow):
    cut = cut_of(3, lambda rank, part: (0.0, 1.0, 0.0)[part] * (1 + (rank == slow)), **layout(3))
    assert [blocks for stage, blocks in enumerate(cut) if stage != slow] == [5, 5]
    assert cut[slow] == 2


def test_a_stage_is_as_slow_as_the_slowest_of_its_replicas():
    """Ranks 0 and 2 hold stage 0, 1 and 3 stage 1; 3 has half the speed."""
    assert cut_of(4, lambda rank, part: (0.0, 1.0, 0.0)[part] * (1 + (rank == 3)), **layout(2)) == (8, 4)


def test_a_head_that_costs_as_much_as_four_blocks():
    assert cut_of(2, lambda rank, part: (0.0, 1.0, 4.0)[part], **layout(2)) == (8, 4)


def test_all_chunks_of_a_slow_rank_are_small():
    assert cut_of(2, lambda rank, part: (0.0, 1.0, 0.0)[part] * (1 + rank), **layout(2, "interleaved")) == (4, 2, 4, 2)


def test_what_was_stated_is_not_measured():
    assert cut_of(2, None, **layout(2, cut=(11, 1))) == (11, 1)
    assert cut_of(2, None) == (12,)


def test_real_blocks_are_timed_forward_and_backward():
    with mock.patch.object(balance, "MEASURE_S", 0.02):
        found = cuts(2, small_config(**layout(2, balance="measured"), train__dtype="bfloat16"))
    assert found[0] == found[1]
    assert sum(found[0]) == 4
