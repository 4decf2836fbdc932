"""What a corpus is made of: how long its documents are, what repeats, and in which scripts it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ASCII_KINDS = ("ASCII letters", "ASCII digits", "ASCII whitespace", "ASCII punctuation", "control characters")
# First code point and what begins there; blocks of the Unicode standard, grouped by what a reader would call them.
BLOCKS = (
    (0x80, "control characters"), (0xA0, "Latin-1 punctuation and symbols"), (0xC0, "Latin extended"), (0x2B0, "other"),
    (0x300, "combining marks"), (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, "Armenian"), (0x590, "Hebrew"),
    (0x600, "Arabic"), (0x700, "other"), (0x750, "Arabic"), (0x780, "other"), (0x8A0, "Arabic"), (0x900, "Devanagari"),
    (0x980, "other Indic"), (0xE00, "Thai"), (0xE80, "other"), (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "Ethiopic"),
    (0x13A0, "other"), (0x1E00, "Latin extended"), (0x1F00, "Greek"), (0x2000, "general punctuation"),
    (0x2070, "symbols and mathematics"), (0x2C60, "Latin extended"), (0x2C80, "other"), (0x2E80, "CJK"),
    (0x3040, "Japanese kana"), (0x3100, "CJK"), (0x3130, "Hangul"), (0x3190, "CJK"), (0xA000, "other"),
    (0xA720, "Latin extended"), (0xA800, "other"), (0xAC00, "Hangul"), (0xD7B0, "other"), (0xF900, "CJK"), (0xFB00, "other"),
    (0xFB50, "Arabic"), (0xFE00, "other"), (0xFE30, "CJK"), (0xFE70, "Arabic"), (0xFF00, "CJK"), (0xFFF0, "U+FFFD, specials"),
    (0x10000, "other"), (0x1D400, "symbols and mathematics"), (0x1D800, "other"), (0x1F000, "emoji"), (0x1FB00, "other"),
    (0x20000, "CJK"), (0x32000, "other"),
)  # fmt: skip
SCRIPTS = tuple(dict.fromkeys((*ASCII_KINDS, *(name for _, name in BLOCKS))))


def no_scripts() -> NDArray[np.int64]:
    return np.zeros(len(SCRIPTS), dtype=np.int64)


def count_scripts(text: str) -> NDArray[np.int64]:
    """UTF-8 bytes of the text by script, in the order of SCRIPTS."""
    counts = np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
    points = np.flatnonzero(counts)
    width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    starts = np.array([start for start, _ in BLOCKS])
    names = np.array([SCRIPTS.index(name) for _, name in BLOCKS])
    kind = np.where(points < 0x80, _ascii_kinds()[np.minimum(points, 127)], names[np.searchsorted(starts, points, "right") - 1])
    return np.bincount(kind, counts[points] * width, minlength=len(SCRIPTS)).astype(np.int64)


def _ascii_kinds() -> NDArray[np.int64]:
    """The kind of each of the 128 ASCII characters."""
    tests = (str.isalpha, str.isdigit, lambda c: c in " \t\n\r\v\f", str.isprintable, lambda c: True)
    kinds = [next(i for i, test in enumerate(tests) if test(chr(code))) for code in range(128)]
    return np.array(kinds)


@dataclass(frozen=True)
class Statistics:
    """Of a corpus as it was read, duplicates included."""

    documents: int
    tokens: int
    source_bytes: int
    tokenizer: str
    lengths: dict[str, float]
    """Tokens a document: min, median, mean, 90%, 99%, max."""
    duplicates: int
    """Documents that repeat an earlier one exactly."""
    duplicate_bytes: int
    scripts: dict[str, int]
    """Bytes by script, largest first."""


def length_distribution(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Of at least one document's length in tokens."""
    named = {"min": 0.0, "median": 50.0, "90%": 90.0, "99%": 99.0, "max": 100.0}
    values = {name: float(np.percentile(lengths, at)) for name, at in named.items()}
    return {"min": values["min"], "median": values["median"], "mean": float(lengths.mean()), **values}


def by_script(bytes_of: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    """Scripts that occur, the most frequent first."""
    pairs = [(int(count), name) for count, name in zip(bytes_of, SCRIPTS, strict=True) if count]
    return {name: count for count, name in sorted(pairs, key=lambda pair: -pair[0])}


def table(statistics: Statistics) -> str:
    """The statistics as lines of text, ready to print."""
    s = statistics
    share = 100 * s.duplicate_bytes / max(1, s.source_bytes)
    rows = [
        ("documents", f"{s.documents:,}"),
        ("bytes of text", f"{s.source_bytes:,}"),
        (f"tokens ({s.tokenizer})", f"{s.tokens:,}"),
        ("bytes per token", f"{s.source_bytes / max(1, s.tokens):.3f}"),
        ("exact duplicates", f"{s.duplicates:,} documents, {share:.2f}% of the bytes"),
    ]
    rows += [(f"tokens a document, {name}", f"{value:,.1f}") for name, value in s.lengths.items()]
    rows += [(f"bytes in {name}", f"{100 * count / s.source_bytes:.3f}%") for name, count in s.scripts.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>16}" for name, value in rows)
