"""Read a checkpoint back: verified on one rank, sent to the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpilm.checkpoint.format import checkpoints, verify
from mpilm.comm.base import Comm
from mpilm.comm.together import on_root
from mpilm.errors import ConfigError, DataError
from mpilm.model.huggingface import published_name


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
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    flats: list[Tensor],
    comm: Comm,
) -> None:
    """Fill parameters and moments from a verified checkpoint. Collective.

    The tensors are views of `flats`, which rank 0 fills and then broadcasts: one reader, whatever the number of ranks.
    """
    on_root(comm, lambda: _read(folder, parameters, moments))
    for flat in flats:
        comm.broadcast(flat)


def _read(folder: Path, parameters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    read_tensors(folder / "model.safetensors", {published_name(name): p for name, p in parameters.items()})
    wanted = {f"{name}.{kind}": tensor for kind, of in moments.items() for name, tensor in of.items()}
    if wanted:
        read_tensors(folder / "optimizer.safetensors", wanted)


def read_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a safetensors file into those of the same names; raises DataError or ConfigError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            for name, tensor in wanted.items():
                if name not in there:
                    raise ConfigError(f"{path} has no tensor {name}: it is a checkpoint of another model")
                found = file.get_tensor(name)
                if found.shape != tensor.shape:
                    raise ConfigError(f"{path}: {name} has shape {tuple(found.shape)}, this model needs {tuple(tensor.shape)}")
                tensor.copy_(found)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None
