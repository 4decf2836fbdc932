"""The format of a checkpoint on disk: file names, safetensors headers, digests and the manifest. Knows no ranks.

A checkpoint is a folder step-NNNNNNNN. Its manifest.json, written last, holds the size and the digest of every other file. The
folder is written under a temporary name and then renamed, so a folder that has its final name and a manifest is complete.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mpilm.config.schema import ModelConfig
from mpilm.data.files import BLOCK_BYTES, read_json
from mpilm.errors import DataError
from mpilm.model.hf.names import hf_name

ITEM_BYTES = 4  # all tensors of a checkpoint are float32
PARAMETER = "parameter"  # the kind of tensor that is not a moment
MANIFEST = "manifest.json"
OWN_DIGEST = "sha256"  # the manifest's entry for itself without this entry; older manifests have none
TEMPORARY = ".writing-"

TensorShape = tuple[int, ...]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None for any other folder."""
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match.group(1)) if match else None


def list_checkpoints(parent: Path, complete: bool = True) -> list[Path]:
    """Return the checkpoints in `parent`, oldest first: those with a manifest or, unless `complete`, those without one."""
    folders = [f for f in parent.iterdir() if checkpoint_step(f) is not None] if parent.is_dir() else []
    return sorted((f for f in folders if (f / MANIFEST).is_file() == complete), key=lambda f: checkpoint_step(f) or 0)


def file_stem(kind: str, model: ModelConfig) -> str:
    """Return the stem of the names of the safetensors files that hold a kind of tensor: PARAMETER, or a kind of moment."""
    return "optimizer" if kind != PARAMETER else "adapter_model" if model.lora_rank else "model"


def stored_name(name: str, kind: str, model: ModelConfig) -> str:
    """Return the name in the files of the parameter `name`, or of a kind of its moments."""
    return hf_name(name, model.arch) if kind == PARAMETER else f"{name}.{kind}"


def pack_header(shapes: Mapping[str, TensorShape]) -> bytes:
    """Return the first bytes of a safetensors file of float32 tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + prod(shape) * ITEM_BYTES
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def count_blocks(nbytes: int) -> int:
    """Return the number of blocks in a file of this size."""
    return -(-nbytes // BLOCK_BYTES)


def hash_blocks(data: bytes) -> bytes:
    """Return the sha256 of each block of a file's content, concatenated."""
    view = memoryview(data)
    return b"".join(hashlib.sha256(view[at : at + BLOCK_BYTES]).digest() for at in range(0, len(view), BLOCK_BYTES))


def manifest_entry(nbytes: int, block_digests: bytes) -> dict[str, Any]:
    """Return the manifest's entry for a file, given the concatenated sha256 of its blocks."""
    return {"bytes": nbytes, "sha256_of_blocks": hashlib.sha256(block_digests).hexdigest()}


class CheckpointFolder:
    """Writes the small files of one checkpoint folder, syncs each to disk, and commits the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}  # of the manifest, by file; files of other writers are added here

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, dump_json(value).encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        with open(self.folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.entries[name] = manifest_entry(len(data), hash_blocks(data))

    def commit(self, final: Path) -> None:
        """Complete the folder with its manifest, then rename it to `final`; both survive a power loss."""
        manifest = {"format": 1, "files": self.entries}
        self.write_json(MANIFEST, manifest | {OWN_DIGEST: hash_manifest(manifest)})
        sync_folder(self.folder)
        self.rename(final)
        sync_folder(final.parent)

    def rename(self, final: Path) -> None:
        os.rename(self.folder, final)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest by file name. Raises FileError or DataError."""
    path = folder / MANIFEST
    manifest = read_json(path)
    text, own_digest = dump_json(manifest), manifest.pop(OWN_DIGEST, None)
    files: Any = manifest.get("files")
    is_manifest = manifest == {"format": 1, "files": files} and isinstance(files, dict)
    if not is_manifest or not all(map(_is_entry, files, files.values())):
        raise DataError(f"{path} is not a manifest of format 1 that lists files of its own folder")
    if path.read_bytes() != text.encode() or own_digest not in (None, hash_manifest(manifest)):
        raise DataError(f"{path} is damaged: its bytes are not those that were written")
    return files


def read_trainer(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's trainer.json; raises FileError, or DataError if it lacks the facts of a run."""
    trainer = read_json(folder / "trainer.json")
    for key in ("config", "content", "conditions"):
        if not isinstance(trainer.get(key), dict):
            raise DataError(f'{folder / "trainer.json"} has no object "{key}", as mpilm.train writes it')
    return trainer


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest without a digest of its own."""
    return hashlib.sha256(dump_json(manifest).encode()).hexdigest()


def _is_entry(name: str, entry: Any) -> bool:
    has_fields = isinstance(entry, dict) and set(entry) == {"bytes", "sha256_of_blocks"}
    return is_file_name(name) and has_fields and type(entry["bytes"]) is int


def is_file_name(name: Any) -> bool:
    """Return whether a name read from a file is a plain file name, which cannot lead out of the folder."""
    return isinstance(name, str) and name.isprintable() and name not in ("", "..") and Path(name).name == name


def dump_json(value: Any) -> str:
    """Return the one JSON text that checkpoints hold for a value."""
    return json.dumps(value, indent=2) + "\n"
