"""Token files: Megatron-LM's indexed format (PREFIX.bin and PREFIX.idx), and nanoGPT's bare uint16 .bin.

.bin   the tokens of all sequences, one after the other, little-endian
.idx   b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequences u64, documents + 1 u64,
       length of each sequence int32, byte at which it starts in the .bin int64,
       sequence at which each document starts int64, closed by the number of sequences
.json  what mpilm.prepare knows of its tokens besides; files of other programs have none
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpilm.data.files import file_errors, read_json
from mpilm.errors import DataError
from mpilm.formatting import format_value

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


class TokenCounts(NamedTuple):
    """Amounts in a part of a corpus."""

    sequences: int
    tokens: int
    documents: int
    source_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenMetadata:
    """The contents of PREFIX.json."""

    format: int = 1
    documents: int
    sequences: int
    tokens: int
    dtype: str
    tokens_digest: str
    tokenizer: str  # the setting that it was made with
    tokenizer_digest: str
    eos: int
    eos_written: bool  # whether documents end with the eos token
    source_bytes: int  # of text in UTF-8
    dropped_duplicates: int


def read_metadata(prefix: Path) -> TokenMetadata | None:
    """Read PREFIX.json; None if there is none, as with Megatron's own files. Raises DataError."""
    path = with_ending(prefix, ".json")
    if not path.exists():
        return None
    values, known = read_json(path), {item.name: item.type for item in fields(TokenMetadata)}
    problem = f"format {format_value(values.get('format'))}, and only {TokenMetadata.format} is known"
    if values.get("format") == TokenMetadata.format:
        wrong = [name for name in {**known, **values} if type(values.get(name)) is not known.get(name)]
        problem = f"{', '.join(wrong)[:200]} missing, unknown or of another type" if wrong else ""
    if problem:
        raise DataError(f"{path} is not what mpilm.prepare writes beside its tokens: {problem}")
    return TokenMetadata(**values)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype that Megatron's readers know and that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def find_prefix(path: str) -> Path | None:
    """Return the prefix of token files given as PREFIX, PREFIX.bin or PREFIX.idx; None if the path is something else."""
    prefix = Path(path).expanduser()
    if prefix.suffix in (".bin", ".idx") and not prefix.is_dir():
        return prefix.with_suffix("")
    if not prefix.name or prefix.exists():  # "", "." and "/" have no name
        return None
    return prefix if all(with_ending(prefix, ending).is_file() for ending in (".bin", ".idx")) else None


def with_ending(prefix: Path, ending: str) -> Path:
    """Return PREFIX + ending; unlike `with_suffix`, dots in the prefix stay."""
    return prefix.parent / (prefix.name + ending)


def index_offsets(sequences: int, documents: int) -> tuple[int, int, int, int]:
    """Return the bytes at which lengths, pointers and document marks begin in an .idx, and at which it ends."""
    pointers = HEADER.size + 4 * sequences
    marks = pointers + 8 * sequences
    return HEADER.size, pointers, marks, marks + 8 * (documents + 1)


