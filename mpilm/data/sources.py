"""From a path to text: its input files in corpus order, work items, and the chunks of text in each.

A document is one chunk or several: a text longer than BLOCK_BYTES is cut near each multiple of it, where a line begins,
whatever file it comes from. So neither order nor chunks, each of which is encoded at once, depend on the number of ranks.
"""

import gzip
import io
import os
import re
import socket
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from mpilm.config.schema import DataConfig
from mpilm.data.files import file_errors, hex_digest, parse_json
from mpilm.data.token_files import find_prefix
from mpilm.errors import ConfigError, DataError, FileError, UserError
from mpilm.formatting import count_noun, name_some

BLOCK_BYTES = 2**20
WINDOW_BYTES = 2**16  # how far behind a multiple of BLOCK_BYTES a cut may lie
READ_BYTES = 2**18
PARQUET_ROWS = 16  # at once: a page of a few kilobytes may hold the same long text many times
BATCH_CHARACTERS, BATCH_CHUNKS = 2**20, 2**14  # that are worth encoding together
MAX_EXPANSION, FREE_EXPANSION_BYTES = 200, 2**26  # times the compressed bytes, beside these: small files may expand at will
TRAINING_BYTES = 16 * 2**20  # of text that a BPE is trained on; its time and memory grow with it

PROSE = "txt text md markdown rst tex html htm xml csv tsv"
CODE = "py pyi c h cc cpp hpp cu f f90 rs go java js ts jl r sh toml yaml yml sql lua rb pl scala hs cs"
FORMATS = {**dict.fromkeys(f"{PROSE} {CODE}".split(), "text"), "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet"}
CODECS = {"gz": "gzip", "zst": "zstd"}
EXCLUDED_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
REPLACE = "put U+FFFD in such places with --data.encoding-errors replace"


class TextSource(NamedTuple):
    """One input file."""

    path: str
    format: str  # text, jsonl or parquet
    codec: str  # gzip, zstd or empty
    size: int  # bytes on disk when the file was listed; nothing beyond is read
    parts: int  # work items: blocks of bytes, or row groups


