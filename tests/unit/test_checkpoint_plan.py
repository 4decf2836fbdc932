"""The plan of a checkpoint: tensors to files, and each byte once from an owner to one writer."""

from collections import Counter
from math import prod

import pytest
import torch
from checkpoints import draw_shapes, draw_sharding, replicate, small_files
from hypothesis import given
from hypothesis import strategies as st

from mpilm.checkpoint.format import PARAMETER
from mpilm.checkpoint.plan import StoredTensor, TensorFile, assign_files, plan_blocks
from mpilm.parallel.layout import ParamPart
from mpilm.parallel.plan import Cut
from mpilm.parallel.tensor import slice_part

BLOCKS = st.sampled_from([8, 60, 64, 100, 1 << 10, 1 << 24])  # with 60 and 100, some elements lie in two blocks


def test_assign_files_splits_by_size_and_only_a_large_tensor_exceeds_it():
    shapes = {"a": (10,), "b": (5,), "c": (100,), "d": (1,), "e": (0,)}
    stored = [StoredTensor(name, (PARAMETER, name), shape) for name, shape in shapes.items()]
    with small_files(64, 60):
        files = assign_files("model", stored)
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [[tensor.name for tensor in file.tensors] for file in files] == [["a", "b"], ["c"], ["d", "e"]]
    assert [file.name for file in assign_files("model", stored)] == ["model.safetensors"]
    assert [file.name for file in assign_files("optimizer", [])] == ["optimizer.safetensors"]


def plan_parameters(shapes, sharding, size, block_bytes):
    files = assign_files("model", [StoredTensor(name, (PARAMETER, name), shape) for name, shape in shapes.items()])
    with small_files(block_bytes):
        return list(plan_blocks(files, sharding, size)), files[0]


@given(random=st.randoms(use_true_random=False), size=st.integers(1, 8), block_bytes=BLOCKS)
def test_plan_blocks_takes_every_byte_once_from_a_rank_that_owns_it(random, size, block_bytes):
    shapes = draw_shapes(random)
    blocks, file = plan_parameters(shapes, draw_sharding(random, shapes, size), size, block_bytes)
    assert [block.number for block in blocks] == list(range(-(-file.nbytes // block_bytes)))
    seen = Counter()
    for block in blocks:
        assert block.offset == block.number * block_bytes
        for rank, ranges in block.parts.items():
            for r in ranges:
                assert rank in r.owners
                assert block.offset <= r.offset < r.offset + r.nbytes <= block.offset + block.nbytes
                seen.update(range(r.offset, r.offset + r.nbytes))
        assert any(block.writer in r.owners for ranges in block.parts.values() for r in ranges)
    assert sorted(seen.elements()) == list(range(file.nbytes))


@given(random=st.randoms(use_true_random=False), size=st.integers(1, 8), block_bytes=BLOCKS)
def test_plan_blocks_of_tensor_parts_puts_every_byte_in_its_place(random, size, block_bytes):
    shape, fused, count = (
        [random.randint(1, 5) for _ in range(random.randint(1, 3))],
        random.choice((1, 1, 3)),
        random.randint(1, 4),
    )
    cut = Cut(random.randrange(len(shape)), fused=fused)
    shape[cut.dim] = fused * random.randint(1, 7)  # there may be more parts than rows
    full = torch.arange(prod(shape), dtype=torch.int32).view(shape)
    parts = {f"x.{number}": ParamPart("x", tuple(shape), cut, number, count) for number in range(count)}
    values = {name: slice_part(full, part).flatten().contiguous().view(torch.uint8) for name, part in parts.items()}
    owners = draw_sharding(random, {name: (x.numel() // 4,) for name, x in values.items()}, size)
    (file,) = assign_files("model", [StoredTensor("x", (PARAMETER, "x"), tuple(shape), parts=tuple(parts.items()))])
    written = torch.zeros(file.nbytes, dtype=torch.uint8)
    with small_files(block_bytes):
        for block in plan_blocks([file], owners, size):
            for rank, ranges in block.parts.items():
                for r in (r for r in ranges if r.key[0] == PARAMETER):
                    assert rank in r.owners
                    place = r.view(written[block.offset : block.offset + block.nbytes], block.offset)
                    assert not place.any() or block_bytes % 4  # nothing is written twice
                    place.copy_(values[r.key[1]][r.start : r.start + r.nbytes].view(place.shape))
    assert torch.equal(written[len(file.header) :], full.flatten().view(torch.uint8))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("sharded", [False, True])
def test_plan_blocks_shares_the_work_evenly(size, sharded):
    shapes = {"a": (100, 96), "b": (4800,)}
    ends = {name: [prod(shape) * rank // size for rank in range(size + 1)] for name, shape in shapes.items()}
    sharding = replicate(shapes, size)
    if sharded:
        sharding = {name: [(at[r], at[r + 1], [r]) for r in range(size)] for name, at in ends.items()}
    blocks, _ = plan_parameters(shapes, sharding, size, 400)
    count = Counter(block.writer for block in blocks)
    assert max(count.values()) - min(count[rank] for rank in range(size)) <= 2
    sent = sum(r.nbytes for block in blocks for rank, ranges in block.parts.items() for r in ranges if rank != block.writer)
    assert sent <= (2 * size * 400 if sharded else 0)


def test_plan_blocks_of_unequal_stages_has_two_sources_only_at_the_border():
    blocks, _ = plan_parameters({"a": (1000,), "b": (300,)}, {"a": [(0, 1000, [0])], "b": [(0, 300, [1])]}, 2, 100)
    assert sum(len(block.parts) > 1 for block in blocks) <= 1
    assert {block.writer for block in blocks[2:40]} == {0}


@pytest.mark.parametrize(
    "ranges", [[], [(0, 9, [0])], [(0, 11, [0])], [(1, 10, [0])], [(0, 5, [0]), (6, 10, [0])], [(0, 6, [0]), (5, 10, [0])],
               [(0, 10, [])]],
)  # fmt: skip
def test_plan_blocks_with_a_gap_or_an_overlap_raises(ranges):
    with pytest.raises(ValueError, match=r"a: .*owned"):
        plan_parameters({"a": (10,)}, {"a": ranges}, 1, 64)


def test_plan_blocks_of_a_moment_with_another_shape_needs_an_unsharded_parameter():
    files = [TensorFile("optimizer.safetensors", b"", (StoredTensor("a.row", ("row", "a"), (3,), unsharded=True),))]
    (block,) = plan_blocks(files, {"a": [(0, 12, [1])]}, 2)
    assert [(r.start, r.nbytes, r.owners) for r in block.parts[1]] == [(0, 12, [1])]
    with pytest.raises(ValueError, match="a is sharded, but its row has another shape"):
        list(plan_blocks(files, {"a": [(0, 6, [0]), (6, 12, [1])]}, 2))
