"""The text of a work item as a stream of pieces; a document is one piece or several.

A text longer than BLOCK_BYTES is cut by one rule whatever file it comes from: near each multiple of BLOCK_BYTES, where a
line begins. No tokenizer then sees a different text because another number of ranks read it.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from mpilm.data.files import touching
from mpilm.data.sources import BLOCK_BYTES, Item, Source, missing, parquet_file
from mpilm.errors import DataError

WINDOW_BYTES = 2**16  # how far behind a multiple of BLOCK_BYTES a cut may lie
READ_BYTES = 2**18
PARQUET_ROWS = 1024
SPACE = b" \t\r\n\v\f"


@dataclass(frozen=True)
class Reading:
    """How text is taken from files."""

    encoding_errors: str = "stop"
    text_key: str = "text"


@dataclass(frozen=True)
class Piece:
    """Part of a document."""

    text: str
    number: int
    """0 for the beginning of a document."""
    last: bool
    """Whether the document ends here."""


def pieces_of(item: Item, reading: Reading) -> Iterator[Piece]:
    """The text of one item in order; documents without text are passed over.

    Raises FileError, or DataError with file, line and byte offset.
    """
    source = item.source
    with touching(source.path):
        if source.format == "parquet":
            yield from _parquet_pieces(item, reading)
        elif source.format == "jsonl":
            yield from _json_pieces(item, reading)
        elif source.codec:
            yield from _streamed_pieces(source, reading)
        else:
            yield _block(item, reading)


# Text: whole files, cut into blocks.


def cut(window: bytes) -> int:
    """Where a block ends, counted from the multiple of BLOCK_BYTES at which `window` begins.

    At the first line that begins with a visible character; else at the first line; else between two characters. Words and
    runs of white space stay whole, so tokens do too.
    """
    first, at = 0, window.find(b"\n")
    while 0 <= at < len(window) - 1:
        first = first or at + 1
        if window[at + 1] not in SPACE:
            return at + 1
        at = window.find(b"\n", at + 1)
    return first or next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window[:4]))


def _block(item: Item, reading: Reading) -> Piece:
    source, part = item.source, item.part
    with open(source.path, "rb") as file:
        start, stop = _edge(file, source, part), _edge(file, source, part + 1)
        file.seek(start)
        data = file.read(stop - start)
    text = _decode(data, reading, source.path, lambda at: (_line_of(source.path, start + at), start + at))
    return Piece(text, part, part == source.parts - 1)


def _edge(file: IO[bytes], source: Source, part: int) -> int:
    """The byte at which a block begins."""
    if part in (0, source.parts):
        return source.size if part else 0
    file.seek(part * BLOCK_BYTES)
    return part * BLOCK_BYTES + cut(file.read(min(WINDOW_BYTES, source.size - part * BLOCK_BYTES)))


def blocks(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The blocks of a stream, and whether each is the last: those that `_block` reads from a file of the same bytes."""
    held, base, edge = b"", 0, BLOCK_BYTES
    while True:
        held += _read_fully(file, edge + WINDOW_BYTES - base - len(held))
        if base + len(held) <= edge:
            yield held, True
            return
        stop = edge - base + cut(held[edge - base : edge - base + WINDOW_BYTES])
        yield held[:stop], False
        held, base, edge = held[stop:], base + stop, edge + BLOCK_BYTES


def _read_fully(file: IO[bytes], count: int) -> bytes:
    parts = []
    while count > 0 and (data := file.read(count)):
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def _streamed_pieces(source: Source, reading: Reading) -> Iterator[Piece]:
    line, offset = 1, 0
    with open_stream(source) as file:
        for number, (data, last) in enumerate(blocks(file)):
            if data or number:
                yield Piece(_decode(data, reading, source.path, _Where(data, line, offset).at), number, last)
            line, offset = line + data.count(b"\n"), offset + len(data)


@dataclass(frozen=True)
class _Where:
    """Line and byte of a place in a block."""

    data: bytes
    line: int
    offset: int

    def at(self, byte: int) -> tuple[int, int]:
        return self.line + self.data.count(b"\n", 0, byte), self.offset + byte


def _line_of(path: str, offset: int) -> int:
    """The line, counted from 1, of a byte of a file; reads the file up to there, which only errors do."""
    line = 1
    with open(path, "rb") as file:
        while offset > 0 and (data := file.read(min(READ_BYTES, offset))):
            line, offset = line + data.count(b"\n"), offset - len(data)
    return line


def _decode(data: bytes, reading: Reading, path: str, where: Callable[[int], tuple[int, int]]) -> str:
    try:
        return data.decode("utf-8", "strict" if reading.encoding_errors == "stop" else "replace")
    except UnicodeDecodeError as error:
        line, offset = where(error.start)
        raise DataError(
            f"{path}: line {line}, byte {offset}: is not UTF-8 (0x{data[error.start]:02x}: {error.reason}); convert the file, "
            "or put U+FFFD in such places with --data.encoding-errors replace"
        ) from None


