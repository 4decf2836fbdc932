"""Which rank holds which elements: pure arithmetic on flat vectors.

The parameters of a stage lie in one flat vector, one slot after the other, in the reverse of the order in which forward
uses them, which is the order in which backward is done with their gradients. The vector is cut into groups (what is
exchanged together), groups into buckets (what travels at once), and a bucket into one slice a data rank. Under ZeRO a rank
owns its slice of every bucket. The buckets of a parameter that is to stay whole are one rank's, and the others' slices empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    `ranks`: of the data axis. `apart`: every unit is a group of its own (ZeRO-2 and 3); or else small ones are together.
    """

    def __init__(self, layouts: Iterable[Layout], alignment: int = ALIGNMENT, apart: bool = False, ranks: int = 1):
        backward_order = list(layouts)[::-1]
        self.alignment = alignment
        self.slots: dict[str, tuple[int, Layout]] = {}
        self.numel = 0
        for layout in sorted(backward_order, key=lambda layout: layout.tied_to is None):
            self.slots[layout.name] = (self.numel, layout)
            self.numel += self._padded(layout.numel)
        self.uses_numel = sum(self._padded(x.numel) for x in backward_order if x.tied_to is not None)
        self.groups = _groups(self, BUCKET if not apart else 0)
        self.ranks = ranks
        self.owners = _owners([layout for _, layout in self.slots.values() if layout.whole], ranks)
        cut = {group: dict(self._cut(group)) for group in self.groups}
        self._buckets = {group: list(of) for group, of in cut.items()}
        self._owner = {bucket: owner for of in cut.values() for bucket, owner in of.items()}

    def _padded(self, numel: int) -> int:
        return -(-numel // self.alignment) * self.alignment

    def slot(self, name: str) -> Interval:
        """Where a parameter lies, padding included."""
        at, layout = self.slots[name]
        return at, at + self._padded(layout.numel)

    def _cut(self, group: Group) -> Iterator[tuple[Interval, int | None]]:
        """The buckets of a group, and the rank that owns each, if one does."""
        full = max(self.alignment, BUCKET // self.alignment * self.alignment)
        for (start, stop), owner in self._stretches(group):
            for at in range(start, stop, full):
                yield (at, min(at + full, stop)), owner

    def _stretches(self, group: Group) -> list[tuple[Interval, int | None]]:
        """A group in parts that are one rank's, or everybody's."""
        found: list[tuple[Interval, int | None]] = []
        for name in group.names:
            (start, stop), owner = self.slot(name), self.owners.get(name)
            if found and owner is None and found[-1][1] is None:
                start = found.pop()[0][0]
            found.append(((start, stop), owner))
        return found

    @property
    def buckets(self) -> list[Interval]:
        """All buckets, in order."""
        return list(self._owner)

    def buckets_of(self, group: Group) -> list[Interval]:
        """The buckets of a group; the last of a stretch may be short."""
        return self._buckets[group]

    def slices(self, bucket: Interval) -> list[int]:
        """The elements of a bucket that each rank owns, in rank order; some may be none."""
        (start, stop), owner = bucket, self._owner[bucket]
        if owner is None:
            return slice_counts(stop - start, self.ranks, self.alignment)
        return [stop - start if rank == owner else 0 for rank in range(self.ranks)]

    def slice(self, bucket: Interval, rank: int) -> Interval:
        """Where the elements of a bucket lie that a rank owns."""
        (start, stop), owner = bucket, self._owner[bucket]
        if owner is not None:
            return (stop, stop) if rank > owner else (start, stop if rank == owner else start)
        each = slice_numel(stop - start, self.ranks, self.alignment)
        return min(stop, start + rank * each), min(stop, start + (rank + 1) * each)

    @property
    def longest_slice(self) -> int:
        """The most elements of a bucket that a rank owns."""
        return max(
            stop - start if owner is not None else min(stop - start, slice_numel(stop - start, self.ranks, self.alignment))
            for (start, stop), owner in self._owner.items()
        )

    def shard(self, rank: int) -> list[Interval]:
        """What a data rank owns: its slice of every bucket, neighbours joined."""
        return join(self.slice(bucket, rank) for bucket in self._owner)

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
        alone = _is_tied(layout)
        if groups:
            unit, last, last_alone = groups[-1]
            together = unit == unit_of(name) or stop - last.start <= merge_up_to
            if together and not alone and not last_alone:
                groups[-1] = (unit_of(name), Group((*last.names, name), last.start, stop), False)
                continue
        groups.append((unit_of(name), Group((name,), start, stop), alone))
    return [group for _, group, _ in groups]


def _owners(wholes: Sequence[Layout], ranks: int) -> dict[str, int]:
    """The rank that has each of these parameters: the large ones first, each to the rank that has least so far. The two ends of
    a tie, which may be on different stages, are rank 0's."""
    load, owners = [0] * ranks, {}
    for layout in sorted(wholes, key=lambda layout: (not _is_tied(layout), -layout.numel)):
        owner = 0 if _is_tied(layout) else min(range(ranks), key=load.__getitem__)
        owners[layout.name] = owner
        load[owner] += layout.numel
    return owners


def _is_tied(layout: Layout) -> bool:
    return layout.tied_to is not None or bool(layout.uses)


def slice_numel(numel: int, parts: int, alignment: int = ALIGNMENT) -> int:
    """Elements of a slice, but for the last ones."""
    return -(-numel // (parts * alignment)) * alignment


def slice_counts(numel: int, parts: int, alignment: int = ALIGNMENT) -> list[int]:
    """The aligned slices of a bucket, one a rank; the last ones may be short or empty."""
    each = slice_numel(numel, parts, alignment)
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


def join(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted intervals with empty ones left out and neighbours made one."""
    found: list[Interval] = []
    for start, stop in intervals:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found += [(start, stop)] if stop > start else []
    return found


def holders(name: str, flat: FlatLayout, sharded: bool, one: bool = False) -> list[tuple[int, int, list[int]]]:
    """Ranges of a parameter's elements in their order, and the data ranks that hold each; `one`: the first of them alone."""
    at, layout = flat.slots[name]
    if not sharded or layout.whole:
        return [(0, layout.numel, [flat.owners[name]] if sharded else list(range(1 if one else flat.ranks)))]
    (group,) = (group for group in flat.groups if name in group.names)
    return [
        (start - at, stop - at, [rank])
        for bucket in flat.buckets_of(group)
        for rank in range(flat.ranks)
        for start, stop in intersect([flat.slice(bucket, rank)], [(at, at + layout.numel)])
    ]
