"""Loading: every rank reads the bytes that it needs, and no others, from a checkpoint or any Hugging Face folder.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the tensors. The safetensors library checks the
header, but reads whole rows into new memory. So tensors are read here, as ranges of elements into the memory of parameters.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpilm.checkpoint.format import MANIFEST, PARAMETER, TensorShape, file_stem, is_file_name, stored_name
from mpilm.checkpoint.plan import NO_PARTS, Parts
from mpilm.checkpoint.verify import run_on_root_with_verify
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.config.schema import ModelConfig
from mpilm.data.files import file_errors, parse_json, read_json
from mpilm.errors import ConfigError, DataError
from mpilm.formatting import name_some
from mpilm.model.hf.names import match_keys
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.parallel.layout import ParamPart

STAGED_ELEMENTS = 1 << 22  # pass through host memory at a time on their way to a device or another dtype
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = ("pytorch_model*.bin", "*.ckpt", "*.pt", "*.pth")
POSITIONS = "embed.positions.weight"

Slices = Mapping[ParamSlice, Tensor]  # flat float32 tensors on any device, to be filled
Shapes = Mapping[str, TensorShape]  # global, of all parameters with their own memory
TensorRefs = Mapping[str, "TensorRef"]


def load_checkpoint(
    folder: Path, slices: Mapping[str, Slices], shapes: Mapping[str, Shapes], model: ModelConfig, comm: Comm,
    optional: str = "", parts: Parts = NO_PARTS,
) -> None:  # fmt: skip
    """Fill this rank's slices, by kind, from a verified checkpoint of any layout. All ranks compare all shapes with the files.
    The kind `optional` stays as it is if the files have none. Collective over `comm`; raises CollectiveError on all ranks."""

    def read() -> None:
        for kind, kind_shapes in shapes.items():
            names = {name: stored_name(name, kind, model) for name in kind_shapes}
            with open_tensors(folder, file_stem(kind, model)) as refs:
                if kind != optional or any(name in refs for name in names.values()):
                    _read_slices(folder, refs, slices.get(kind, {}), names, kind_shapes, parts, exact=True)

    run_on_all_ranks(comm, read)


def load_hf_weights(
    folder: Path, parameters: Slices, shapes: Shapes, model: ModelConfig, comm: Comm, adapter: bool = False,
    parts: Parts = NO_PARTS,
) -> None:  # fmt: skip
    """Fill this rank's slices from a Hugging Face folder: one safetensors file or several with an index, in any of DTYPES. With
    `adapter`, they are those of the adapter in the folder, as PEFT or mpilm writes it. A table of learned positions may be
    longer than needed. A folder with a manifest is verified first. Collective; raises CollectiveError on all ranks."""
    run_on_root_with_verify(comm, lambda verify: verify(folder) if (folder / MANIFEST).exists() else None)

    def read() -> None:
        _check_no_pickles(folder, ("adapter_model*.bin",) if adapter else PICKLES)
        with open_tensors(folder, file_stem(PARAMETER, model) if adapter else "model") as refs:
            copies = ("head.weight",) if model.tie_embeddings else ()  # of the embedding, which files may hold as well
            found, missing, unexpected = match_keys(shapes, refs, model.arch, copies)
            kind = f"an adapter of a {model.arch} model" if adapter else f"a {model.arch} model"
            hint = ": an adapter must have the same matrices in every block" if adapter else ""
            for verb, names, end in (("lacks", missing, hint), (f"holds, besides {kind},", unexpected, "")):
                if names:
                    raise ConfigError(f"{folder} {verb} {name_some(names)}{end}")
            _read_slices(folder, refs, parameters, found, shapes, parts, exact=False)

    run_on_all_ranks(comm, read)


def _read_slices(
    folder: Path, refs: TensorRefs, slices: Slices, names: Mapping[str, str], shapes: Shapes, parts: Parts, exact: bool
) -> None:
    """Fill `slices` from the tensors with these names, after all of them are found to fit: if `exact`, only in float32."""
    dtypes = ("F32",) if exact else DTYPES
    tensors = {n: lookup_tensor(refs, names[n], x, folder, dtypes, not exact and n == POSITIONS) for n, x in shapes.items()}
    for piece, tensor in slices.items():
        if (part := parts.get(piece.name)) is None:
            tensors[piece.name].read(tensor, piece.start)
        else:
            tensors[part.source].read_part(tensor, piece.start, part)


def _check_no_pickles(folder: Path, patterns: Sequence[str]) -> None:
    """Refuse weights in a format that can run a stranger's code, and tell how to convert them."""
    pickles = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        problem = f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is loaded"
        advice = "convert it once where that is safe, for example with transformers"
        raise ConfigError(f"{problem}; {advice}: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)")


