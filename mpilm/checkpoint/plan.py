"""The plan of a checkpoint: what lies where in its files, and which rank writes which block. Pure, and equal on all ranks.

The files depend on the model and the kinds of moments alone. Their bytes are cut into fixed blocks. One rank writes each block;
each byte range of it comes from one of the ranks that own the range. Every rank walks through all blocks and picks its part.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from mpilm.checkpoint.format import BLOCK_BYTES, ITEM_BYTES, PARAMETER, TensorShape, file_stem, pack_header, stored_name
from mpilm.config.schema import ModelConfig
from mpilm.parallel.layout import ParamPart

MAX_SHARD_BYTES = 5_000_000_000  # per file, as in transformers
HEADER = "header"  # the kind of bytes that every rank has

Parts = Mapping[str, ParamPart]  # of divided parameters, by the names that slices and owners have
NO_PARTS: Parts = MappingProxyType({})
ShardOwners = Mapping[str, Sequence[tuple[int, int, Sequence[int]]]]  # parameter or part -> (first element, end, ranks)


@dataclass(frozen=True)
class StoredTensor:
    """A float32 tensor of the whole model."""

    name: str  # in the file
    key: tuple[str, str]  # kind, parameter
    shape: TensorShape
    unsharded: bool = False  # it has another shape than its parameter, whose owners own all of it
    parts: tuple[tuple[str, ParamPart], ...] = ()  # with their names, if the tensor axis divides the parameter

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be written: its header, then its tensors one after the other."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


class ByteRange(NamedTuple):  # a plan may have a million of them, and a dataclass takes three times as long to make
    """A range of the bytes of a flattened tensor, or of a part of one, whose bytes lie in runs in the file."""

    key: tuple[str, str]  # kind, parameter or part
    start: int  # first byte in the tensor or part
    nbytes: int
    offset: int  # of the first byte in the file
    owners: Sequence[int]  # ranks that hold these bytes
    run: int = 0  # length of a run in bytes; 0: the range is one run
    distance: int = 0  # bytes from the beginning of a run in the file to that of the next

    def view(self, block: Tensor, first: int) -> Tensor:
        """Return a view of the range in `block`, which begins at byte `first` of the file: (runs, bytes of a run)."""
        run, distance = (self.run, self.distance) if self.run else (self.nbytes, self.nbytes)
        return block.as_strided((self.nbytes // run, run), (distance, 1), block.storage_offset() + self.offset - first)


@dataclass(frozen=True)
class FileBlock:
    """A block of a file, which one rank writes."""

    number: int  # counted through all files
    file: TensorFile
    offset: int
    nbytes: int
    writer: int
    parts: Mapping[int, Sequence[ByteRange]]  # by the rank that they come from, the writer included


def plan_files(
    model: ModelConfig, shapes: Mapping[str, Mapping[str, TensorShape]], parts: Parts = NO_PARTS
) -> list[TensorFile]:
    """Return the files for parameters and moments of these shapes, by kind. Tensors lie in reverse model order, like parameters
    in memory: neighbours in a file are mostly neighbours in memory."""
    by_stem: dict[str, list[StoredTensor]] = {file_stem(kind, model): [] for kind in (PARAMETER, "moment")}
    by_source = defaultdict[str, list[tuple[str, ParamPart]]](list)
    for name, part in parts.items():
        by_source[part.source].append((name, part))
    for kind, kind_shapes in shapes.items():
        for name, shape in reversed(list(kind_shapes.items())):
            unsharded = shape != shapes[PARAMETER][name]
            key, stem = (kind, name), file_stem(kind, model)
            by_stem[stem].append(StoredTensor(stored_name(name, kind, model), key, shape, unsharded, tuple(by_source[name])))
    return [file for stem, tensors in by_stem.items() for file in assign_files(stem, tensors)]


def assign_files(stem: str, tensors: Sequence[StoredTensor]) -> list[TensorFile]:
    """Assign tensors to STEM.safetensors, or above MAX_SHARD_BYTES to several files, such as STEM-00001-of-00003."""
    groups: list[list[StoredTensor]] = [[]]
    room = MAX_SHARD_BYTES
    for tensor in tensors:
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = MAX_SHARD_BYTES
        groups[-1].append(tensor)
        room -= tensor.nbytes
    parts = [f"-{n:05d}-of-{len(groups):05d}" if len(groups) > 1 else "" for n in range(1, len(groups) + 1)]
    return [
        TensorFile(f"{stem}{part}.safetensors", pack_header({tensor.name: tensor.shape for tensor in group}), tuple(group))
        for part, group in zip(parts, groups)
    ]


def plan_indexes(files: Sequence[TensorFile]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and content of the index.json of each stem that has several files, as transformers reads it."""
    for stem, group in groupby(files, key=lambda file: file.name.partition("-")[0]):
        parts = list(group)
        if len(parts) > 1:
            total = sum(tensor.nbytes for file in parts for tensor in file.tensors)
            weight_map = {tensor.name: file.name for file in parts for tensor in file.tensors}
            yield f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}


