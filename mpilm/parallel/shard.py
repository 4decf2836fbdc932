"""Which rank holds which elements: pure arithmetic on flat vectors.

The parameters of a stage lie in one flat vector, one slot after the other, in the reverse of the order in which forward
uses them, which is the order in which backward is done with their gradients. The vector is cut into groups (what is
exchanged together), groups into buckets (what travels at once), and a bucket into one slice a data rank. Under ZeRO a rank
owns its slice of every bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpilm.parallel.layout import Layout
from mpilm.parallel.plan import unit_of

Interval = tuple[int, int]  # elements of a flat vector: the first, and the one after the last

ALIGNMENT = 16  # elements; 64 bytes: a kernel may take another path, with other roundings, on unaligned memory
BUCKET = 1 << 20  # elements; 4 MiB stay in the cache between the exchange, the addition and the gather


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the parameter `name`, counted in its flattened form."""

    name: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Group:
    """Parameters whose gradients are exchanged together, and where they lie."""

    names: tuple[str, ...]
    start: int
    stop: int


class FlatLayout:
    """Where each parameter of a stage lies: `slots` holds {name: (offset, layout)}.

    Tied uses come first. Offsets, and so all slices, are multiples of `alignment`: 16 elements for each thread of a rank, so
    that a kernel's vectors, and what is left over at the end of a thread's share, fall alike however the vector is cut.
    `apart`: every unit is a group of its own (ZeRO-2 and 3), or else small ones are grouped together.
    """

    def __init__(self, layouts: Iterable[Layout], alignment: int = ALIGNMENT, apart: bool = False):
        backward_order = list(layouts)[::-1]
        self.alignment = alignment
        self.slots: dict[str, tuple[int, Layout]] = {}
        self.numel = 0
        for layout in sorted(backward_order, key=lambda layout: layout.tied_to is None):
            self.slots[layout.name] = (self.numel, layout)
            self.numel += self._padded(layout.numel)
        self.uses_numel = sum(self._padded(x.numel) for x in backward_order if x.tied_to is not None)
        self.groups = _groups(self, BUCKET if not apart else 0)

    def _padded(self, numel: int) -> int:
        return -(-numel // self.alignment) * self.alignment

    def slot(self, name: str) -> Interval:
        """Where a parameter lies, padding included."""
        at, layout = self.slots[name]
        return at, at + self._padded(layout.numel)

    @property
    def bucket_numel(self) -> int:
        """The elements of a full bucket."""
        return max(self.alignment, BUCKET // self.alignment * self.alignment)

    def buckets(self, group: Group) -> list[Interval]:
        """A group in parts, the last of which may be short."""
        return [(at, min(at + self.bucket_numel, group.stop)) for at in range(group.start, group.stop, self.bucket_numel)]

    def slices(self, bucket: Interval, ranks: int) -> list[int]:
        """The elements of a bucket that each rank owns, in rank order; the last slices may be short or empty."""
        return slice_counts(bucket[1] - bucket[0], ranks, self.alignment)

    def shard(self, rank: int, ranks: int) -> list[Interval]:
        """What one of `ranks` data ranks owns: its slice of every bucket, empty ones left out."""
        found = []
        for group in self.groups:
            for start, stop in self.buckets(group):
                counts = self.slices((start, stop), ranks)
                at = start + sum(counts[:rank])
                found.append((at, at + counts[rank]))
        return [(start, stop) for start, stop in found if stop > start]

    def pieces(self, intervals: Sequence[Interval]) -> dict[Piece, int]:
        """The parts of parameters that lie in sorted intervals, and where; padding left out."""
        found: dict[Piece, int] = {}
        for name, (at, layout) in self.slots.items():
            for start, stop in intersect([(at, at + layout.numel)], intervals):
                found[Piece(name, start - at, stop - at)] = start
        return found


def _groups(flat: FlatLayout, merge_up_to: int) -> list[Group]:
    """Units in flat order; neighbours together where that makes no more than `merge_up_to` elements. What is tied stays alone,
    so that the two ends of a tie are cut alike."""
    groups: list[tuple[str, Group, bool]] = []
    for name, (_, layout) in flat.slots.items():
        start, stop = flat.slot(name)
        alone = layout.tied_to is not None or bool(layout.uses)
        if groups:
            unit, last, last_alone = groups[-1]
            together = unit == unit_of(name) or stop - last.start <= merge_up_to
            if together and not alone and not last_alone:
                groups[-1] = (unit_of(name), Group((*last.names, name), last.start, stop), False)
                continue
        groups.append((unit_of(name), Group((name,), start, stop), alone))
    return [group for _, group, _ in groups]


def slice_counts(numel: int, parts: int, alignment: int = ALIGNMENT) -> list[int]:
    """The aligned slices of a bucket, one a rank; the last ones may be short or empty."""
    each = -(-numel // (parts * alignment)) * alignment
    return [max(0, min(each, numel - r * each)) for r in range(parts)]


def intersect(ours: Sequence[Interval], theirs: Sequence[Interval]) -> list[Interval]:
    """What two sorted lists of intervals have in common."""
    found = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        start, stop = max(ours[i][0], theirs[j][0]), min(ours[i][1], theirs[j][1])
        if start < stop:
            found.append((start, stop))
        if ours[i][1] <= theirs[j][1]:
            i += 1
        else:
            j += 1
    return found


def holders(name: str, flat: FlatLayout, ranks: int, sharded: bool) -> list[tuple[int, int, list[int]]]:
    """Ranges of a parameter's elements in their order, and the data ranks that hold each."""
    at, layout = flat.slots[name]
    if not sharded:
        return [(0, layout.numel, list(range(ranks)))]
    found = []
    buckets = [bucket for group in flat.groups if name in group.names for bucket in flat.buckets(group)]
    for start, stop in buckets:
        for rank, count in enumerate(flat.slices((start, stop), ranks)):
            found += [(s - at, e - at, [rank]) for s, e in intersect([(start, start + count)], [(at, at + layout.numel)])]
            start += count
    return found
