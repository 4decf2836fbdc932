"""Errors of the operating system in the user's words, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpilm.errors import DataError, FileError

DIGEST_BYTES = 32


@contextmanager
def touching(path: str | Path, doing: str = "read") -> Iterator[None]:
    """Turn an OSError inside into a FileError that names the file and this host."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path}: cannot {doing} it on {socket.gethostname()}: {reason}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises FileError or DataError naming the file."""
    with touching(path):
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: is not a JSON object")
    return values


def writable(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold halves of surrogate pairs, which no text has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def hex_digest(*parts: bytes | str) -> str:
    """One hex digest of several parts; where one ends and the next begins matters."""
    digests = [digest_of(part.encode() if isinstance(part, str) else part) for part in parts]
    return digest_of(b"".join(digests)).hex()


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and wait until the disk has it; raises FileError."""
    with touching(path, "write"), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
