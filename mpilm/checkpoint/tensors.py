"""The safetensors format: 8 bytes with the length of a JSON header, the header, and the tensors one after the other.

The header is read as a stranger's: nothing in it is believed before it is checked, and a tensor's bytes are read from where
they lie without touching the others.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.format import in_folder, read_json
from mpilm.errors import ConfigError, DataError, FileError

LARGEST_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
STAGED_ELEMENTS = 1 << 22  # what passes through host memory at a time on its way to a device or another dtype
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Shape = tuple[int, ...]


def pack_header(shapes: Mapping[str, Shape]) -> bytes:
    """The first bytes of a file of float32 tensors that lie in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        stop = at + prod(shape) * torch.float32.itemsize
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, stop]}
        at = stop
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: bytes [start, stop) of an open file."""

    path: Path
    handle: int
    dtype: str
    shape: Shape
    start: int
    stop: int

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fill the contiguous `out` with the elements from `start` on, of the flattened tensor, converted to its dtype.
        Raises FileError or DataError."""
        flat, dtype, at = out.detach().view(-1), DTYPES[self.dtype], self.start + start * DTYPES[self.dtype].itemsize
        if flat.dtype == dtype and flat.device.type == "cpu":
            return _fill(self.path, self.handle, flat, at)
        for part in flat.split(STAGED_ELEMENTS):
            staged = torch.empty(part.numel(), dtype=dtype)
            _fill(self.path, self.handle, staged, at)
            part.copy_(staged)
            at += staged.nbytes
        return None


Slots = Mapping[str, Slot]


@contextlib.contextmanager
def open_tensors(path: Path, stem: str = "model") -> Iterator[Slots]:
    """The tensors by name of a safetensors file, or of a folder's STEM.safetensors or, without one, of the files in
    STEM.safetensors.index.json. Raises FileError or DataError."""
    with contextlib.ExitStack() as stack:
        yield _open_folder(path, stem, stack) if path.is_dir() else _open_file(path, stack)


def find(
    slots: Slots, name: str, shape: Shape, where: Path, dtypes: tuple[str, ...] = tuple(DTYPES), longer: bool = False
) -> Slot:
    """The tensor of that name; raises ConfigError for one that is not there or of another shape, DataError for a dtype that
    is not among `dtypes`. `longer`: it may have more rows, of which the first are wanted."""
    if name not in slots:
        raise ConfigError(f"{where} has no tensor {name}: it is a checkpoint of another model")
    slot = slots[name]
    if longer and slot.shape[1:] == tuple(shape)[1:] and slot.shape[0] > shape[0]:
        shape = slot.shape
    if slot.shape != tuple(shape):
        raise ConfigError(f"{slot.path}: {name} has shape {slot.shape}, this model needs {tuple(shape)}")
    if slot.dtype not in dtypes:
        raise DataError(f"{slot.path}: {name} is of dtype {slot.dtype}; {', '.join(dtypes)} can be read")
    if slot.stop - slot.start != prod(shape) * DTYPES[slot.dtype].itemsize:
        raise DataError(f"{slot.path}: {name} has {slot.stop - slot.start} bytes, too few or too many for its shape")
    return slot


def _open_folder(folder: Path, stem: str, stack: contextlib.ExitStack) -> Slots:
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").exists() or not index.exists():
        return _open_file(folder / f"{stem}.safetensors", stack)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(map(in_folder, places.values())):
        raise DataError(f"{index} is not an index of tensors in files of its own folder")
    files = {file: _open_file(folder / file, stack) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in files[file]:
            raise DataError(f"{folder / file} has no tensor {name}, which {index.name} says is there")
    return {name: files[file][name] for name, file in places.items()}


def _open_file(path: Path, stack: contextlib.ExitStack) -> Slots:
    with _reading(path):
        handle = os.open(path, os.O_RDONLY)
        stack.callback(os.close, handle)
        size = os.fstat(handle).st_size
    try:
        return _parse(path, handle, size)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None


def _parse(path: Path, handle: int, size: int) -> Slots:
    """The tensors that a header speaks of; raises ValueError."""
    length = int.from_bytes(_read(path, handle, 8, 0), "little") if size >= 8 else size
    data = 8 + length
    if data > size or length > LARGEST_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(_read(path, handle, length, 8).decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    slots = {name: _slot(path, handle, data, name, entry) for name, entry in header.items()}
    at = data
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        if slot.start != at or slot.stop < at:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        at = slot.stop
    if at != size:
        raise ValueError(f"{size} bytes, and its tensors need {at}")
    return slots


def _slot(path: Path, handle: int, data: int, name: str, entry: Any) -> Slot:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_integers(shape) and _are_integers(offsets) and len(offsets) == 2):
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    return Slot(path, handle, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header says one thing twice")
    return found


def _read(path: Path, handle: int, nbytes: int, at: int) -> bytes:
    data = torch.empty(nbytes, dtype=torch.uint8)
    _fill(path, handle, data, at)
    return data.numpy().tobytes()


def _fill(path: Path, handle: int, out: Tensor, at: int) -> None:
    """Read straight into the memory of the flat `out`, from byte `at` of the file on."""
    left = out.view(torch.uint8).numpy().data
    while left:
        with _reading(path):
            count = os.preadv(handle, [left], at)
        if not count:
            raise DataError(f"{path} has been cut: it ends at byte {at}")
        left, at = left[count:], at + count


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