@dataclass(frozen=True)
class TensorRef:
    """A tensor in an open file."""

    file: BinaryIO
    dtype: str  # as the header spells it
    shape: TensorShape
    offset: int  # of its first byte in the file

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fill the contiguous `out` with elements of the flattened tensor from `start` on. Raises FileError or DataError."""
        flat, dtype = out.detach().view(-1), DTYPES[self.dtype]
        offset = self.offset + start * dtype.itemsize
        is_staged = flat.dtype != dtype or flat.device.type != "cpu"
        for part in flat.split(STAGED_ELEMENTS) if is_staged else [flat]:
            staged = torch.empty(part.numel(), dtype=dtype) if is_staged else part
            _read_into(self.file, staged.view(torch.uint8).numpy().data, offset)
            offset += staged.nbytes
            if is_staged:
                part.copy_(staged)

    def read_part(self, out: Tensor, start: int, part: ParamPart) -> None:
        """Do the same with the elements of a part of the tensor, counted within the part."""
        flat, (first, run, distance) = out.detach().view(-1), part.runs
        while flat.numel():
            row, column = divmod(start, run)
            piece = flat[: run - column]
            self.read(piece, first + row * distance + column)
            flat, start = flat[piece.numel() :], start + piece.numel()


@contextlib.contextmanager
def open_tensors(path: Path, stem: str = "model") -> Iterator[TensorRefs]:
    """Yield the tensors, by name, of a file, or of a folder's STEM.safetensors or its index; raise FileError or DataError."""
    with contextlib.ExitStack() as stack:
        yield _open_folder(path, stem, stack) if path.is_dir() else _open_file(path, stack)


def lookup_tensor(
    refs: TensorRefs, name: str, shape: TensorShape, where: Path, dtypes: Collection[str] = DTYPES, longer: bool = False
) -> TensorRef:
    """Return a tensor, with `longer` also of more rows; raise ConfigError if name or shape, DataError if the dtype is wrong."""
    if name not in refs:
        raise ConfigError(f"{where} has no tensor {name}: it is a checkpoint of another model")
    ref, expected = refs[name], tuple(shape)
    if longer and ref.shape[1:] == expected[1:] and ref.shape[0] > expected[0]:
        expected = ref.shape
    if ref.shape != expected:
        raise ConfigError(f"{ref.file.name}: {name} has shape {ref.shape}, this model needs {expected}")
    if ref.dtype not in dtypes:
        raise DataError(f"{ref.file.name}: {name} is of dtype {ref.dtype}; {', '.join(dtypes)} can be read")
    return ref


def _open_folder(folder: Path, stem: str, stack: contextlib.ExitStack) -> TensorRefs:
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() or not index.exists():
        return _open_file(single, stack)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_file_name, weight_map.values())):
        raise DataError(f"{index} is not an index of tensors in files of its own folder")
    files = {file: _open_file(folder / file, stack) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise DataError(f"{folder / file} has no tensor {name}, but {index.name} lists it there")
    return {name: files[file][name] for name, file in weight_map.items()}


def _open_file(path: Path, stack: contextlib.ExitStack) -> TensorRefs:
    with file_errors(path):
        file = stack.enter_context(open(path, "rb"))  # noqa: SIM115
        try:
            with safe_open(path, framework="pt"):  # checks that offsets, shapes and dtypes fit each other and the file
                length = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(length), f"{path}: the header", object_pairs_hook=_check_unique)
        except (SafetensorError, ValueError) as error:
            raise DataError(f"{path} is not a readable safetensors file: {error}") from None
    header.pop("__metadata__", None)
    data = 8 + length
    return {name: TensorRef(file, x["dtype"], tuple(x["shape"]), data + x["data_offsets"][0]) for name, x in header.items()}


def _check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("the header has the same key twice")
    return dict(pairs)


def _read_into(file: BinaryIO, out: memoryview, offset: int) -> None:
    while out:
        with file_errors(file.name):
            count = os.preadv(file.fileno(), [out], offset)
        if not count:
            raise DataError(f"{file.name} has been cut: it ends at byte {offset}")
        out, offset = out[count:], offset + count
