"""Part files into their place in PREFIX.bin and PREFIX.idx, under temporary names until all is there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks, run_on_root
from mpilm.data.encode import Share
from mpilm.data.files import touching
from mpilm.data.indexed import Layout, open_shared, place_index, with_ending
from mpilm.errors import FileError

COPY_BYTES = 16 * 2**20
ENDINGS = (".tokenizer.json", ".json", ".bin", ".idx")  # in the order in which they appear: the .idx says that all is there


@dataclass(frozen=True)
class Temporaries:
    """Names beside the output that no other job uses."""

    prefix: Path
    token: str
    rank: int

    @property
    def part(self) -> Path:
        return with_ending(self.prefix, f".{self.token}.part-{self.rank:05d}")

    def final(self, ending: str) -> Path:
        """What will be renamed to PREFIX + ending."""
        return with_ending(self.prefix, f".{self.token}{ending}.tmp")


@contextmanager
def temporaries(prefix: Path, comm: Comm) -> Iterator[Temporaries]:
    """Make sure that all ranks see one folder, and leave nothing temporary behind in it. Collective."""
    temporary = Temporaries(prefix, comm.broadcast_json(secrets.token_hex(4)), comm.rank)
    mine = [temporary.part, *(temporary.final(ending) for ending in ENDINGS if comm.rank == 0)]
    try:
        run_on_root(comm, lambda: _create(temporary.final(".bin")))
        run_on_all_ranks(comm, lambda: _see(temporary.final(".bin")))
        yield temporary
    finally:
        for path in mine:
            path.unlink(missing_ok=True)


def _create(path: Path) -> None:
    with touching(path, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _see(path: Path) -> None:
    with touching(path, "see (rank 0 has just created it; all ranks must share the folder)"):
        path.stat()


def refuse_existing(prefix: Path) -> None:
    for ending in ENDINGS:
        if with_ending(prefix, ending).exists():
            raise FileError(f"{with_ending(prefix, ending)}: exists and is not overwritten; remove it or choose another name")


@dataclass(frozen=True)
class Counts:
    """How much there is, of one rank or of several."""

    sequences: int
    tokens: int
    documents: int
    source_bytes: int


def count(share: Share, keep: NDArray[np.bool_], comm: Comm) -> tuple[Counts, Counts]:
    """What the ranks before this one keep, and what all ranks keep. Collective."""
    ends = share.last & keep
    mine = [int(keep.sum()), int(share.lengths[keep].sum()), int(ends.sum()), int(share.source_bytes[keep].sum())]
    every = np.array(comm.all_gather_json(mine), dtype=np.int64)
    return Counts(*every[: comm.rank].sum(axis=0).tolist()), Counts(*every.sum(axis=0).tolist())


def place(
    temporary: Temporaries, share: Share, keep: NDArray[np.bool_], dtype: np.dtype, before: Counts, total: Counts, comm: Comm
) -> None:
    """Each rank copies what it keeps to where it belongs in the .bin and the .idx. Collective."""
    layout = Layout(dtype, total.sequences, total.documents)
    data, index = temporary.final(".bin"), temporary.final(".idx")

    def lay_out() -> None:
        for path, size in ((data, total.tokens * dtype.itemsize), (index, layout.size_bytes)):
            with touching(path, "write"), open(path, "wb") as file:
                file.write(layout.header() if path == index else b"")
                file.truncate(size)  # the rest reads as zeros, of which the first document mark is one

    def fill() -> None:
        _copy(temporary.part, data, _runs(share.lengths * dtype.itemsize, keep), before.tokens * dtype.itemsize)
        ends = before.sequences + 1 + np.flatnonzero((share.last & keep)[keep])
        place_index(index, layout, share.lengths[keep], ends, before.sequences, before.tokens, before.documents)
        for path in (data, index):
            with touching(path, "write"), open_shared(path) as file:
                os.fsync(file.fileno())
        temporary.part.unlink()

    run_on_root(comm, lay_out)
    run_on_all_ranks(comm, fill)


def _runs(sizes: NDArray[np.int64], keep: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) in bytes of the runs of sequences that are kept."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    changes = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
    return [(int(edges[a]), int(edges[b])) for a, b in changes.reshape(-1, 2)]


def _copy(source: Path, target: Path, runs: Iterable[tuple[int, int]], offset: int) -> None:
    """Copy the runs of one file, one after the other, into another from `offset` on."""
    with touching(target, "write"), open(source, "rb") as part, open_shared(target) as out:
        out.seek(offset)
        for start, stop in runs:
            part.seek(start)
            while start < stop:
                data = part.read(min(COPY_BYTES, stop - start))
                if not data:
                    raise FileError(f"{source}: ends at byte {start} instead of {stop}; is the disk full?")
                out.write(data)
                start += len(data)


def give_names(temporary: Temporaries) -> None:
    """Give the files their final names, the .idx last; raises FileError where another job was faster."""
    refuse_existing(temporary.prefix)
    for ending in ENDINGS:
        with touching(with_ending(temporary.prefix, ending), "write"):
            os.rename(temporary.final(ending), with_ending(temporary.prefix, ending))
