"""One rank's share of the corpus, encoded: the tokens go to a file, what must be known of each sequence stays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mpilm.data.pieces import Piece, Reading, pieces_of
from mpilm.data.sources import Item
from mpilm.data.stats import count_scripts, no_scripts
from mpilm.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do, of this rank's share."""


@dataclass(frozen=True)
class Share:
    """What one rank encoded; S sequences in corpus order, of which documents are contiguous runs."""

    lengths: NDArray[np.int64]
    """(S,) tokens."""
    last: NDArray[np.bool_]
    """(S,) whether a document ends with the sequence."""
    source_bytes: NDArray[np.int64]
    """(S,) bytes of its text in UTF-8."""
    keys: NDArray[np.int64]
    """(S, 2) hash of the text and its place in the document; the sum over a document, modulo 2^64, tells documents apart."""
    scripts: NDArray[np.int64]
    """Bytes of each script; zeros unless asked for."""


def encode_share(
    items: Sequence[Item],
    reading: Reading,
    tokenizer: Tokenizer,
    out: IO[bytes],
    dtype: np.dtype,
    eos: bool = True,
    scripts: bool = False,
    progress: Progress = lambda done, total: None,
) -> Share:
    """Write the tokens of all items to `out`. Holds a batch of text at a time; raises FileError or DataError."""
    rows: list[tuple[int, bool, int]] = []
    keys: list[bytes] = []
    seen = no_scripts()
    for batch in _batches(items, reading, progress):
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            ends = piece.last and eos
            out.write(ids.astype(dtype).tobytes())
            if ends:
                out.write(np.array([tokenizer.eos], dtype=dtype).tobytes())
            data = piece.text.encode()
            rows.append((len(ids) + ends, piece.last, len(data)))
            keys.append(_key(piece.number, data))
        if scripts:
            seen += count_scripts("".join(piece.text for piece in batch))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    hashes = np.frombuffer(b"".join(keys), dtype="<i8").reshape(-1, 2)
    return Share(table[:, 0], table[:, 1].astype(bool), table[:, 2], hashes, seen)


def _key(number: int, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, salt=number.to_bytes(16, "little")).digest()


def _batches(items: Sequence[Item], reading: Reading, progress: Progress) -> Iterator[list[Piece]]:
    """Pieces in batches that are worth encoding together."""
    batch, characters = [], 0
    for piece in _with_progress(items, reading, progress):
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_CHARACTERS // 64:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_progress(items: Sequence[Item], reading: Reading, progress: Progress) -> Iterable[Piece]:
    total, done = sum(item.size for item in items), 0
    for item in items:
        for piece in pieces_of(item, reading):
            yield piece
            progress(done, total)
        done += item.size
    progress(total, total)
