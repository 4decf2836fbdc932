"""Token files: Megatron-LM's indexed format (PREFIX.bin and PREFIX.idx), and nanoGPT's bare uint16 .bin.

.bin   the tokens of all sequences, one after the other, little-endian
.idx   b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequences u64, documents + 1 u64,
       length of each sequence int32, byte at which it starts in the .bin int64,
       sequence at which each document starts int64, closed by the number of sequences
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mpilm.data.files import touching
from mpilm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()}
CHECKED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Layout:
    """Where each part of an .idx lies, from its header alone."""

    dtype: np.dtype
    sequences: int
    documents: int

    @property
    def pointers_at(self) -> int:
        return HEADER.size + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        return self.pointers_at + 8 * self.sequences

    @property
    def size_bytes(self) -> int:
        return self.documents_at + 8 * (self.documents + 1)

    def header(self) -> bytes:
        return HEADER.pack(MAGIC, VERSION, CODES[self.dtype.name], self.sequences, self.documents + 1)


@dataclass(frozen=True)
class TokenFile:
    """Tokens on disk, mapped into memory."""

    tokens: NDArray
    """(tokens,) of the file's own dtype."""
    documents: int
    path: Path
    """The .bin."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron's readers know and that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def prefix_of(path: str) -> Path | None:
    """The prefix of prepared token files, given as PREFIX, PREFIX.bin or PREFIX.idx; None when the path is something else."""
    given = Path(path).expanduser()
    if given.suffix in (".bin", ".idx") and not given.is_dir():
        return given.with_suffix("")
    if not given.name:
        return None  # ".", "/" or "..": a folder
    beside = (with_ending(given, ".bin"), with_ending(given, ".idx"))
    return given if path and not given.exists() and all(file.is_file() for file in beside) else None


def with_ending(prefix: Path, ending: str) -> Path:
    return prefix.parent / (prefix.name + ending)


def write_index(path: Path, lengths: NDArray, document_ends: NDArray, dtype: np.dtype) -> None:
    """Write a whole .idx; `document_ends` counts the sequences up to the end of each document. Raises FileError."""
    layout = Layout(np.dtype(dtype), len(lengths), len(document_ends))
    with touching(path, "write"), open(path, "wb") as file:
        file.write(layout.header())
        file.truncate(layout.size_bytes)
    place_index(path, layout, lengths, document_ends, 0, 0, 0)


def place_index(path: Path, layout: Layout, lengths: NDArray, ends: NDArray, sequence: int, token: int, document: int) -> None:
    """Write the rows of some sequences and documents into an .idx of full size.

    `sequence`, `token` and `document` are the numbers of the first of each. Raises FileError.
    """
    starts = token + np.cumsum(lengths, dtype=np.int64) - lengths
    with touching(path, "write"), open_shared(path) as file:
        _write_at(file, HEADER.size + 4 * sequence, np.asarray(lengths, dtype="<i4"))
        _write_at(file, layout.pointers_at + 8 * sequence, (starts * layout.dtype.itemsize).astype("<i8"))
        _write_at(file, layout.documents_at + 8 * (document + 1), np.asarray(ends, dtype="<i8"))


def open_shared(path: Path) -> IO[bytes]:
    """An existing file that several ranks write parts of. Write-only: where a network file system may read it could write
    back whole pages, with zeros in the place of what another node has just written."""
    return os.fdopen(os.open(path, os.O_WRONLY), "wb")


def _write_at(file: IO[bytes], offset: int, values: NDArray) -> None:
    file.seek(offset)
    file.write(values.tobytes())


def open_tokens(prefix: Path, verify: bool = True) -> TokenFile:
    """Map PREFIX.bin, with the PREFIX.idx beside it or, where there is none, as bare uint16.

    Raises FileError, or DataError with file and byte offset. `verify` reads the whole .idx, otherwise its header and sizes.
    """
    index, data = with_ending(prefix, ".idx"), with_ending(prefix, ".bin")
    with touching(data):
        size = data.stat().st_size
    if not index.exists():
        return TokenFile(_map(data, np.dtype("<u2"), size), 1, data)
    layout = read_header(index)
    rows = _map_index(index, layout)
    if verify:
        _check_rows(index, layout, *rows)
    tokens = _expected_tokens(layout, *rows[:2])
    if size != tokens * layout.dtype.itemsize:
        raise DataError(
            f"{data}: has {size} bytes, but {index} speaks of {tokens * layout.dtype.itemsize} "
            f"({tokens} tokens of {layout.dtype.name}); one of the two is cut short or belongs to another"
        )
    return TokenFile(_map(data, layout.dtype, size), layout.documents, data)


def document_starts(data: Path) -> NDArray[np.int64]:
    """Where each document begins in a checked .bin, and where the last one ends, in tokens; (documents + 1,)."""
    index = with_ending(data.with_suffix(""), ".idx")
    if not index.exists():
        return np.array([0, data.stat().st_size // 2])
    layout = read_header(index)
    lengths, _, marks = _map_index(index, layout)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return ends[marks]


def read_header(index: Path) -> Layout:
    """Check the header of an .idx and its size; raises FileError or DataError."""
    with touching(index), open(index, "rb") as file:
        head = file.read(HEADER.size)
        size = file.seek(0, 2)
    if not head.startswith(MAGIC):
        raise DataError(f"{index}: byte 0: is {head[:9]!r}, not {MAGIC!r}: no index of Megatron-LM's kind")
    if len(head) < HEADER.size:
        raise DataError(f"{index}: byte {len(head)}: the file ends inside its header")
    _, version, code, sequences, documents = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{index}: byte 9: version {version}, and only {VERSION} is known")
    if code not in DTYPES or "float" in DTYPES[code]:
        raise DataError(f"{index}: byte 17: dtype code {code} stands for no kind of token")
    layout = Layout(np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents - 1)
    if documents < 1 or layout.size_bytes != size:
        raise DataError(
            f"{index}: byte {min(size, layout.size_bytes)}: has {size} bytes, but {sequences} sequences and {documents} "
            f"document marks take {layout.size_bytes}; it is cut short or damaged"
        )
    return layout


def _map(path: Path, dtype: np.dtype, size: int) -> NDArray:
    if size % dtype.itemsize:
        raise DataError(f"{path}: byte {size}: ends in the middle of a token of {dtype.itemsize} bytes")
    if not size:
        raise DataError(f"{path}: byte 0: holds no tokens")
    with touching(path):
        return np.memmap(path, dtype=dtype, mode="r")


Rows = tuple[NDArray, NDArray, NDArray]


def _map_index(index: Path, layout: Layout) -> Rows:
    """Lengths (S,), byte pointers (S,) and document marks (D + 1,)."""
    with touching(index):
        raw = np.memmap(index, dtype=np.uint8, mode="r")
    lengths = raw[HEADER.size : layout.pointers_at].view("<i4")
    pointers = raw[layout.pointers_at : layout.documents_at].view("<i8")
    return lengths, pointers, raw[layout.documents_at :].view("<i8")


def _expected_tokens(layout: Layout, lengths: NDArray, pointers: NDArray) -> int:
    if not layout.sequences:
        return 0
    return int(pointers[-1]) // layout.dtype.itemsize + int(lengths[-1])


def _check_rows(index: Path, layout: Layout, lengths: NDArray, pointers: NDArray, marks: NDArray) -> None:
    """Sequences must follow each other without gaps, and documents must begin where sequences do."""
    expected = 0
    for first in range(0, layout.sequences, CHECKED_AT_ONCE):
        part = lengths[first : first + CHECKED_AT_ONCE].astype(np.int64)
        if (part < 0).any():
            row = first + int(np.argmax(part < 0))
            raise DataError(f"{index}: byte {HEADER.size + 4 * row}: sequence {row} has length {lengths[row]}")
        starts = expected + (np.cumsum(part) - part) * layout.dtype.itemsize
        wrong = starts != pointers[first : first + CHECKED_AT_ONCE]
        if wrong.any():
            row = first + int(np.argmax(wrong))
            at = layout.pointers_at + 8 * row
            raise DataError(
                f"{index}: byte {at}: sequence {row} is said to start at byte {pointers[row]} of the .bin, "
                f"but the ones before it end at {starts[row - first]}"
            )
        expected += int(part.sum()) * layout.dtype.itemsize
    steps = np.diff(marks)
    if marks[0] != 0 or marks[-1] != layout.sequences or (steps < 0).any():
        row = int(np.argmax(steps < 0)) + 1 if (steps < 0).any() else 0 if marks[0] else len(marks) - 1
        raise DataError(
            f"{index}: byte {layout.documents_at + 8 * row}: document mark {row} is {marks[row]}; marks must rise from 0 "
            f"to {layout.sequences}, the number of sequences"
        )


def check_vocabulary(tokens: NDArray, vocab_size: int, path: Path, first: int) -> None:
    """Raise DataError naming file and token if an id is not of the vocabulary; tokens (n,) begin at token `first`."""
    if tokens.size and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise DataError(
            f"{path}: token {first + at} is {int(tokens[at])}, but the tokenizer's ids end at {vocab_size - 1}; "
            "these tokens were made with another tokenizer"
        )
