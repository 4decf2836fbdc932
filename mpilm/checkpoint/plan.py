"""The plan of a checkpoint: what lies where in its files, and which rank writes which block. Pure, and equal on all ranks.

The files depend on the model and the kinds of moments alone. Their bytes are cut into fixed blocks. One rank writes each block;
each byte range of it comes from one of the ranks that own the range. Every rank walks through all blocks and picks its part.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
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
    run: int  # length of a run in bytes
    distance: int  # bytes from the beginning of a run in the file to that of the next

    def view(self, block: Tensor, first: int) -> Tensor:
        """Return a view of the range in `block`, which begins at byte `first` of the file: (runs, bytes of a run)."""
        sizes, strides = (self.nbytes // self.run, self.run), (self.distance, 1)
        return block.as_strided(sizes, strides, block.storage_offset() + self.offset - first)


@dataclass(frozen=True)
class FileBlock:
    """A block of a file, which one rank writes."""

    number: int  # counted through all files
    file: TensorFile
    offset: int
    nbytes: int
    writer: int
    parts: Mapping[int, Sequence[ByteRange]]  # by the rank that they come from, the writer included


def plan_files(model: ModelConfig, shapes: Mapping[str, Mapping[str, TensorShape]], parts: Parts) -> list[TensorFile]:
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


def plan_blocks(files: Sequence[TensorFile], owners: ShardOwners, size: int, block_bytes: int = 0) -> Iterator[FileBlock]:
    """Yield the blocks of all files in order; with `block_bytes` 0, those of a checkpoint. The rank with the fewest bytes
    written so far, less those that it owns of the block, writes it: ranks write what they alone own, and replicas take turns.
    Raises ValueError if `owners` leaves a gap."""
    block_bytes, written, number = block_bytes or BLOCK_BYTES, [0] * size, 0
    for file in files:
        for index, group in groupby(_list_ranges(file, owners, size, block_bytes), key=lambda r: r.offset // block_bytes):
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
            yield FileBlock(number, file, index * block_bytes, nbytes, writer, dict(parts))
            written[writer] += nbytes
            number += 1


def _list_ranges(file: TensorFile, owners: ShardOwners, size: int, block_bytes: int) -> Iterator[ByteRange]:
    """Yield the byte ranges of a file in the order of blocks, split at their borders, without empty ones."""
    header, offset = StoredTensor(file.name, (HEADER, file.name), (len(file.header) // ITEM_BYTES,)), 0
    owners = {**owners, file.name: [(0, header.shape[0], range(size))]}
    for tensor in (header, *file.tensors):
        if tensor.nbytes:
            yield from _list_tensor_ranges(tensor, offset, owners, block_bytes)
        offset += tensor.nbytes


def _list_tensor_ranges(tensor: StoredTensor, offset: int, owners: ShardOwners, block_bytes: int) -> Iterator[ByteRange]:
    """Do the same for a tensor, `offset` bytes from the beginning of the file. An undivided one is a part with a single run."""
    (kind, name), numel, end = tensor.key, prod(tensor.shape), offset + tensor.nbytes
    undivided = {name: (0, numel, numel)}
    runs = {name: part.runs for name, part in tensor.parts} or undivided
    shards = {name: owners[name] for name in runs}
    if tensor.unsharded:
        first_part = next(iter(shards.values()))
        if len(first_part) != 1:
            raise ValueError(f"{name} is sharded, but its {kind} has another shape")
        runs, shards = undivided, {name: [(0, numel, first_part[0][2])]}
    sizes = {part: numel // distance * run for part, (_, run, distance) in runs.items()}
    if sum(sizes.values()) != numel:
        raise ValueError(f"{name}: of {numel} elements {sum(sizes.values())} lie in parts: {', '.join(sizes)}")
    for part, size in sizes.items():
        _check_owned(part, shards[part], size)
    for first in range(offset // block_bytes * block_bytes, end, block_bytes):
        bounds = max(0, first - offset), min(end, first + block_bytes) - offset  # of the tensor's bytes in this block
        for part, elements in runs.items():
            begin, run, distance = (ITEM_BYTES * count for count in elements)
            start, stop = (_count_before(bound, begin, run, distance) for bound in bounds)
            first_shard = bisect_right(shards[part], start, key=lambda shard: ITEM_BYTES * shard[1])
            stop_shard = bisect_left(shards[part], stop, key=lambda shard: ITEM_BYTES * shard[0])
            for shard_start, shard_stop, ranks in shards[part][first_shard:stop_shard]:
                at, last = max(start, shard_start * ITEM_BYTES), min(stop, shard_stop * ITEM_BYTES)
                while at < last:
                    row, column = divmod(at, run)
                    nbytes = min(run - column, last - at) if column or last - at < run else (last - at) // run * run
                    place = offset + begin + row * distance + column
                    yield ByteRange((kind, part), at, nbytes, place, ranks, min(run, nbytes), distance)
                    at += nbytes


def _check_owned(name: str, shards: Sequence[tuple[int, int, Sequence[int]]], numel: int) -> None:
    """Raise ValueError unless the shards that have owners follow each other from the first element to the last."""
    owned = [(start, stop) for start, stop, ranks in shards if ranks]
    for (_, before), (after, _) in pairwise([(0, 0), *owned, (numel, numel)]):
        if before != after:
            raise ValueError(f"{name}: element {min(before, after)} of {numel} is owned by no rank, or by two shards")


def _count_before(bound: int, begin: int, run: int, distance: int) -> int:
    """Return how many bytes of runs lie before byte `bound`: the first run begins at `begin`, one every `distance` bytes."""
    row, column = divmod(max(0, bound - begin), distance)
    return row * run + min(column, run)
