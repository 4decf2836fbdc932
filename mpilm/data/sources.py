"""What a path holds: the files to read, in corpus order, and the work items they are cut into.

Both depend on the files alone, never on the number of ranks.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpilm.data.files import hex_digest, touching
from mpilm.errors import DataError, FileError, UserError

BLOCK_BYTES = 2**20  # a long text is cut into sequences of about this size

PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv")
CODE = (
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".f", ".f90", ".rs", ".go", ".java", ".js", ".ts", ".jl", ".r",
    ".sh", ".toml", ".yaml", ".yml", ".sql", ".lua", ".rb", ".pl", ".scala", ".hs", ".cs",
)  # fmt: skip
JSON_LINES = (".jsonl", ".ndjson")
CODECS = {".gz": "gzip", ".zst": "zstd"}
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    format: str
    """text, jsonl or parquet."""
    codec: str
    """gzip, zstd or empty."""
    size: int
    """Bytes on disk when it was listed; nothing beyond is read."""
    parts: int
    """Work items: blocks of bytes, or row groups."""


@dataclass(frozen=True)
class Item:
    """One piece of work: part number `part` of a source."""

    source: Source
    part: int

    @property
    def size(self) -> int:
        """About how many bytes of the file it stands for; what items are dealt out by."""
        return max(1, self.source.size // self.source.parts)


def discover(path: str) -> list[Source]:
    """The files of a path in corpus order: a file; a folder, searched through; or, for "", the embedded corpus.

    A folder's files are sorted by relative name; hidden ones, empty ones and those whose suffix is not known as text are
    left out. Raises FileError, or DataError where nothing is left.
    """
    if not path:
        return embedded()
    given = Path(path).expanduser()
    with touching(path):
        given.stat()
    if not given.is_dir():
        sources = [_source(given, kind_of(given) or _kind_of_unknown(given))]
    else:
        names = _walk(given)
        sources = [_source(given / name, kind) for name in names if (kind := kind_of(Path(name)))]
    sources = [source for source in sources if source.size]
    if not sources:
        raise DataError(_nothing(given))
    return sources


def _nothing(given: Path) -> str:
    if not given.is_dir():
        return f"{given}: the file is empty"
    kinds = ", ".join((*PROSE[:3], *CODE[:1], *JSON_LINES[:1], ".parquet"))
    return f"{given}: no file in this folder holds text; taken are names ending in {kinds} and the like, also with .gz or .zst"


def kind_of(path: Path) -> tuple[str, str] | None:
    """(format, codec) that a name speaks of; None for a name that speaks of neither."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    codec = CODECS.get(suffixes[-1], "") if suffixes else ""
    suffix = (suffixes[:-1] if codec else suffixes)[-1:]
    if suffix == [".parquet"] and not codec:
        return "parquet", ""
    if suffix and suffix[0] in JSON_LINES:
        return "jsonl", codec
    if suffix and suffix[0] in PROSE + CODE:
        return "text", codec
    return None


def _kind_of_unknown(path: Path) -> tuple[str, str]:
    """A file that was named by itself is read as text whatever its suffix, or as JSON lines when it is a .json."""
    inner = path.with_suffix("") if path.suffix.lower() in CODECS else path
    return "jsonl" if inner.suffix.lower() == ".json" else "text", CODECS.get(path.suffix.lower(), "")


def _walk(folder: Path, left_out: frozenset[str] = frozenset()) -> list[str]:
    """Relative names of the files below a folder, sorted; hidden files and folders, and those folders, left out."""
    names: list[str] = []

    def stop(error: OSError) -> None:
        raise FileError(f"{error.filename}: cannot be listed: {error.strerror}")

    for where, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        base = Path(where).relative_to(folder)
        names += [(base / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _source(path: Path, kind: tuple[str, str]) -> Source:
    form, codec = kind
    with touching(path):
        size = path.stat().st_size
    blocks = 1 if codec else -(-size // BLOCK_BYTES)
    parts = parquet_file(str(path)).num_row_groups if form == "parquet" else blocks
    return Source(str(path), form, codec, size if parts else 0, parts)


def parquet_file(path: str) -> Any:
    """The opened file; raises DataError when it is not Parquet or pyarrow is missing."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing("pyarrow", path) from None
    try:
        with touching(path):
            return ParquetFile(path)
    except ArrowException as error:
        raise DataError(f"{path}: is not a Parquet file that can be read: {error}") from None


def missing(library: str, path: str) -> UserError:
    return UserError(f"{path}: reading it needs {library}; install it with: pip install 'mpilm[data]'")


def embedded() -> list[Source]:
    """The embedded corpus: the source text of this interpreter's standard library, tests left out.

    The order is fixed but as good as random, so that the end held out for evaluation is like the rest.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name in _walk(root, LEFT_OUT) if name.endswith(".py")]
    sources = [_source(root / name, ("text", "")) for name in sorted(names, key=hex_digest)]
    return [source for source in sources if source.size]


def items_of(sources: Sequence[Source]) -> list[Item]:
    """The work items of all sources, in corpus order."""
    return [Item(source, part) for source in sources for part in range(source.parts)]


def deal(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    """The contiguous run of items that a rank works on; runs of about equal bytes."""
    total = sum(item.size for item in items)
    mine, done = [], 0
    for item in items:
        if (2 * done + item.size) * ranks // (2 * total) == rank:  # by the middle of the item
            mine.append(item)
        done += item.size
    return mine


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` items, evenly spaced over all."""
    if len(items) <= most:
        return list(items)
    return [items[len(items) * i // most] for i in range(most)]
