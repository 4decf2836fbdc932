"""Blocks to disk: each hashed in memory, written at its place in its file, never read back.

They go past the kernel's page cache where the file system lets them: filling it takes a core several times as long as hashing,
and drives out what the run reads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.format import Point, nowhere
from mpilm.checkpoint.plan import Block

PAGE = mmap.PAGESIZE


def digest_of(data: Tensor) -> Tensor:
    """sha256 of a uint8 tensor in host memory, as a tensor of 32 bytes."""
    return torch.frombuffer(bytearray(hashlib.sha256(data.numpy().data).digest()), dtype=torch.uint8)


class BlockWriter:
    """Writes blocks into the files of one folder, and syncs the files when it is left.

    The first error of the disk is kept, and nothing more is written after it, but it is not raised: the other ranks still
    wait for this one's messages. `raise_error` raises it when the time has come.
    """

    def __init__(self, folder: Path, at: Point = nowhere):
        self._folder, self._at = folder, at
        self._handles: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self._error: OSError | None = None

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles.values():
            with self._keeping_errors():
                self._at("checkpoint.fsync")
                os.fsync(handle)
        for handle in (*self._handles.values(), *self._direct.values()):
            with self._keeping_errors():
                os.close(handle)

    def write(self, block: Block, data: Tensor) -> None:
        """Write a whole block, a uint8 tensor in host memory, at its place."""
        left, at = data.numpy().data, block.offset
        with self._keeping_errors():
            self._at("checkpoint.write")
            handle = self._handle(block.file.name)
            count = self._write_direct(block.file.name, data, at)
            left, at = left[count:], at + count
            while left and self._error is None:
                count = os.pwrite(handle, left, at)
                left, at = left[count:], at + count

    def _write_direct(self, name: str, data: Tensor, at: int) -> int:
        """Write whole pages without the page cache; returns how many bytes were written so, none where that cannot be."""
        whole = data.numel() // PAGE * PAGE
        if not whole or at % PAGE or data.data_ptr() % PAGE:
            return 0
        try:
            if name not in self._direct:
                self._direct[name] = os.open(self._folder / name, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
            return os.pwrite(self._direct[name], data.numpy().data[:whole], at)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which a file system answers that has no such way
                raise
            return 0

    def raise_error(self) -> None:
        """Raise the OSError that was kept, if one was."""
        if self._error is not None:
            raise self._error

    def _handle(self, name: str) -> int:
        if name not in self._handles:
            self._handles[name] = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT, 0o666)
        return self._handles[name]

    @contextlib.contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error
