"""The flat layout of a stage: which rank owns which elements. Pure arithmetic.

The parameters of a stage lie in one flat vector, in the reverse of the order in which forward uses them: the order in which
backward completes their gradients. The vector is divided into groups (reduced together), groups into buckets (one message
each), and a bucket into one slice for each rank of the reduce axes. Under ZeRO a rank owns its slice of every bucket. A
parameter that must stay unsharded has buckets of its own, owned by one rank; the slices of the other ranks are empty.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import NamedTuple

from mpilm.ops.tree import Interval
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.plan import fsdp_unit

ALIGNMENT = 16  # elements; 64 bytes: on unaligned memory a kernel may take another path, which rounds differently
BUCKET = 1 << 20  # elements; 4 MiB stay in the cache between exchange, addition and gather


@dataclass(frozen=True)
class ParamSlice:
    """Elements [start, stop) of the flattened parameter `name`."""

    name: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class ReduceGroup(NamedTuple):
    """Parameters whose gradients are reduced together, and their interval of the flat vector."""

    names: list[str]
    start: int
    stop: int
    buckets: list[Interval]  # that divide it; the last of a stretch may be short


class FlatLayout:
    """The position of each parameter of a stage: `spans` maps its name to (offset, layout). Copies of tied parameters come
    first. Offsets, and so all slices, are multiples of `alignment`, 16 elements for each thread of a rank: a kernel's vectors,
    and the remainder at the end of a thread's share, are the same however the vector is divided. `per_module`: every FSDP unit
    is a group of its own (ZeRO-2 and 3); otherwise small ones are merged. `ranks`: size of the reduce axes."""

    def __init__(self, layouts: Iterable[ParamLayout], alignment: int = ALIGNMENT, per_module: bool = False, ranks: int = 1):
        self.alignment, self.ranks, self.numel = alignment, ranks, 0
        self.spans: dict[str, tuple[int, ParamLayout]] = {}
        backward_order = list(layouts)[::-1]
        for layout in sorted(backward_order, key=lambda layout: layout.tied_to is None):
            self.spans[layout.name] = (self.numel, layout)
            self.numel += self._padded(layout.numel)
        self.tied_copies_numel = sum(self._padded(x.numel) for _, x in self.spans.values() if x.tied_to is not None)
        self.owners = _assign_owners([layout for _, layout in self.spans.values() if layout.unsharded], ranks)
        self._bucket_owners: dict[Interval, int | None] = {}  # None: every rank has a slice
        self.groups = [self._make_group(names) for names in self._group_parameters(0 if per_module else BUCKET)]
        self.buckets = list(self._bucket_owners)  # in order
        longest = (self.slice(bucket, owner or 0) for bucket, owner in self._bucket_owners.items())
        self.longest_slice = max((stop - start for start, stop in longest), default=0)  # the most that a rank owns of a bucket

    def _padded(self, numel: int) -> int:
        return -(-numel // self.alignment) * self.alignment

    def padded_span(self, name: str) -> Interval:
        """Return the interval of a parameter, padding included."""
        start, layout = self.spans[name]
        return start, start + self._padded(layout.numel)

    def _group_parameters(self, merge_up_to: int) -> list[list[str]]:
        """Return the FSDP units in flat order; neighbours are merged up to `merge_up_to` elements. Tied parameters stay alone,
        so that both ends of a tie are divided alike."""
        groups: list[list[str]] = []
        for name, (_, layout) in self.spans.items():
            last = groups[-1] if groups else [name]
            numel = self.padded_span(name)[1] - self.spans[last[0]][0]
            is_near = fsdp_unit(last[-1]) == fsdp_unit(name) or numel <= merge_up_to
            if groups and is_near and not (layout.is_tied or self.spans[last[-1]][1].is_tied):
                last.append(name)
            else:
                groups.append([name])
        return groups

    def _make_group(self, names: list[str]) -> ReduceGroup:
        """Cut a group into buckets. Those of an unsharded parameter contain no other, and one rank owns them."""
        full = max(self.alignment, BUCKET // self.alignment * self.alignment)
        buckets: list[Interval] = []
        for unsharded, stretch in groupby(names, key=lambda name: name if name in self.owners else ""):
            spans = [self.padded_span(name) for name in stretch]
            start, stop = spans[0][0], spans[-1][1]
            cut = [(at, min(at + full, stop)) for at in range(start, stop, full)]
            self._bucket_owners |= dict.fromkeys(cut, self.owners.get(unsharded))
            buckets += cut
        return ReduceGroup(names, buckets[0][0], buckets[-1][1], buckets)

    def group_of(self, name: str) -> ReduceGroup:
        return next(group for group in self.groups if name in group.names)

    def slices(self, bucket: Interval) -> list[int]:
        """Return the number of elements of a bucket that each rank owns; it may be 0."""
        return [stop - start for start, stop in (self.slice(bucket, rank) for rank in range(self.ranks))]

    def slice(self, bucket: Interval, rank: int) -> Interval:
        """Return the interval of a bucket that a rank owns."""
        (start, stop), owner = bucket, self._bucket_owners[bucket]
        if owner is not None:
            return (stop, stop) if rank > owner else (start, stop if rank == owner else start)
        each = self._padded(-(-(stop - start) // self.ranks))  # the last slices may be shorter or empty
        return min(stop, start + rank * each), min(stop, start + (rank + 1) * each)

    def shard(self, rank: int) -> list[Interval]:
        """Return what a rank owns: its slice of every bucket, neighbours merged."""
        return merge_intervals(self.slice(bucket, rank) for bucket in self.buckets)

    def param_slices(self, intervals: Sequence[Interval]) -> dict[ParamSlice, int]:
        """Return the slices of parameters within sorted intervals, and their offsets; padding is left out."""
        slices: dict[ParamSlice, int] = {}
        for name, (at, layout) in self.spans.items():
            for start, stop in intersect_intervals([(at, at + layout.numel)], intervals):
                slices[ParamSlice(name, start - at, stop - at)] = start
        return slices


def _assign_owners(unsharded: Sequence[ParamLayout], ranks: int) -> dict[str, int]:
    """Assign each parameter, with all its parts, to a rank: large ones first, each to the rank with the least so far. The two
    ends of a tie, which may be on different stages, belong to rank 0."""
    load, owners = [0] * ranks, dict[str, int]()
    for layout in sorted(unsharded, key=lambda layout: (not layout.is_tied, -prod(layout.global_shape))):
        if layout.source not in owners:
            owners[layout.source] = 0 if layout.is_tied else min(range(ranks), key=load.__getitem__)
            load[owners[layout.source]] += prod(layout.global_shape)
    return {layout.name: owners[layout.source] for layout in unsharded}


def intersect_intervals(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """Return the intersection of two sorted lists of intervals."""
    common = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            common.append((start, stop))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return common


def merge_intervals(intervals: Iterable[Interval]) -> list[Interval]:
    """Return sorted intervals without empty ones, adjacent ones merged."""
    merged: list[Interval] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged += [(start, stop)] if stop > start else []
    return merged


def shard_owners(name: str, flat: FlatLayout, sharded: bool) -> list[tuple[int, int, list[int]]]:
    """Return ranges of a parameter's elements in order, each with the ranks of the reduce axes that own it."""
    at, layout = flat.spans[name]
    if not sharded or layout.unsharded:
        return [(0, layout.numel, [flat.owners[name]] if sharded else list(range(flat.ranks)))]
    return [
        (start - at, stop - at, [rank])
        for bucket in flat.group_of(name).buckets
        for rank in range(flat.ranks)
        for start, stop in intersect_intervals([flat.slice(bucket, rank)], [(at, at + layout.numel)])
    ]
