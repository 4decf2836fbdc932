"""The measured partition into stages: slow ranks get fewer blocks, and all ranks the same answer."""

from unittest import mock

import pytest
import torch
from runs import layout, small_config
from thread_ranks import run_ranks

from mpilm.mesh.mesh import Mesh
from mpilm.parallel.layout_check import resolve_mesh_shape
from mpilm.trainer import auto_layout

CPU = torch.device("cpu")
V = 61
BLOCK_S = (0.0, 1.0, 0.0)  # embedding, block, head: only blocks take time


def partition_on_threads(size, config):
    return run_ranks(
        size, lambda comm: auto_layout.partition_model(config, Mesh(resolve_mesh_shape(config, size), comm), V, CPU)
    )


def measured_partition(size, seconds, **changes):
    """Return the partition if rank r takes `seconds(r, part)` for embedding, block or head."""
    config = small_config(model__n_layers=12, parallel__balance="measured", **changes)

    def measured(_config, _vocab_size, _device, part, world):
        world.barrier()  # as in the measurement: the call is collective
        return seconds(world.rank, part)

    with mock.patch.object(auto_layout, "_time_part", measured):
        first, *others = partition_on_threads(size, config)
    assert others == [first] * (size - 1)
    assert sum(first) == 12
    return first


def test_ranks_of_equal_speed_get_equally_many_blocks():
    assert measured_partition(2, lambda rank, part: BLOCK_S[part], **layout(2)) == (6, 6)
    assert measured_partition(4, lambda rank, part: BLOCK_S[part], **layout(4)) == (3, 3, 3, 3)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_rank_of_half_the_speed_gets_half_the_blocks(slow):
    partition = measured_partition(3, lambda rank, part: BLOCK_S[part] * (1 + (rank == slow)), **layout(3))
    assert [blocks for stage, blocks in enumerate(partition) if stage != slow] == [5, 5]
    assert partition[slow] == 2


def test_stage_is_as_fast_as_its_slowest_replica():
    """Ranks 0 and 2 hold stage 0, 1 and 3 stage 1; 3 has half the speed."""
    assert measured_partition(4, lambda rank, part: BLOCK_S[part] * (1 + (rank == 3)), **layout(2)) == (8, 4)


def test_expensive_head_leaves_fewer_blocks_to_its_stage():
    assert measured_partition(2, lambda rank, part: (0.0, 1.0, 4.0)[part], **layout(2)) == (8, 4)


def test_all_chunks_of_a_slow_rank_have_fewer_blocks():
    assert measured_partition(2, lambda rank, part: BLOCK_S[part] * (1 + rank), **layout(2, "interleaved")) == (4, 2, 4, 2)


def test_stated_partition_is_not_measured():
    assert measured_partition(2, None, **layout(2, cut=(11, 1))) == (11, 1)
    assert measured_partition(2, None) == (12,)


def test_measured_partition_of_a_real_model_is_the_same_on_all_ranks():
    with mock.patch.object(auto_layout, "MEASURE_S", 0.02):
        found = partition_on_threads(2, small_config(**layout(2, balance="measured"), train__dtype="bfloat16"))
    assert found[0] == found[1]
    assert sum(found[0]) == 4