def write_index(path: Path, dtype: np.dtype, lengths: NDArray, ends: NDArray, before: TokenCounts, total: TokenCounts) -> None:
    """Write the sequences of one rank into an .idx, behind those of `before`; document `ends` count all sequences."""
    starts = (before.tokens + np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    numbers = (before.sequences, before.sequences, before.documents + 1)  # the first document mark stays zero
    code = next(code for code, name in DTYPES.items() if name == dtype.name)
    with open_shared(path) as file:
        file.write(b"" if any(before) else HEADER.pack(MAGIC, VERSION, code, total.sequences, total.documents + 1))
        for origin, number, data in zip(index_offsets(*total[::2]), numbers, (lengths.astype("<i4"), starts, ends)):
            file.seek(origin + number * data.itemsize)
            file.write(data.tobytes())


@contextmanager
def open_shared(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that several ranks write parts of, and wait at the end until the disk has it; raises FileError."""
    # If it could be read, a network file system might write back whole pages, with zeros where another node has just written.
    with file_errors(path, "written"), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def open_tokens(prefix: Path, verify: bool = True) -> tuple[NDArray, int]:
    """Map PREFIX.bin by the PREFIX.idx beside it, else as bare uint16; return tokens and the number of documents. With `verify`
    the whole .idx is checked, otherwise its header and sizes. Raises FileError, or DataError with file and byte offset."""
    index, data = with_ending(prefix, ".idx"), with_ending(prefix, ".bin")
    size = file_errors(data)(data.stat)().st_size
    dtype, documents = np.dtype("<u2"), 1
    if index.exists():
        dtype, lengths, pointers, marks = _map_index(index)
        documents = len(marks) - 1
        if verify:
            _check_index(index, dtype, lengths, pointers, marks)
        tokens = int(pointers[-1]) // dtype.itemsize + int(lengths[-1]) if len(lengths) else 0
        if size != tokens * dtype.itemsize:
            expected = f"{tokens * dtype.itemsize} ({tokens} tokens of {dtype.name})"
            problem = f"has {size} bytes, but {index} describes {expected}; one of the two is cut short or belongs to another"
            raise DataError(f"{data}: {problem}")
    if size % dtype.itemsize:
        raise DataError(f"{data}: byte {size}: ends in the middle of a token of {dtype.itemsize} bytes")
    if not size:
        raise DataError(f"{data}: byte 0: holds no tokens")
    with file_errors(data):
        return np.memmap(data, dtype=dtype, mode="r"), documents


def document_starts(data: Path) -> NDArray[np.int64]:
    """Return the token at which each document of a checked .bin begins, and the end of the last; (documents + 1,)."""
    index = with_ending(data.with_suffix(""), ".idx")
    if not index.exists():
        return np.array([0, data.stat().st_size // 2])
    _, lengths, _, marks = _map_index(index)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[marks]


def _map_index(index: Path) -> tuple[np.dtype, NDArray, NDArray, NDArray]:
    """Return token dtype, lengths (S,), byte pointers (S,) and document marks (D + 1,); raises FileError or DataError."""
    with file_errors(index), open(index, "rb") as file:
        head, size = file.read(HEADER.size), file.seek(0, 2)
    _, version, code, sequences, documents = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    lengths, pointers, marks, end = index_offsets(sequences, documents - 1)
    taken = f"{sequences} sequences and {documents} document marks take {end}; it is cut short or damaged"
    for is_right, byte, problem in (
        (head.startswith(MAGIC), 0, f"is {head[:9]!r}, not {MAGIC!r}: this is no index of Megatron-LM's kind"),
        (len(head) == HEADER.size, len(head), "the file ends inside its header"),
        (version == VERSION, 9, f"version {version}, and only {VERSION} is known"),
        ("int" in DTYPES.get(code, ""), 17, f"dtype code {code} stands for no kind of token"),
        (documents > 0 and end == size, min(size, end), f"has {size} bytes, but {taken}"),
    ):
        if not is_right:
            raise DataError(f"{index}: byte {byte}: {problem}")
    with file_errors(index):
        raw, dtype = np.memmap(index, dtype=np.uint8, mode="r"), np.dtype(DTYPES[code]).newbyteorder("<")
    return dtype, raw[lengths:pointers].view("<i4"), raw[pointers:marks].view("<i8"), raw[marks:].view("<i8")


def _check_index(index: Path, dtype: np.dtype, lengths: NDArray, pointers: NDArray, marks: NDArray) -> None:
    """Raise DataError unless sequences follow each other without gaps, and documents begin where sequences do."""
    lengths_at, pointers_at, marks_at, _ = index_offsets(len(lengths), len(marks) - 1)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    if (wrong := (lengths < 0) | (starts != pointers)).any():
        row = int(np.argmax(wrong))
        byte = lengths_at + 4 * row if lengths[row] < 0 else pointers_at + 8 * row
        problem = f"has length {lengths[row]} and pointer {pointers[row]}; the ones before it end at {starts[row]}"
        raise DataError(f"{index}: byte {byte}: sequence {row} {problem}")
    wrong = np.diff(marks, prepend=0) < 0
    wrong[0], wrong[-1] = marks[0] != 0, wrong[-1] or marks[-1] != len(lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        problem = f"document mark {row} is {marks[row]}; marks must rise from 0 to {len(lengths)}, the number of sequences"
        raise DataError(f"{index}: byte {marks_at + 8 * row}: {problem}")
