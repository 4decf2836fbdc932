"""What lies where in the files of a checkpoint, and who writes which block: pure, and the same on all ranks.

The files are a function of the model alone. Their bytes are cut into fixed blocks; each block has one writer, and each range
of a block comes from one of the ranks that hold it. Every rank walks through all blocks and picks out its own part.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

from mpilm.checkpoint.tensors import Shape, pack_header

ITEM_BYTES = 4  # float32
HEADER = "header"  # the kind of bytes that every rank has

Key = tuple[str, str]  # the kind of a tensor, and the parameter it belongs to
Holders = Callable[[str], Sequence[tuple[int, int, Sequence[int]]]]  # parameter -> (first element, end, ranks that hold them)


@dataclass(frozen=True)
class StoredTensor:
    """A float32 tensor of the whole model and its name in the file. `uncut`: its shape is not that of its parameter, and it
    lies whole where the parameter lies whole."""

    name: str
    key: Key
    shape: Shape
    uncut: bool = False

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
    def header_key(self) -> Key:
        return HEADER, self.name

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def blocks(self, block_bytes: int) -> int:
        return -(-self.nbytes // block_bytes)


class Range(NamedTuple):  # there may be a million of them, and a dataclass takes three times as long to make
    """Bytes [start, stop) of a flattened tensor, which lie from byte `at` of their file on, and the ranks that hold them."""

    key: Key
    start: int
    stop: int
    at: int
    ranks: Sequence[int]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Bytes of a file from `offset` on, with one writer; `parts`: which rank gives what, the writer's own part included.

    `number` counts the blocks of all files.
    """

    number: int
    file: TensorFile
    offset: int
    nbytes: int
    writer: int
    parts: Mapping[int, Sequence[Range]]


def tensor_files(stem: str, tensors: Sequence[StoredTensor], limit_bytes: int) -> list[TensorFile]:
    """STEM.safetensors, or STEM-00001-of-0000N.safetensors and so on where the tensors have more than `limit_bytes`; only a
    single tensor may exceed it."""
    groups: list[list[StoredTensor]] = [[]]
    room = limit_bytes
    for tensor in tensors:
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = limit_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    headers = [pack_header({tensor.name: tensor.shape for tensor in group}) for group in groups]
    parts = [f"-{n:05d}-of-{len(groups):05d}" if len(groups) > 1 else "" for n in range(1, len(groups) + 1)]
    names = [f"{stem}{part}.safetensors" for part in parts]
    return [TensorFile(*file) for file in zip(names, headers, map(tuple, groups))]


def index_of(files: Sequence[TensorFile]) -> dict[str, Any]:
    """The index.json of a model in several files, as transformers reads it."""
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return {
        "metadata": {"total_size": total},
        "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
    }


def plan_blocks(files: Sequence[TensorFile], holders: Holders, size: int, block_bytes: int) -> Iterator[Block]:
    """The blocks of all files in order, one at a time; raises ValueError where `holders` leaves a gap.

    A block goes to a rank that holds much of it and has written little so far: `written` minus `held` bytes decides, so that
    what is held by one rank is written there, and what is held by many is written in turn.
    """
    written = [0] * size
    number = 0
    for file in files:
        ranges = _cut(_ranges(file, holders, size), block_bytes)
        for index, group in groupby(ranges, key=lambda r: r.at // block_bytes):
            block = _block(number, file, index * block_bytes, list(group), written)
            written[block.writer] += block.nbytes
            number += 1
            yield block


def _block(number: int, file: TensorFile, offset: int, ranges: list[Range], written: Sequence[int]) -> Block:
    held: Counter[int] = Counter()
    for r in [r for r in ranges if r.key[0] != HEADER] or ranges:
        for rank in r.ranks:
            held[rank] += r.nbytes
    writer = min(held, key=lambda rank: (written[rank] - held[rank], rank))
    parts: dict[int, list[Range]] = defaultdict(list)
    for r in ranges:
        giver = writer if writer in r.ranks else r.ranks[number % len(r.ranks)]
        parts[giver].append(r)
    return Block(number, file, offset, sum(r.nbytes for r in ranges), writer, dict(parts))


def _ranges(file: TensorFile, holders: Holders, size: int) -> Iterator[Range]:
    """The bytes of a file, in order, by who holds them."""
    at = len(file.header)
    yield Range(file.header_key, 0, at, 0, range(size))
    for tensor in file.tensors:
        reached = 0
        for first, end, ranks in _uncut(tensor, holders) if tensor.uncut else holders(tensor.key[1]):
            start, stop = first * ITEM_BYTES, end * ITEM_BYTES
            if start != reached or stop < start or not ranks:
                raise ValueError(f"{tensor.key[1]}: element {reached // ITEM_BYTES} is held by nobody, or in two ranges")
            yield Range(tensor.key, start, stop, at + start, ranks)
            reached = stop
        if reached != tensor.nbytes:
            raise ValueError(f"{tensor.key[1]}: {reached // ITEM_BYTES} of {tensor.nbytes // ITEM_BYTES} elements are held")
        at += tensor.nbytes


def _uncut(tensor: StoredTensor, holders: Holders) -> list[tuple[int, int, Sequence[int]]]:
    found = holders(tensor.key[1])
    if len(found) != 1:
        raise ValueError(f"{tensor.key[1]} is held in parts, and its {tensor.key[0]} has another shape")
    return [(0, prod(tensor.shape), found[0][2])]


def _cut(ranges: Iterator[Range], block_bytes: int) -> Iterator[Range]:
    """The same, cut at the borders of blocks; empty ones left out."""
    for r in ranges:
        start = r.start
        while start < r.stop:
            at = r.at + start - r.start
            stop = min(r.stop, start + block_bytes - at % block_bytes)
            yield Range(r.key, start, stop, at, r.ranks)
            start = stop
