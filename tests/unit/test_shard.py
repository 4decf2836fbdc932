"""Which rank holds which elements: every element once, cut alike at both ends of a tie, and always at aligned places."""

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
some = settings(max_examples=40, deadline=None)


@st.composite
def layouts(draw, tie=None, whole=None):
    """Parameters of a few blocks, of odd sizes, with a tied head or without; none stays whole, or the matrices, or all."""
    dims, tie = st.integers(1, 40), draw(st.booleans()) if tie is None else tie
    shapes = {"embed.weight": (draw(dims), draw(dims))}
    for block in range(draw(st.integers(1, 3))):
        for name in draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True)):
            shapes[f"blocks.{block}.{name}.weight"] = tuple(draw(st.lists(dims, min_size=1, max_size=2)))
    shapes |= {"norm.weight": (draw(dims),), "head.weight": shapes["embed.weight"]}
    least = draw(st.sampled_from([1, 2, 3])) if whole is None else 1 if whole else 3  # dims
    return resolve_layouts(
        shapes, {"head.weight": "embed.weight"} if tie else {}, is_unsharded=lambda name, shape: len(shape) >= least
    )


@st.composite
def flat_layouts(draw, tie=None, whole=None):
    with small_buckets(draw(BUCKETS)):
        table = draw(layouts(tie, whole))
        return FlatLayout(table.values(), ALIGNMENT * draw(THREADS), draw(st.booleans()), draw(RANKS))


def elements(intervals):
    return [i for start, stop in intervals for i in range(start, stop)]


@some
@given(flat_layouts())
def test_the_shards_are_the_flat_vector_cut_up(flat):
    shards = [flat.shard(rank) for rank in range(flat.ranks)]
    assert sorted(i for shard in shards for i in elements(shard)) == list(range(flat.numel))
    for shard in shards:
        assert all(start < stop for start, stop in shard)
        assert all(one[1] < other[0] for one, other in pairwise(shard))


@some
@given(flat_layouts())
def test_the_pieces_of_all_ranks_are_every_parameter_once(flat):
    found = [flat.param_slices(flat.shard(rank)) for rank in range(flat.ranks)]
    of = {name: [] for name in flat.spans}
    for pieces in found:
        for piece, at in pieces.items():
            assert at == flat.spans[piece.name][0] + piece.start
            of[piece.name] += range(piece.start, piece.stop)
    assert {name: sorted(of[name]) for name in of} == {name: list(range(x.numel)) for name, (_, x) in flat.spans.items()}


@some
@given(flat_layouts())
def test_holders_say_who_has_which_piece(flat):
    shards = [flat.param_slices(flat.shard(rank)) for rank in range(flat.ranks)]
    for name, (_, layout) in flat.spans.items():
        held = shard_owners(name, flat, sharded=True)
        assert [start for start, _, _ in held] == [0, *(stop for _, stop, _ in held[:-1])]
        assert held[-1][1] == layout.numel
        for rank, pieces in enumerate(shards):
            theirs = [range(start, stop) for start, stop, who in held if who == [rank]]
            mine = [range(piece.start, piece.stop) for piece in pieces if piece.name == name]
            assert [i for part in theirs for i in part] == [i for part in mine for i in part]
        assert shard_owners(name, flat, sharded=False) == [(0, layout.numel, list(range(flat.ranks)))]


@some
@given(flat_layouts(whole=True))
def test_what_is_to_stay_whole_is_one_ranks(flat):
    shards = [flat.param_slices(flat.shard(rank)) for rank in range(flat.ranks)]
    for name, (_, layout) in flat.spans.items():
        assert [ParamSlice(name, 0, layout.numel) in pieces for pieces in shards].count(True) == 1
    loads = [sum(piece.numel for piece in pieces) for pieces in shards]
    tied = sum(layout.numel for _, layout in flat.spans.values() if layout.tied_to)  # both its ends are rank 0's
    assert max(loads) - min(loads) <= max(layout.numel for _, layout in flat.spans.values()) + tied


@some
@given(flat_layouts())
def test_groups_are_the_flat_vector_in_order(flat):
    assert [name for group in flat.groups for name in group.names] == list(flat.spans)
    assert [group.start for group in flat.groups] == [0, *(group.stop for group in flat.groups[:-1])]
    assert flat.groups[-1].stop == flat.numel
    for group in flat.groups:
        buckets = flat.buckets_of(group)
        assert buckets[0][0] == group.start
        assert all(one[1] == other[0] for one, other in pairwise(buckets))
        assert buckets[-1][1] == group.stop
        assert all(sum(flat.slices((start, stop))) == stop - start > 0 for start, stop in buckets)
    assert flat.buckets == [bucket for group in flat.groups for bucket in flat.buckets_of(group)]
    assert flat.longest_slice == max(
        stop - start for b in flat.buckets for r in range(flat.ranks) for start, stop in [flat.slice(b, r)]
    )