def plan_blocks(files: Sequence[TensorFile], owners: ShardOwners, size: int) -> Iterator[FileBlock]:
    """Yield the blocks of all files in order. The rank with the fewest bytes written so far, less those that it owns of the
    block, writes it: ranks write what they alone own, and replicas take turns. Raises ValueError if `owners` leaves a gap."""
    written, number = [0] * size, 0
    for file in files:
        for index, group in groupby(_split_ranges(file, owners, size), key=lambda r: r.offset // BLOCK_BYTES):
            ranges = list(group)
            owned: Counter[int] = Counter()
            for r in [r for r in ranges if r.key[0] != HEADER] or ranges:
                for rank in r.owners:
                    owned[rank] += r.nbytes
            writer = min(owned, key=lambda rank: (written[rank] - owned[rank], rank))
            parts: dict[int, list[ByteRange]] = defaultdict(list)
            for r in ranges:
                parts[writer if writer in r.owners else r.owners[number % len(r.owners)]].append(r)
            nbytes = sum(r.nbytes for r in ranges)
            yield FileBlock(number, file, index * BLOCK_BYTES, nbytes, writer, dict(parts))
            written[writer] += nbytes
            number += 1


def _split_ranges(file: TensorFile, owners: ShardOwners, size: int) -> Iterator[ByteRange]:
    """Yield the byte ranges of a file in the order of blocks, split at their borders, without empty ones."""
    for r in _list_ranges(file, owners, size):
        done = 0
        if r.run:  # within a block already
            yield r
        while done < r.nbytes and not r.run:
            nbytes = min(r.nbytes - done, BLOCK_BYTES - (r.offset + done) % BLOCK_BYTES)
            yield ByteRange(r.key, r.start + done, nbytes, r.offset + done, r.owners)
            done += nbytes


def _list_ranges(file: TensorFile, owners: ShardOwners, size: int) -> Iterator[ByteRange]:
    """Yield the byte ranges of a file in order, one for each set of owners; several for each if a tensor lies in parts."""
    offset = len(file.header)
    yield ByteRange((HEADER, file.name), 0, offset, 0, range(size))
    for tensor in file.tensors:
        if tensor.parts and not tensor.unsharded:
            yield from _list_part_ranges(tensor, offset, owners)
            offset += tensor.nbytes
            continue
        (kind, name), covered = tensor.key, 0
        shards = owners[tensor.parts[0][0] if tensor.parts else name]
        if tensor.unsharded:
            if len(shards) != 1:
                raise ValueError(f"{name} is sharded, but its {kind} has another shape")
            shards = [(0, prod(tensor.shape), shards[0][2])]
        for first, end, ranks in shards:
            start, stop = first * ITEM_BYTES, end * ITEM_BYTES
            if start != covered or stop < start or not ranks:
                raise ValueError(f"{name}: element {covered // ITEM_BYTES} is owned by no rank, or by two shards")
            yield ByteRange(tensor.key, start, stop - start, offset + start, ranks)
            covered = stop
        if covered != tensor.nbytes:
            raise ValueError(f"{name}: {covered // ITEM_BYTES} of {tensor.nbytes // ITEM_BYTES} elements are owned by ranks")
        offset += tensor.nbytes


def _list_part_ranges(tensor: StoredTensor, offset: int, owners: ShardOwners) -> Iterator[ByteRange]:
    """Yield the byte ranges of a tensor that lies in parts, block by block. `offset`: of the tensor in the file."""
    kind, end = tensor.key[0], offset + tensor.nbytes
    for first in range(offset // BLOCK_BYTES * BLOCK_BYTES, end, BLOCK_BYTES):
        bounds = [max(0, first - offset), min(end, first + BLOCK_BYTES) - offset]  # of the tensor's bytes in this block
        found = 0
        for name, part in tensor.parts:
            begin, run, distance = (ITEM_BYTES * count for count in part.runs)
            start, stop = (_count_before(bound, begin, run, distance) for bound in bounds)
            for shard_start, shard_stop, ranks in owners[name]:
                at, last = max(start, shard_start * ITEM_BYTES), min(stop, shard_stop * ITEM_BYTES)
                while at < last:
                    row, column = divmod(at, run)
                    nbytes = min(run - column, last - at) if column or last - at < run else (last - at) // run * run
                    place = offset + begin + row * distance + column
                    yield ByteRange((kind, name), at, nbytes, place, ranks, min(run, nbytes), distance)
                    at, found = at + nbytes, found + nbytes
        if found != bounds[1] - bounds[0]:
            raise ValueError(f"{tensor.key[1]}: of {bounds[1] - bounds[0]} bytes {found} are owned: some by no rank, or by two")


def _count_before(bound: int, begin: int, run: int, distance: int) -> int:
    """Return how many bytes of runs lie before byte `bound`: the first run begins at `begin`, one every `distance` bytes."""
    row, column = divmod(max(0, bound - begin), distance)
    return row * run + min(column, run)