class WorkItem(NamedTuple):
    """The piece of a source that a rank reads at a time."""

    source: TextSource
    part: int  # number of the block or row group

    @property
    def size(self) -> int:
        """About how many bytes of the file it covers."""
        return max(1, self.source.size // self.source.parts)


class DocumentChunk(NamedTuple):
    text: str
    number: int  # counted from 0 at the beginning of the document
    is_last: bool  # whether the document ends here


class _Place(NamedTuple):
    """The place of a text, for messages. Only they need the number of a line, for which the file is read from its beginning."""

    source: TextSource
    offset: int = 0  # byte of the uncompressed file, or of the value in a row
    row: str = ""  # row group and row of a Parquet file

    def __str__(self) -> str:
        if self.row:
            return f"{self.source.path}: {self.row}"
        line, left = 1, self.offset
        with open_source(self.source) as file:
            while left > 0 and (data := file.read(min(READ_BYTES, left))):
                line, left = line + data.count(b"\n"), left - len(data)
        return f"{self.source.path}: line {line}"


def find_sources(path: str) -> list[TextSource]:
    """Return the input files of a path: a file, those below a folder sorted by relative name (not hidden, empty or unknown by
    suffix) or, for "", the embedded corpus: Python's standard library without tests, in an order as good as random, so that
    its held-out end is like the rest. Raises FileError, ConfigError for token files, or DataError if no file is left."""
    if find_prefix(path):
        raise ConfigError(f"--data.path {path}: these are prepared tokens; give the text they were made from")
    root = Path(path or sysconfig.get_path("stdlib")).expanduser()
    if not root.exists():
        raise FileError(f"--data.path {path} does not exist (on {socket.gethostname()})")
    names = _list_files(root, set() if path else EXCLUDED_DIRS) if root.is_dir() else [""]
    if not path:
        names = sorted((name for name in names if name.endswith(".py")), key=hex_digest)
    sources = [source for name in names if (source := _make_source(root / name, is_named=not name))]
    if not sources:
        known = "files are read whose names end in .txt, .md, .py, .jsonl, .parquet and the like, also with .gz or .zst"
        problem = f"no file in this folder holds text; {known}" if root.is_dir() else "the file is empty"
        raise DataError(f"{root}: {problem}")
    return sources


def _list_files(folder: Path, excluded: set[str]) -> list[str]:
    """Return the sorted relative names of the files below a folder, without hidden ones, hidden folders and excluded ones."""
    names: list[str] = []

    def fail(error: OSError) -> None:
        raise FileError(f"{error.filename}: cannot be listed: {error.strerror}")

    for where, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        names += [(Path(where) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def describe_folder(path: str) -> str:
    """Return which files of a folder are read and which are passed over, by ending; empty for a path of another kind."""
    root, texts = Path(path).expanduser(), list[str]()
    names = [root / name for name in _list_files(root, set())] if path and root.is_dir() else []
    read = {name for name in names if _find_format(name, False)[0] and name.stat().st_size}
    for verb, files in (("read", read), ("passed over", set(names) - read)):
        endings = Counter("".join(name.suffixes[-2:] if _find_format(name, True)[1] else name.suffixes[-1:]) for name in files)
        kinds = [f"{count} {ending or 'without ending'}" for ending, count in endings.most_common()]
        texts += [f"{count_noun(len(files), 'file')} {verb} ({name_some(kinds, 8)})"] if files else []
    return ", ".join(texts)


def _find_format(path: Path, is_named: bool) -> tuple[str, str]:
    """Return format and codec of a file by its ending; no format if it is unknown and the user has not named this file."""
    suffixes = [suffix[1:].lower() for suffix in path.suffixes]
    codec = CODECS.get(suffixes[-1], "") if suffixes else ""
    suffix = "".join((suffixes[:-1] if codec else suffixes)[-1:])
    default = {"json": "jsonl"}.get(suffix, "text") if is_named else ""
    return default if suffix == "parquet" and codec else FORMATS.get(suffix, default), codec


def _make_source(path: Path, is_named: bool) -> TextSource | None:
    """Return the source of a file; None if it is empty, or has no format."""
    form, codec = _find_format(path, is_named)
    if not form:
        return None
    size = file_errors(path)(path.stat)().st_size
    parts = _open_parquet(str(path)).num_row_groups if form == "parquet" else 1 if codec else -(-size // BLOCK_BYTES)
    return TextSource(str(path), form, codec, size, parts) if size and parts else None


def partition_items(sources: Sequence[TextSource], rank: int = 0, ranks: int = 1) -> list[WorkItem]:
    """Return the work items that a rank reads: a run of all, in corpus order; all ranks read about equally many bytes."""
    items = [WorkItem(source, part) for source in sources for part in range(source.parts)]
    total, done, mine = sum(item.size for item in items), 0, []
    for item in items:
        if (2 * done + item.size) * ranks // (2 * total) == rank:  # the rank in whose share the middle of the item lies
            mine.append(item)
        done += item.size
    return mine


def read_chunks(item: WorkItem, settings: DataConfig) -> Iterator[DocumentChunk]:
    """Yield the text of one item, without empty documents; raises FileError, or DataError with file, line and byte."""
    source, part = item
    if source.format == "parquet":
        yield from _read_parquet(item, settings)
    elif source.format == "jsonl":
        for line, place in read_json_lines(item, settings.max_document_mib):
            text = _find_text(parse_json(_decode(line, settings, place), place), settings.text_key, place)
            yield from _chunk_text(text, settings, place)
    else:
        with open_source(source) as file:
            if source.codec:
                yield from _chunk_stream(file, settings, _Place(source))
                return
            start, stop = _block_start(file, source, part), _block_start(file, source, part + 1)
            file.seek(start)
            data = file.read(stop - start)
            yield DocumentChunk(_decode(data, settings, _Place(source, start)), part, is_last=part + 1 == source.parts)


def sample_text(sources: Sequence[TextSource], settings: DataConfig) -> Iterator[str]:
    """Yield a bounded amount of text to train a tokenizer on, evenly spread over the corpus."""
    items = partition_items(sources)
    count = max(1, len(items) * TRAINING_BYTES // max(TRAINING_BYTES, sum(item.size for item in items)))
    for item in (items[len(items) * i // count] for i in range(min(count, len(items)))):
        is_plain = item.source.format != "parquet" and not item.source.codec
        left = 2 * BLOCK_BYTES if is_plain else TRAINING_BYTES // count  # how much the others hold is unknown
        for chunk in read_chunks(item, settings):
            yield chunk.text[:left]
            left -= len(chunk.text)
            if left <= 0:
                break


def read_batches(
    items: Sequence[WorkItem], settings: DataConfig, progress: Callable[[int, int], None]
) -> Iterator[list[DocumentChunk]]:
    """Yield the chunks of all items in batches, calling `progress` with the bytes done and the bytes to do."""
    batch: list[DocumentChunk] = []
    total, done, characters = sum(item.size for item in items), 0, 0
    for item in items:
        for chunk in read_chunks(item, settings):
            batch.append(chunk)
            characters += len(chunk.text)
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_CHUNKS:
                yield batch
                progress(done, total)
                batch, characters = [], 0
        done += item.size
    if batch:
        yield batch
    progress(total, total)


def find_cut(window: bytes) -> int:
    """Return where a block ends in `window`, which begins at a multiple of BLOCK_BYTES: before the first line with a visible
    first character, else the first line, else the first character. So words, white space and thereby tokens stay whole."""
    line = re.search(rb"\n(?=[^ \t\r\n\v\f])", window) or re.search(rb"\n(?=.)", window, re.DOTALL)
    return line.end() if line else next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window[:4]))


def _block_start(file: IO[bytes], source: TextSource, part: int) -> int:
    """Return the byte of an uncompressed text file at which a block begins, or the last one ends."""
    if part in (0, source.parts):
        return source.size if part else 0
    start = file.seek(part * BLOCK_BYTES)
    return start + find_cut(file.read(min(WINDOW_BYTES, source.size - start)))


def _chunk_stream(file: IO[bytes], settings: DataConfig, place: _Place) -> Iterator[DocumentChunk]:
    """Yield the chunks of a stream: the blocks that an uncompressed text file of these bytes has."""
    text, boundary, number, is_last = b"", BLOCK_BYTES, 0, False
    while not is_last:
        text += file.read(boundary + WINDOW_BYTES - len(text))
        is_last = len(text) <= boundary
        cut = len(text) if is_last else boundary + find_cut(text[boundary:])
        if cut or number:
            yield DocumentChunk(_decode(text[:cut], settings, place), number, is_last)
        text, boundary, number = text[cut:], boundary - cut + BLOCK_BYTES, number + 1
        place = place._replace(offset=place.offset + cut)


def _chunk_text(text: str, settings: DataConfig, place: _Place) -> Iterator[DocumentChunk]:
    """Yield the chunks of a document in memory, none if it is empty."""
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        if settings.encoding_errors == "stop":
            raise DataError(f"{place} holds half a surrogate pair, which is no character; {REPLACE}") from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = text.encode()
    if 0 < len(data) <= BLOCK_BYTES:
        yield DocumentChunk(text, 0, is_last=True)
    else:
        yield from _chunk_stream(io.BytesIO(data), settings, place)


def _decode(data: bytes, settings: DataConfig, place: _Place) -> str:
    try:
        return data.decode("utf-8", "strict" if settings.encoding_errors == "stop" else "replace")
    except UnicodeDecodeError as error:
        place = place._replace(offset=place.offset + error.start)
        what = f"is not UTF-8 (0x{data[error.start]:02x}: {error.reason}); convert the file, or {REPLACE}"
        raise DataError(f"{place}, byte {place.offset} {what}") from None


def read_json_lines(item: WorkItem, max_mib: int = DataConfig.max_document_mib) -> Iterator[tuple[bytes, _Place]]:
    """Yield the lines, except blank ones, that begin in this part, with their places; refuse one of more than `max_mib`."""
    source, start = item.source, item.part * BLOCK_BYTES

    def read_line(offset: int) -> bytes:
        line = file.readline((max_mib << 20) + 1)
        check_document(len(line), max_mib, _Place(source, offset))
        return line

    with open_source(source) as file:
        if start:
            start = file.seek(start - 1) + len(read_line(start - 1))
        place, stop = _Place(source, start), sys.maxsize if source.codec else min(source.size, (item.part + 1) * BLOCK_BYTES)
        while place.offset < stop and (line := read_line(place.offset)):
            if line.strip():
                yield line, place
            place = _Place(source, place.offset + len(line))


def check_document(size: int, max_mib: int, place: object) -> None:
    """Raise DataError for a document of more than `max_mib`, with what to do if it is meant."""
    if size > max_mib << 20:
        advice = "if it is meant, raise that, or give the text as a .txt file, which is read in pieces"
        raise DataError(f"{place} is longer than the {max_mib} MiB of --data.max-document-mib; {advice}")


def _find_text(value: dict[str, Any], key: str, place: _Place) -> str:
    if isinstance(text := value.get(key), str):
        return text
    problem = f'holds {type(text).__name__}, not text, in the field "{key}"' if key in value else f'has no field "{key}"'
    keys = ", ".join(sorted(map(str, value)))[:200] or "none"
    raise DataError(f"{place} {problem}; its fields: {keys}. Name the field that holds the text with --data.text-key")


def _read_parquet(item: WorkItem, settings: DataConfig) -> Iterator[DocumentChunk]:
    path, key = item.source.path, settings.text_key
    place = _Place(item.source, row=f"row group {item.part}")
    with _parquet_errors(path, place):
        file = _open_parquet(path)
        if key not in (names := file.schema_arrow.names):
            raise DataError(f'{path} has no column "{key}", but {", ".join(names)}. Name that of the text with --data.text-key')
        if str(kind := file.schema_arrow.field(key).type) not in ("string", "large_string"):
            raise DataError(f'{path}: column "{key}" holds {kind}, not text. Name that of the text with --data.text-key')
        group, expanded, row = file.metadata.row_group(item.part), 0, -1
        _check_expansion(group.total_byte_size, item.source.size, place)
        batches = file.iter_batches(PARQUET_ROWS, row_groups=[item.part], columns=[key])
        values = (value for batch in batches for value in batch.column(0).cast("large_binary").to_pylist())
        for row, value in enumerate(values):
            expanded += len(value or b"")
            place = _Place(item.source, row=f"row group {item.part}, row {row}")
            _check_expansion(expanded, item.source.size, place)
            check_document(len(value or b""), settings.max_document_mib, place)
            yield from _chunk_text(_decode(value or b"", settings, place), settings, place)
        if row + 1 != group.num_rows:
            raise ValueError(f"it has {row + 1} rows, and its footer lists {group.num_rows}")


def _open_parquet(path: str) -> Any:
    with _parquet_errors(path, path):
        return _import_pyarrow(path).parquet.ParquetFile(path, page_checksum_verification=True)


@contextmanager
def _parquet_errors(path: str, place: object) -> Iterator[None]:
    """Turn errors of the disk into a FileError, and those of Arrow, which are OSErrors as well, into a DataError."""
    pyarrow = _import_pyarrow(path)
    with file_errors(path):
        try:
            yield
        except (OSError, pyarrow.ArrowException, ValueError) as error:  # a column's name may not be UTF-8
            if isinstance(error, OSError) and error.errno:
                raise
            raise DataError(f"{place} is not Parquet that can be read, the file is cut or damaged: {error}") from None


def _check_expansion(expanded: int, compressed: int, place: object) -> None:
    """Raise DataError for a stream that expands like no text does, such as a terabyte of zeros."""
    if expanded > FREE_EXPANSION_BYTES + MAX_EXPANSION * compressed:
        advice = "if that is meant, store it without compression"
        raise DataError(f"{place} expands to more than {MAX_EXPANSION} times its size; {advice}")


def _import_pyarrow(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading it needs pyarrow; install it with: pip install 'mpilm[data]'") from None
    return pyarrow


@contextmanager
def open_source(source: TextSource) -> Iterator[IO[bytes]]:
    """Open a source to read its uncompressed bytes; raises FileError, or DataError if compressed bytes are cut or damaged."""
    with file_errors(source.path), open(source.path, "rb") as raw:
        if not source.codec:
            yield raw
            return
        is_zstd = source.codec == "zstd"
        expanded = _import_pyarrow(source.path).CompressedInputStream(raw, "zstd") if is_zstd else gzip.GzipFile(fileobj=raw)
        try:
            yield io.BufferedReader(_ExpandingStream(expanded, raw, source.path), READ_BYTES)
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk, not of what it holds
                raise
            what = f"cannot be uncompressed, the file is cut or damaged: {error}"
            raise DataError(f"{source.path}: near byte {raw.tell()}: {what}") from None


class _ExpandingStream(io.RawIOBase):
    """The uncompressed bytes of a stream. Raises DataError if they are far more than text can be compressed to."""

    def __init__(self, stream: Any, compressed: IO[bytes], path: str):
        self._stream, self._compressed, self._path, self._read_bytes = stream, compressed, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._stream.readinto(buffer))
        self._read_bytes += count
        compressed = self._compressed.tell()
        _check_expansion(self._read_bytes, compressed, f"{self._path}: near byte {compressed}: the stream")
        return count