@given(BUCKETS, RANKS)
@settings(max_examples=20, deadline=None)
def test_no_bucket_is_longer_than_a_bucket(numel, ranks):
    with small_buckets(numel):
        table = resolve_layouts(
            {"embed.weight": (300, 41), "norm.weight": (41,)}, {}, is_unsharded=lambda name, shape: len(shape) > 1
        )
        flats = [FlatLayout(of.values(), ranks=ranks) for of in (table, resolve_layouts({"embed.weight": (300, 41)}, {}))]
    assert all(stop - start <= numel for flat in flats for start, stop in flat.buckets)


@some
@given(layouts(), BUCKETS)
def test_units_are_not_torn_apart_and_each_is_a_group_where_that_is_asked_for(table, bucket):
    with small_buckets(bucket):
        apart, together = (FlatLayout(table.values(), per_module=apart) for apart in (True, False))
    alone = {name for name, layout in table.items() if layout.tied_to or layout.tied_copies}
    units = dict.fromkeys(fsdp_unit(name) for name in reversed(table) if name not in alone)
    assert [{fsdp_unit(name) for name in group.names} for group in apart.groups if not alone & {*group.names}] == [
        {unit} for unit in units
    ]
    for group in together.groups:
        elsewhere = {name for name in table if name not in group.names}
        assert not {fsdp_unit(name) for name in group.names} & {fsdp_unit(name) for name in elsewhere}
    if bucket >= apart.numel and not alone:
        assert len(together.groups) == 1


@some
@given(layouts(tie=True), RANKS, THREADS, BUCKETS, st.booleans())
def test_what_is_tied_stays_alone_and_both_ends_are_cut_alike(table, ranks, threads, bucket, apart):
    """Also where they are on two stages: then each lies in another vector."""
    with small_buckets(bucket):
        whole = FlatLayout(table.values(), ALIGNMENT * threads, apart, ranks)
        halves = [
            FlatLayout([x for x in table.values() if (x.name == "embed.weight") == first], ALIGNMENT * threads, apart, ranks)
            for first in (True, False)
        ]
        for flat in (whole, *halves):
            assert all(len(group.names) == 1 for group in flat.groups if {"embed.weight", "head.weight"} & {*group.names})
        held = [
            shard_owners(name, flat, sharded=True)
            for name, flats in (("embed.weight", (whole, halves[0])), ("head.weight", (whole, halves[1])))
            for flat in flats
        ]
    assert all(each == held[0] for each in held)


@some
@given(flat_layouts())
def test_slots_and_slices_begin_at_aligned_places(flat):
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


def test_the_order_is_that_of_backward_tied_uses_first():
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
def test_slices_are_aligned_and_cover(numel, parts):
    flat = FlatLayout([ParamLayout("x", (numel,))], ranks=parts)
    counts = flat.slices(flat.buckets[0])
    assert len(counts) == parts
    assert sum(counts) == numel
    filled = [count for count in counts if count]
    assert counts[: len(filled)] == filled
    assert all(count % ALIGNMENT == 0 for count in filled)
    assert max(counts) < numel / parts + ALIGNMENT


@some
@given(
    *2 * [st.lists(st.integers(0, 60), unique=True, max_size=8).map(sorted).map(lambda ends: list(zip(ends[::2], ends[1::2])))]
)
def test_intersections_are_what_both_have(ours, theirs):
    assert elements(intersect_intervals(ours, theirs)) == sorted({*elements(ours)} & {*elements(theirs)})


def test_a_shard_is_about_one_part_of_the_whole():
    table = resolve_layouts({f"blocks.{i}.{x}.weight": (64, 100) for i in range(4) for x in "ab"}, {})
    for ranks in (2, 3, 8):
        flat = FlatLayout(table.values(), per_module=True, ranks=ranks)
        sizes = [sum(stop - start for start, stop in flat.shard(rank)) for rank in range(ranks)]
        assert sum(sizes) == sum(prod(layout.shape) for layout in table.values())
        assert max(sizes) <= flat.numel / ranks + len(flat.groups) * ALIGNMENT


def test_many_ranks_are_no_more_to_keep():
    """Slices are worked out when they are asked for."""
    table = resolve_layouts({"embed.weight": (4096, 1024), "head.weight": (4096, 1024)}, {})

    def kept(ranks):
        tracemalloc.start()
        flat = FlatLayout(table.values(), ranks=ranks)
        count, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert flat.slice(flat.buckets[1], ranks - 1)[1] <= flat.buckets[1][1]
        return count

    kept(1)  # what is made once
    assert kept(100_000) < 2 * kept(10) + 10_000
