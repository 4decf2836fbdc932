"""The flat layout: every element has its owner, both ends of a tie are divided alike, and all offsets are aligned."""

import tracemalloc
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import small_buckets

from mpilm.parallel.flat_layout import ALIGNMENT, BUCKET, FlatLayout, ParamSlice, intersect_intervals, shard_owners
from mpilm.parallel.layout import ParamLayout, resolve_layouts
from mpilm.parallel.plan import fsdp_unit

RANKS = st.integers(1, 9)
THREADS = st.sampled_from([1, 2, 4, 8])
BUCKETS = st.sampled_from([ALIGNMENT * 8, 1024, BUCKET])
examples = settings(max_examples=40)


@st.composite
def layout_tables(draw, tie=None, unsharded=None):
    """Parameters of a few blocks, of odd sizes, with or without a tied head; none unsharded, or the matrices, or all."""
    dims, tie = st.integers(1, 40), draw(st.booleans()) if tie is None else tie
    shapes = {"embed.weight": (draw(dims), draw(dims))}
    for block in range(draw(st.integers(1, 3))):
        for name in draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True)):
            shapes[f"blocks.{block}.{name}.weight"] = tuple(draw(st.lists(dims, min_size=1, max_size=2)))
    shapes |= {"norm.weight": (draw(dims),), "head.weight": shapes["embed.weight"]}
    min_dims = draw(st.sampled_from([1, 2, 3])) if unsharded is None else 1 if unsharded else 3
    return resolve_layouts(
        shapes, {"head.weight": "embed.weight"} if tie else {}, is_unsharded=lambda name, shape: len(shape) >= min_dims
    )


@st.composite
def flat_layouts(draw, tie=None, unsharded=None):
    with small_buckets(draw(BUCKETS)):
        table = draw(layout_tables(tie, unsharded))
        return FlatLayout(table.values(), ALIGNMENT * draw(THREADS), draw(st.booleans()), draw(RANKS))


def elements(intervals):
    return [i for start, stop in intervals for i in range(start, stop)]


@examples
@given(flat_layouts())
def test_shards_contain_every_element_once(flat):
    shards = [flat.shard(rank) for rank in range(flat.ranks)]
    assert sorted(i for shard in shards for i in elements(shard)) == list(range(flat.numel))
    for shard in shards:
        assert all(start < stop for start, stop in shard)
        assert all(one[1] < other[0] for one, other in pairwise(shard))


@examples
@given(flat_layouts())
def test_param_slices_of_all_ranks_contain_every_parameter_once(flat):
    found = {name: [] for name in flat.spans}
    for rank in range(flat.ranks):
        for item, at in flat.param_slices(flat.shard(rank)).items():
            assert at == flat.spans[item.name][0] + item.start
            found[item.name] += range(item.start, item.stop)
    assert {name: sorted(found[name]) for name in found} == {name: list(range(x.numel)) for name, (_, x) in flat.spans.items()}


@examples
@given(flat_layouts())
def test_shard_owners_are_the_ranks_with_these_slices(flat):
    shards = [flat.param_slices(flat.shard(rank)) for rank in range(flat.ranks)]
    for name, (_, layout) in flat.spans.items():
        owners = shard_owners(name, flat, sharded=True)
        assert [start for start, _, _ in owners] == [0, *(stop for _, stop, _ in owners[:-1])]
        assert owners[-1][1] == layout.numel
        for rank, slices in enumerate(shards):
            theirs = [range(start, stop) for start, stop, ranks in owners if ranks == [rank]]
            held = [range(item.start, item.stop) for item in slices if item.name == name]
            assert [i for part in theirs for i in part] == [i for part in held for i in part]
        assert shard_owners(name, flat, sharded=False) == [(0, layout.numel, list(range(flat.ranks)))]


@examples
@given(flat_layouts(unsharded=True))
def test_unsharded_parameters_belong_to_one_rank_each(flat):
    shards = [flat.param_slices(flat.shard(rank)) for rank in range(flat.ranks)]
    for name, (_, layout) in flat.spans.items():
        assert [ParamSlice(name, 0, layout.numel) in slices for slices in shards].count(True) == 1
    loads = [sum(item.numel for item in slices) for slices in shards]
    tied = sum(layout.numel for _, layout in flat.spans.values() if layout.tied_to)  # rank 0 has both ends
    assert max(loads) - min(loads) <= max(layout.numel for _, layout in flat.spans.values()) + tied


@examples
@given(flat_layouts())
def test_groups_and_buckets_are_the_flat_vector_in_order(flat):
    assert [name for group in flat.groups for name in group.names] == list(flat.spans)
    assert [group.start for group in flat.groups] == [0, *(group.stop for group in flat.groups[:-1])]
    assert flat.groups[-1].stop == flat.numel
    for group in flat.groups:
        buckets = group.buckets
        assert buckets[0][0] == group.start
        assert all(one[1] == other[0] for one, other in pairwise(buckets))
        assert buckets[-1][1] == group.stop
        assert all(sum(flat.slices((start, stop))) == stop - start > 0 for start, stop in buckets)
    assert flat.buckets == [bucket for group in flat.groups for bucket in group.buckets]
    assert flat.longest_slice == max(
        stop - start for b in flat.buckets for r in range(flat.ranks) for start, stop in [flat.slice(b, r)]
    )


@given(BUCKETS, RANKS)
@settings(max_examples=20)
def test_buckets_are_at_most_bucket_elements_long(numel, ranks):
    shapes = {"embed.weight": (300, 41), "norm.weight": (41,)}
    with small_buckets(numel):
        tables = (resolve_layouts(shapes, {}, is_unsharded=lambda name, shape: len(shape) > 1), resolve_layouts(shapes, {}))
        flats = [FlatLayout(table.values(), ranks=ranks) for table in tables]
    assert all(stop - start <= numel for flat in flats for start, stop in flat.buckets)


