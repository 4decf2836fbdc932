"""Read a checkpoint back: verified on one rank, then read by every rank for itself, the bytes it needs and no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpilm.checkpoint.format import checkpoints, verify
from mpilm.checkpoint.tensors import Shape, find, open_tensors
from mpilm.comm.base import Comm
from mpilm.comm.together import together
from mpilm.errors import DataError
from mpilm.model.huggingface import published_name
from mpilm.parallel.shard import Piece


def newest_valid(parent: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose every byte is right, and what is wrong with the newer ones. Raises FileError."""
    complaints: dict[Path, str] = {}
    for folder in reversed(checkpoints(parent)):
        try:
            verify(folder)
            return folder, complaints
        except DataError as error:
            complaints[folder] = str(error)
    return None, complaints


def load(
    folder: Path,
    parameters: Mapping[Piece, Tensor],
    moments: Mapping[str, Mapping[Piece, Tensor]],
    shapes: Mapping[str, Shape],
    comm: Comm,
) -> None:
    """Fill this rank's pieces, flat float32 tensors on any device, from a verified checkpoint of any layout. Collective over
    `comm`; raises AgreedError on all ranks alike.

    `shapes`: every parameter of the whole model that has memory of its own; all of them are compared with the files on every
    rank. `moments` is by kind, and may be empty.
    """
    together(comm, lambda: _load(folder, parameters, moments, shapes))


def _load(
    folder: Path,
    parameters: Mapping[Piece, Tensor],
    moments: Mapping[str, Mapping[Piece, Tensor]],
    shapes: Mapping[str, Shape],
) -> None:
    _read_pieces(folder, "model", parameters, {name: published_name(name) for name in shapes}, shapes)
    for kind, pieces in moments.items():
        _read_pieces(folder, "optimizer", pieces, {name: moment_name(name, kind) for name in shapes}, shapes)


def moment_name(name: str, kind: str) -> str:
    """What a parameter's moment is called in the files."""
    return f"{name}.{kind}"


def _read_pieces(
    folder: Path, stem: str, pieces: Mapping[Piece, Tensor], names: Mapping[str, str], shapes: Mapping[str, Shape]
) -> None:
    with open_tensors(folder, stem) as slots:
        found = {name: find(slots, names[name], shape, folder, dtypes=("F32",)) for name, shape in shapes.items()}
        for piece, tensor in pieces.items():
            found[piece.name].read(tensor, piece.start)


def read_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Fill whole tensors, contiguous, by their names in a safetensors file or in a Hugging Face folder, whose model may be in
    one file or in several with an index; F16, BF16, F32 and F64 are converted. Raises FileError, DataError or ConfigError."""
    with open_tensors(path) as slots:
        for name, tensor in wanted.items():
            find(slots, name, tuple(tensor.shape), path).read(tensor)
