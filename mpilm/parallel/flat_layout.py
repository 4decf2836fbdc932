"""The flat layout of a stage: which rank owns which elements. Pure arithmetic.

The parameters of a stage lie in one flat vector, in the reverse of the order in which forward uses them: the order in which
backward completes their gradients. The vector is divided into groups (reduced together), groups into buckets (one message
each), and a bucket into one slice for each rank of the reduce axes. Under ZeRO a rank owns its slice of every bucket. A
parameter that must stay unsharded has buckets of its own, owned by one rank; the slices of the other ranks are empty.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ReduceGroup:
    """Parameters whose gradients are reduced together, and their interval of the flat vector."""

    names: tuple[str, ...]
    start: int
    stop: int


class FlatLayout:
    """The position of each parameter of a stage: `spans` maps its name to (offset, layout).

    Copies of tied parameters come first. Offsets, and so all slices, are multiples of `alignment`: 16 elements for each thread
    of a rank, so that a kernel's vectors, and the remainder at the end of a thread's share, are the same however the vector is
    divided. `per_module`: every FSDP unit is a group of its own (ZeRO-2 and 3); otherwise small ones are merged.
    `ranks`: size of the reduce axes.
    """

    def __init__(self, layouts: Iterable[ParamLayout], alignment: int = ALIGNMENT, per_module: bool = False, ranks: int = 1):
        backward_order = list(layouts)[::-1]
        self.alignment = alignment
        self.spans: dict[str, tuple[int, ParamLayout]] = {}
        self.numel = 0
        for layout in sorted(backward_order, key=lambda layout: layout.tied_to is None):
            self.spans[layout.name] = (self.numel, layout)
            self.numel += self._padded(layout.numel)
        self.tied_copies_numel = sum(self._padded(x.numel) for x in backward_order if x.tied_to is not None)
        self.groups = _make_groups(self, 0 if per_module else BUCKET)
        self.ranks = ranks
        self.owners = _assign_owners([layout for _, layout in self.spans.values() if layout.unsharded], ranks)
        buckets = {group: dict(self._cut_buckets(group)) for group in self.groups}
        self._buckets = {group: list(of_group) for group, of_group in buckets.items()}
        self._owner = {bucket: owner for of_group in buckets.values() for bucket, owner in of_group.items()}

    def _padded(self, numel: int) -> int:
        return -(-numel // self.alignment) * self.alignment

    def padded_span(self, name: str) -> Interval:
        """Return the interval of a parameter, padding included."""
        start, layout = self.spans[name]
        return start, start + self._padded(layout.numel)

    def _cut_buckets(self, group: ReduceGroup) -> Iterator[tuple[Interval, int | None]]:
        """Yield the buckets of a group, and the rank that owns each, if one rank does."""
        full = max(self.alignment, BUCKET // self.alignment * self.alignment)
        for (start, stop), owner in self._stretches(group):
            for at in range(start, stop, full):
                yield (at, min(at + full, stop)), owner

    def _stretches(self, group: ReduceGroup) -> list[tuple[Interval, int | None]]:
        """Divide a group into stretches owned by one rank or shared by all."""
        stretches: list[tuple[Interval, int | None]] = []
        for name in group.names:
            (start, stop), owner = self.padded_span(name), self.owners.get(name)
            if stretches and owner is None and stretches[-1][1] is None:
                start = stretches.pop()[0][0]
            stretches.append(((start, stop), owner))
        return stretches

    @property
    def buckets(self) -> list[Interval]:
        """All buckets, in order."""
        return list(self._owner)

    def buckets_of(self, group: ReduceGroup) -> list[Interval]:
        """Return the buckets of a group; the last of a stretch may be short."""
        return self._buckets[group]

    def slices(self, bucket: Interval) -> list[int]:
        """Return the number of elements of a bucket that each rank owns; it may be 0."""
        return [stop - start for start, stop in (self.slice(bucket, rank) for rank in range(self.ranks))]

    def slice(self, bucket: Interval, rank: int) -> Interval:
        """Return the interval of a bucket that a rank owns."""
        (start, stop), owner = bucket, self._owner[bucket]
        if owner is not None:
            return (stop, stop) if rank > owner else (start, stop if rank == owner else start)
        each = self._slice_numel(stop - start)
        return min(stop, start + rank * each), min(stop, start + (rank + 1) * each)

    def _slice_numel(self, numel: int) -> int:
        """Return the elements of a slice of a shared bucket; the last slices may be shorter or empty."""
        return -(-numel // (self.ranks * self.alignment)) * self.alignment

    @property
    def longest_slice(self) -> int:
        """The most elements of a bucket that one rank owns."""
        return max(
            stop - start if owner is not None else min(stop - start, self._slice_numel(stop - start))
            for (start, stop), owner in self._owner.items()
        )

    def shard(self, rank: int) -> list[Interval]:
        """Return what a rank owns: its slice of every bucket, neighbours merged."""
        return merge_intervals(self.slice(bucket, rank) for bucket in self._owner)

    def param_slices(self, intervals: Sequence[Interval]) -> dict[ParamSlice, int]:
        """Return the slices of parameters within sorted intervals, and their offsets; padding is left out."""
        slices: dict[ParamSlice, int] = {}
        for name, (at, layout) in self.spans.items():
            for start, stop in intersect_intervals([(at, at + layout.numel)], intervals):
                slices[ParamSlice(name, start - at, stop - at)] = start
        return slices


def _make_groups(flat: FlatLayout, merge_up_to: int) -> list[ReduceGroup]:
    """Return the FSDP units in flat order; neighbours are merged up to `merge_up_to` elements.

    Tied parameters stay alone, so that both ends of a tie are divided alike.
    """
    groups: list[tuple[str, ReduceGroup, bool]] = []
    for name, (_, layout) in flat.spans.items():
        start, stop = flat.padded_span(name)
        unit = fsdp_unit(name)
        if groups:
            last_unit, last, last_tied = groups[-1]
            if not layout.is_tied and not last_tied and (last_unit == unit or stop - last.start <= merge_up_to):
                groups[-1] = (unit, ReduceGroup((*last.names, name), last.start, stop), False)
                continue
        groups.append((unit, ReduceGroup((name,), start, stop), layout.is_tied))
    return [group for _, group, _ in groups]


def _assign_owners(unsharded: Sequence[ParamLayout], ranks: int) -> dict[str, int]:
    """Assign each parameter to a rank: large ones first, each to the rank with the least so far.

    The two ends of a tie, which may be on different stages, belong to rank 0.
    """
    load, owners = [0] * ranks, {}
    for layout in sorted(unsharded, key=lambda layout: (not layout.is_tied, -layout.numel)):
        owner = 0 if layout.is_tied else min(range(ranks), key=load.__getitem__)
        owners[layout.name] = owner
        load[owner] += layout.numel
    return owners


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


def shard_owners(name: str, flat: FlatLayout, sharded: bool, first_only: bool = False) -> list[tuple[int, int, list[int]]]:
    """Return ranges of a parameter's elements in order, each with the ranks of the reduce axes that own it.

    `first_only`: name only the first of the ranks that replicate a range.
    """
    at, layout = flat.spans[name]
    if not sharded or layout.unsharded:
        return [(0, layout.numel, [flat.owners[name]] if sharded else list(range(1 if first_only else flat.ranks)))]
    (group,) = (group for group in flat.groups if name in group.names)
    return [
        (start - at, stop - at, [rank])
        for bucket in flat.buckets_of(group)
        for rank in range(flat.ranks)
        for start, stop in intersect_intervals([flat.slice(bucket, rank)], [(at, at + layout.numel)])
    ]
