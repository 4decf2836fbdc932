"""From pieces on many ranks to whole blocks on their writers."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor

from mpilm.checkpoint.plan import ITEM_BYTES, Block, Key, Range, TensorFile
from mpilm.comm.base import Comm
from mpilm.parallel.flat_layout import ParamSlice

TAG = 5  # messages between two ranks go in the order of blocks, so one tag is enough
IN_FLIGHT = 2  # blocks that a rank sends or receives at a time

Finish = Callable[[], Tensor | None]


class Held:
    """What this rank holds, as bytes: the pieces of each kind of tensor, and the headers of all files."""

    def __init__(self, kinds: Mapping[str, Mapping[ParamSlice, Tensor]], files: Iterable[TensorFile]):
        self._parts: dict[Key, list[tuple[int, int, Tensor]]] = defaultdict(list)
        for kind, pieces in kinds.items():
            for piece, tensor in pieces.items():
                if tensor.dtype != torch.float32 or tensor.numel() != piece.numel:
                    raise ValueError(f"{kind} {piece} is held in a tensor of {tensor.numel()} x {tensor.dtype}")
                data = tensor.detach().view(-1).view(torch.uint8)
                self._parts[kind, piece.name].append((piece.start * ITEM_BYTES, piece.stop * ITEM_BYTES, data))
        for file in files:
            header = torch.frombuffer(bytearray(file.header), dtype=torch.uint8)
            self._parts[file.header_key] = [(0, len(file.header), header)]

    def bytes_of(self, r: Range) -> Tensor:
        """A view, which may lie on a device; raises KeyError for what is not held here."""
        for start, stop, data in self._parts.get(r.key, ()):
            if start <= r.start and r.stop <= stop:
                return data[r.start - start : r.stop - start]
        raise KeyError(f"bytes {r.start} to {r.stop} of {' '.join(r.key)} are not held here, although `holders` says so")


class Buffers:
    """Memory for all blocks that a rank writes of a checkpoint, kept for the next one: memory that is new comes slowly."""

    def __init__(self) -> None:
        self._all: list[Tensor] = []
        self._taken = 0

    def again(self) -> Buffers:
        """All of them are free."""
        self._taken = 0
        return self

    def take(self, nbytes: int) -> Tensor:
        if self._taken == len(self._all):
            self._all.append(fresh(nbytes))
        if self._all[self._taken].numel() < nbytes:
            self._all[self._taken] = fresh(nbytes)
        self._taken += 1
        return self._all[self._taken - 1][:nbytes]


def fresh(nbytes: int) -> Tensor:
    """Memory that begins with a page, as the disk wants it (checkpoint/blocks.py); not shared, which is counted apart."""
    return torch.frombuffer(mmap(-1, max(1, nbytes), flags=MAP_PRIVATE | MAP_ANONYMOUS), dtype=torch.uint8)[:nbytes]


def assemble(
    plan: Iterable[Block], held: Held, comm: Comm, memory: Callable[[int], Tensor] = fresh
) -> Iterator[tuple[Block, Tensor]]:
    """The blocks that this rank writes, in order, as uint8 tensors in host memory. Collective: to be run to its end. `memory`:
    where a block comes from.

    Every rank finishes its oldest block first, so of all blocks under way the first one always has all its parts started:
    nobody waits for ever, and no more than IN_FLIGHT blocks lie in memory.
    """
    under_way: deque[tuple[Block, Finish]] = deque()
    for block in plan:
        if comm.rank == block.writer or comm.rank in block.parts:
            under_way.append((block, _start(block, held, comm, memory)))
        if len(under_way) == IN_FLIGHT:
            yield from _finish(*under_way.popleft())
    while under_way:
        yield from _finish(*under_way.popleft())


def _finish(block: Block, finish: Finish) -> Iterator[tuple[Block, Tensor]]:
    data = finish()
    if data is not None:
        yield block, data


def _start(block: Block, held: Held, comm: Comm, memory: Callable[[int], Tensor]) -> Finish:
    """Send this rank's part of the block, all ranges in one message, or begin to receive the others'."""
    if comm.rank != block.writer:
        packed = torch.cat([held.bytes_of(r) for r in block.parts[comm.rank]]).cpu()
        return comm.isend(packed, block.writer, TAG).wait
    requests = []
    for rank, ranges in block.parts.items():
        if rank != comm.rank:
            packed = torch.empty(sum(r.nbytes for r in ranges), dtype=torch.uint8)
            requests.append((comm.irecv(packed, rank, TAG), ranges, packed))

    def finish() -> Tensor:
        data = memory(block.nbytes)
        _lay(block, data, ((r, held.bytes_of(r)) for r in block.parts.get(comm.rank, ())))
        for request, ranges, packed in requests:
            request.wait()
            _lay(block, data, zip(ranges, packed.split([r.nbytes for r in ranges])))
        return data

    return finish


def _lay(block: Block, data: Tensor, parts: Iterable[tuple[Range, Tensor]]) -> None:
    for r, part in parts:
        at = r.at - block.offset
        data[at : at + r.nbytes].copy_(part)