def _document(text: str, reading: Reading, where: object) -> Iterator[Piece]:
    """The pieces of a document that is in memory; `where` becomes text only for a message."""
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        if reading.encoding_errors == "stop":
            raise DataError(
                f"{where}: the text holds half a surrogate pair, which is no character; "
                "put U+FFFD in such places with --data.encoding-errors replace"
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = text.encode()
    if not data:
        return
    if len(data) <= BLOCK_BYTES:
        yield Piece(text, 0, True)
        return
    for number, (block, last) in enumerate(blocks(io.BytesIO(data))):
        yield Piece(block.decode(), number, last)


# JSON lines.


def _json_pieces(item: Item, reading: Reading) -> Iterator[Piece]:
    source = item.source
    with open_stream(source) as file:
        start = 0 if source.codec else _line_start(file, item.part, source)
        stop = None if source.codec else _line_start(file, item.part + 1, source)
        if not source.codec:
            file.seek(start)
        count, offset = 0, start
        while (stop is None or offset < stop) and (line := file.readline()):
            place = _JsonLine(source.path, start, count, offset)
            if line.strip():
                yield from _document(_text_of(line, reading, place), reading, place)
            count, offset = count + 1, offset + len(line)


@dataclass(frozen=True)
class _JsonLine:
    """A line, counted from the start of its item: only a message needs its number in the file."""

    path: str
    start: int
    count: int
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: line {_line_of(self.path, self.start) + self.count}"


def _line_start(file: IO[bytes], part: int, source: Source) -> int:
    """The first start of a line at or after a multiple of BLOCK_BYTES."""
    if part in (0, source.parts):
        return source.size if part else 0
    file.seek(part * BLOCK_BYTES - 1)
    return min(source.size, part * BLOCK_BYTES - 1 + len(file.readline()))


def _text_of(line: bytes, reading: Reading, place: _JsonLine) -> str:
    text = _decode(line, reading, place.path, lambda at: (_line_of(place.path, place.start) + place.count, place.offset + at))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: is not a JSON object, but {type(value).__name__}")
    found = value.get(reading.text_key)
    if not isinstance(found, str):
        has = f"{type(found).__name__} and no text" if reading.text_key in value else "nothing"
        keys = ", ".join(sorted(map(str, value)))[:200]
        raise DataError(
            f'{place}: has {has} under "{reading.text_key}"; its keys are: {keys or "none"}; '
            "name the one of the text with --data.text-key"
        )
    return found


# Parquet.


def _parquet_pieces(item: Item, reading: Reading) -> Iterator[Piece]:
    import pyarrow

    path, key = item.source.path, reading.text_key
    file = parquet_file(path)
    names = file.schema_arrow.names
    if key not in names:
        raise DataError(f'{path}: has no column "{key}", but {", ".join(names)}; name the right one with --data.text-key')
    row = 0
    for batch in file.iter_batches(PARQUET_ROWS, row_groups=[item.part], columns=[key]):
        column = batch.column(0)
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise DataError(f'{path}: column "{key}" holds {column.type}, not text; name the right one with --data.text-key')
        for value in column.cast(pyarrow.large_binary()).to_pylist():
            where, data = f"{path}: row group {item.part}, row {row}", value or b""
            yield from _document(_decode(data, reading, where, _Where(data, 1, 0).at), reading, where)
            row += 1


# Compressed streams.


def open_stream(source: Source) -> IO[bytes]:
    """The bytes of a source, uncompressed, to be read from front to end."""
    if source.codec == "":
        return open(source.path, "rb")
    decoders = {"gzip": lambda: zlib.decompressobj(31), "zstd": lambda: _zstd_decoder(source.path)}
    return io.BufferedReader(_Expanded(source.path, decoders[source.codec]), READ_BYTES)


def _zstd_decoder(path: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise missing("zstandard", path) from None
    return zstandard.ZstdDecompressor().decompressobj()


class _Expanded(io.RawIOBase):
    """A file of compressed frames, expanded. Unlike the libraries' own readers it never takes a cut file for a whole one."""

    def __init__(self, path: str, new_decoder: Callable):
        self._path, self._new_decoder = path, new_decoder
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._decoder, self._ready, self._begun = new_decoder(), b"", False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._expand():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _expand(self) -> bool:
        """Expand some more; False at the end of the file."""
        data = (self._decoder.unused_data if self._decoder.eof else b"") or self._file.read(READ_BYTES)
        if self._decoder.eof and data:
            self._decoder, self._begun = self._new_decoder(), False
        if not data:
            if self._begun and not self._decoder.eof:
                raise DataError(f"{self._path}: byte {self._file.tell()}: the compressed text ends too early; the file is cut")
            return False
        self._begun = True
        try:
            self._ready = self._decoder.decompress(data)
        except Exception as error:  # zlib.error or zstandard.ZstdError, which may not be installed
            raise DataError(f"{self._path}: near byte {self._file.tell()}: cannot be uncompressed: {error}") from None
        return True
