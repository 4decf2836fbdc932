"""File access whose errors name the file and this host, and digests."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpilm.errors import DataError, FileError

BLOCK_BYTES = 2**24  # files are digested in blocks, which several ranks can share; their number does not change a digest


@contextmanager
def file_errors(path: str | Path, verb: str = "read") -> Iterator[None]:
    """Turn an OSError inside, or in a function that this decorates, into a FileError that names the file and this host."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be {verb}: {error.strerror or error} (on {socket.gethostname()})") from None


def read_bytes(path: Path) -> bytes:
    """Read a whole file; raises FileError."""
    with file_errors(path):
        return path.read_bytes()


def parse_json(text: str | bytes, place: object) -> Any:
    """Return the value of a JSON text; raises DataError naming the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises FileError or DataError naming the file."""
    values = parse_json(read_bytes(path), path)
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object, but {type(values).__name__}")
    return values


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and wait until it is on the disk; raises FileError."""
    with file_errors(path, "written"), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def is_valid_utf8(text: str) -> bool:
    """Return whether UTF-8 can encode the text: JSON may hold halves of surrogate pairs, which are no characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def blake2b_digest(data: bytes) -> bytes:
    """Return the digest of 32 bytes that identifies tokens, texts and tokenizers."""
    return hashlib.blake2b(data, digest_size=32).digest()


def hex_digest(*parts: bytes | str) -> str:
    """Return one hex digest of several parts; moving a byte from one part to the next changes it."""
    digests = [blake2b_digest(part.encode() if isinstance(part, str) else part) for part in parts]
    return blake2b_digest(b"".join(digests)).hex()
