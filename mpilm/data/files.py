"""File access whose errors name the file and this host, and digests."""

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from mpilm.errors import DataError, FileError
from mpilm.formatting import format_bytes

MAX_FILE_BYTES, MAX_JSON_BYTES = 2**30, 2**26  # of files that are read at once; parsed JSON may take twenty times its length
MAX_JSON_DEPTH = 200  # which every parser can read, however much of the stack is in use
BLOCK_BYTES = 2**24  # files are digested in blocks, which several ranks can share; their number does not change a digest


@contextmanager
def file_errors(path: str | Path, verb: str = "read") -> Iterator[None]:
    """Turn an OSError inside, or in a function that this decorates, into a FileError that names the file and this host."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be {verb}: {error.strerror or error} (on {socket.gethostname()})") from None


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Read a whole file of at most `limit` bytes; raises FileError or DataError."""
    with file_errors(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size or limit  # 0: a pipe, or a device without an end
        data = file.read(min(size, limit) + 1)
    if len(data) > limit:
        raise DataError(f"{path} is larger than {format_bytes(limit)}, the most that a file of its kind may have")
    return data


def parse_json(text: str | bytes, place: object, kind: type = dict, **options: Any) -> Any:
    """Return the value of a JSON text, of type `kind`; raises DataError naming the place. All JSON of others is read here."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if _is_deep(text):
            raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
        value = json.loads(text, **options)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{place} is not JSON: {error.msg}: {line}character {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(value, kind):
        raise DataError(f"{place} is not a JSON {'object' if kind is dict else kind.__name__}, but {type(value).__name__}")
    return value


def _is_deep(text: str) -> bool:
    """Return whether objects and lists are nested more than MAX_JSON_DEPTH levels deep."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return False
    outside = "".join(text.replace(r"\\", "").replace(r"\"", "").split('"')[::2])  # of strings
    depths = accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", outside))
    return any(depth > MAX_JSON_DEPTH for depth in depths)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises FileError or DataError naming the file."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and wait until it is on the disk; raises FileError."""
    with file_errors(path, "written"), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def is_valid_utf8(text: str) -> bool:
    """Return whether UTF-8 can encode the text: JSON may hold halves of surrogate pairs, which are no characters."""
    return re.search("[\ud800-\udfff]", text) is None


def blake2b_digest(data: bytes) -> bytes:
    """Return the digest of 32 bytes that identifies tokens, texts and tokenizers."""
    return hashlib.blake2b(data, digest_size=32).digest()


def hex_digest(*parts: bytes | str) -> str:
    """Return one hex digest of several parts; moving a byte from one part to the next changes it."""
    digests = [blake2b_digest(part.encode() if isinstance(part, str) else part) for part in parts]
    return blake2b_digest(b"".join(digests)).hex()