@examples
@given(layout_tables(), BUCKETS)
def test_groups_contain_full_fsdp_units_and_one_each_if_per_module(table, bucket):
    with small_buckets(bucket):
        per_module, merged = (FlatLayout(table.values(), per_module=flag) for flag in (True, False))
    alone = {name for name, layout in table.items() if layout.is_tied}
    units = dict.fromkeys(fsdp_unit(name) for name in reversed(table) if name not in alone)
    assert [{fsdp_unit(name) for name in group.names} for group in per_module.groups if not alone & {*group.names}] == [
        {unit} for unit in units
    ]
    for group in merged.groups:
        others = {name for name in table if name not in group.names}
        assert not {fsdp_unit(name) for name in group.names} & {fsdp_unit(name) for name in others}
    if bucket >= per_module.numel and not alone:
        assert len(merged.groups) == 1


@examples
@given(layout_tables(tie=True), RANKS, THREADS, BUCKETS, st.booleans())
def test_tied_parameters_are_groups_of_their_own_and_divided_alike(table, ranks, threads, bucket, per_module):
    """Also if they are on two stages, and so in two vectors."""
    with small_buckets(bucket):
        full = FlatLayout(table.values(), ALIGNMENT * threads, per_module, ranks)
        halves = [
            FlatLayout(
                [x for x in table.values() if (x.name == "embed.weight") == first], ALIGNMENT * threads, per_module, ranks
            )
            for first in (True, False)
        ]
        for flat in (full, *halves):
            assert all(len(group.names) == 1 for group in flat.groups if {"embed.weight", "head.weight"} & {*group.names})
        owners = [
            shard_owners(name, flat, sharded=True)
            for name, flats in (("embed.weight", (full, halves[0])), ("head.weight", (full, halves[1])))
            for flat in flats
        ]
    assert all(each == owners[0] for each in owners)


@examples
@given(flat_layouts())
def test_offsets_and_slices_are_aligned(flat):
    assert all(at % flat.alignment == 0 for at, _ in flat.spans.values())
    assert flat.numel % flat.alignment == 0
    for rank in range(flat.ranks):
        assert all(start % flat.alignment == 0 for start, _ in flat.shard(rank))


@pytest.mark.parametrize("threads", [1, 3, 12, 64])
def test_slices_of_large_parameters_are_aligned_for_any_number_of_threads(threads):
    table = resolve_layouts({"embed.weight": (1000, 4000), "norm.weight": (4000,)}, {})
    flat = FlatLayout(table.values(), ALIGNMENT * threads, ranks=3)
    for rank in range(3):
        assert all(start % flat.alignment == 0 for start, _ in flat.shard(rank))


def test_parameters_lie_in_the_order_of_backward_with_tied_copies_first():
    table = resolve_layouts({"embed": (5, 3), "norm": (3,), "mlp": (7, 3), "head": (5, 3)}, {"head": "embed"})
    flat = FlatLayout(table.values())
    assert [(name, at) for name, (at, _) in flat.spans.items()] == [("head", 0), ("mlp", 16), ("norm", 48), ("embed", 64)]
    assert (flat.tied_copies_numel, flat.numel) == (16, 80)
    assert flat.padded_span("mlp") == (16, 48)  # padding included
    assert flat.param_slices([(0, 20), (40, 66)]) == {
        ParamSlice("head", 0, 15): 0, ParamSlice("mlp", 0, 4): 16, ParamSlice("norm", 0, 3): 48, ParamSlice("embed", 0, 2): 64,
    }  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 8, 40])
@pytest.mark.parametrize("numel", [16, 112, 1024, 12352])
def test_slices_of_a_bucket_are_aligned_and_cover_it(numel, parts):
    flat = FlatLayout([ParamLayout("x", (numel,))], ranks=parts)
    counts = flat.slices(flat.buckets[0])
    assert len(counts) == parts
    assert sum(counts) == numel
    filled = [count for count in counts if count]
    assert counts[: len(filled)] == filled
    assert all(count % ALIGNMENT == 0 for count in filled)
    assert max(counts) < numel / parts + ALIGNMENT


@examples
@given(
    *2 * [st.lists(st.integers(0, 60), unique=True, max_size=8).map(sorted).map(lambda ends: list(zip(ends[::2], ends[1::2])))]
)
def test_intersection_has_the_elements_of_both(ours, theirs):
    assert elements(intersect_intervals(ours, theirs)) == sorted({*elements(ours)} & {*elements(theirs)})


def test_shard_is_about_one_part_of_all_parameters():
    table = resolve_layouts({f"blocks.{i}.{x}.weight": (64, 100) for i in range(4) for x in "ab"}, {})
    for ranks in (2, 3, 8):
        flat = FlatLayout(table.values(), per_module=True, ranks=ranks)
        sizes = [sum(stop - start for start, stop in flat.shard(rank)) for rank in range(ranks)]
        assert sum(sizes) == sum(prod(layout.shape) for layout in table.values())
        assert max(sizes) <= flat.numel / ranks + len(flat.groups) * ALIGNMENT


def test_layout_of_many_ranks_takes_no_more_memory():
    """Slices are computed when they are needed."""
    table = resolve_layouts({"embed.weight": (4096, 1024), "head.weight": (4096, 1024)}, {})

    def memory(ranks):
        tracemalloc.start()
        flat = FlatLayout(table.values(), ranks=ranks)
        count, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert flat.slice(flat.buckets[1], ranks - 1)[1] <= flat.buckets[1][1]
        return count

    memory(1)  # what is allocated only once
    assert memory(100_000) < 2 * memory(10) + 10_000
