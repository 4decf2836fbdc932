"""Read a checkpoint back: verified first, then read by every rank for itself, the bytes it needs and no others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mpilm.checkpoint.format import MANIFEST
from mpilm.checkpoint.tensors import Shape, find, open_tensors
from mpilm.checkpoint.verify import with_help
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.config import Model
from mpilm.errors import ConfigError
from mpilm.model.hf.names import hf_name, match_keys
from mpilm.parallel.flat_layout import ParamSlice

SHOWN = 4  # names that a message lists
TIED_MATRICES = ("head.weight",)  # which a file may hold although it is the embedding again
POSITIONS = "embed.positions.weight"


def load(
    folder: Path,
    parameters: Mapping[ParamSlice, Tensor],
    moments: Mapping[str, Mapping[ParamSlice, Tensor]],
    shapes: Mapping[str, Shape],
    moment_shapes: Mapping[str, Mapping[str, Shape]],
    model: Model,
    comm: Comm,
    optional: Collection[str] = (),
) -> None:
    """Fill this rank's pieces, flat float32 tensors on any device, from a verified checkpoint of any layout. Collective over
    `comm`; raises AgreedError on all ranks alike.

    `shapes`: every trained parameter of the whole model that has memory of its own; all are compared with the files on every
    rank. `moments` and their shapes are by kind, and may be empty; `optional`: kinds that are left as they are where there are
    none in the files.
    """
    run_on_all_ranks(comm, lambda: _load(folder, parameters, moments, shapes, moment_shapes, model, optional))


def _load(
    folder: Path,
    parameters: Mapping[ParamSlice, Tensor],
    moments: Mapping[str, Mapping[ParamSlice, Tensor]],
    shapes: Mapping[str, Shape],
    moment_shapes: Mapping[str, Mapping[str, Shape]],
    model: Model,
    optional: Collection[str],
) -> None:
    names = {name: hf_name(name, model.arch) for name in shapes}
    _read_pieces(folder, weights_stem(model), parameters, names, shapes)
    for kind, of in moment_shapes.items():
        names = {name: moment_name(name, kind) for name in of}
        if kind not in optional or _holds(folder, names.values()):
            _read_pieces(folder, "optimizer", moments[kind], names, of)


def _holds(folder: Path, names: Iterable[str]) -> bool:
    with open_tensors(folder, "optimizer") as slots:
        return any(name in slots for name in names)


def moment_name(name: str, kind: str) -> str:
    """What a parameter's moment is called in the files."""
    return f"{name}.{kind}"


def weights_stem(model: Model) -> str:
    """What the files of the parameters that are trained are called."""
    return "adapter_model" if model.lora_rank else "model"


def _read_pieces(
    folder: Path, stem: str, pieces: Mapping[ParamSlice, Tensor], names: Mapping[str, str], shapes: Mapping[str, Shape]
) -> None:
    with open_tensors(folder, stem) as slots:
        found = {name: find(slots, names[name], shape, folder, dtypes=("F32",)) for name, shape in shapes.items()}
        for piece, tensor in pieces.items():
            found[piece.name].read(tensor, piece.start)


def load_published(
    folder: Path, parameters: Mapping[ParamSlice, Tensor], shapes: Mapping[str, Shape], model: Model, comm: Comm
) -> None:
    """Fill this rank's pieces, flat float32 tensors on any device, from a Hugging Face folder: one safetensors file or several
    with an index, in F16, BF16, F32 or F64. Collective over `comm`; raises AgreedError on all ranks alike.

    `shapes`: of all parameters that have memory of their own. A table of learned positions may be longer than the model needs.
    A checkpoint is verified first.
    """
    with_help(comm, lambda verify: verify(folder) if (folder / MANIFEST).exists() else None)
    run_on_all_ranks(comm, lambda: _load_published(folder, parameters, shapes, model))


def _load_published(folder: Path, parameters: Mapping[ParamSlice, Tensor], shapes: Mapping[str, Shape], model: Model) -> None:
    _refuse_pickles(folder)
    with open_tensors(folder) as slots:
        found = match_keys(shapes, slots, model.arch, TIED_MATRICES if model.tie_embeddings else ())
        for words, names in (("lacks", found.missing), ("holds, besides a " + model.arch + " model,", found.unexpected)):
            if names:
                raise ConfigError(f"{folder} {words} {_listed(names)}")
        places = {
            name: find(slots, found.names[name], shape, folder, longer=name == POSITIONS) for name, shape in shapes.items()
        }
        for piece, tensor in parameters.items():
            places[piece.name].read(tensor, piece.start)


def load_adapter(
    folder: Path, parameters: Mapping[ParamSlice, Tensor], shapes: Mapping[str, Shape], model: Model, comm: Comm
) -> None:
    """The same for the adapter that a folder holds, as PEFT or mpilm writes it."""
    with_help(comm, lambda verify: verify(folder) if (folder / MANIFEST).exists() else None)
    run_on_all_ranks(comm, lambda: _load_adapter(folder, parameters, shapes, model))


def _load_adapter(folder: Path, parameters: Mapping[ParamSlice, Tensor], shapes: Mapping[str, Shape], model: Model) -> None:
    names = {name: hf_name(name, model.arch) for name in shapes}
    _refuse_pickles(folder, "adapter_model*.bin")
    with open_tensors(folder, weights_stem(model)) as slots:
        extra, missing = sorted(set(slots) - set(names.values())), sorted(set(names.values()) - set(slots))
        if extra:
            raise ConfigError(f"{folder} holds, besides the adapter that {model.arch} may have, {_listed(extra)}")
        if missing:
            raise ConfigError(f"{folder} lacks {_listed(missing)}: an adapter must be on the same matrices of every block")
        places = {name: find(slots, names[name], shape, folder) for name, shape in shapes.items()}
        for piece, tensor in parameters.items():
            places[piece.name].read(tensor, piece.start)


def _refuse_pickles(folder: Path, *patterns: str) -> None:
    """Say how to convert weights in a format that could run a stranger's code."""
    patterns = patterns or ("pytorch_model*.bin", "*.ckpt", "*.pt", "*.pth")
    old = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    if old and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} holds {old[0]}, a pickle, which could run anything when it is read; convert it once where you trust it, "
            "for example with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
