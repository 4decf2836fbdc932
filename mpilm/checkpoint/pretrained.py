"""A folder with a model to start from: what shape it has, and what tells it from others."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from mpilm.checkpoint.format import MANIFEST, checkpoints, read_json
from mpilm.config import Model
from mpilm.errors import ConfigError, FileError
from mpilm.model.huggingface_config import read_config

OURS_TO_SET = ("dropout", "router_loss")  # no part of a published shape


def shape_of(folder: str | Path) -> Model:
    """The shape that the config.json of a folder describes, its vocabulary included. Raises FileError, DataError or ConfigError
    naming --model.init-from."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        what = "holds no config.json: it is no Hugging Face folder" if path.is_dir() else "is not a folder"
        if newest := checkpoints(path / "checkpoints"):
            what = f"is a run; name one of its checkpoints, such as {newest[-1]}"
        raise FileError(f"--model.init-from {folder} {what}")
    shape, vocab_size = read_config(read_json(path / "config.json"), str(path / "config.json"))
    return replace(shape, vocab_size=vocab_size)


def started(model: Model, folder: str | Path) -> Model:
    """`model` with the shape of a folder, and what is the user's to set as it was."""
    return replace(shape_of(folder), **{name: getattr(model, name) for name in OURS_TO_SET}, init_from=str(folder))


def refuse_other_shape(model: Model) -> None:
    """A model that starts from a folder has its shape: raise ConfigError naming settings that ask for another one. The context
    may be shorter; where positions are not learned, longer too."""
    shape = shape_of(model.init_from)
    for item in fields(Model):
        asked, there, flag = getattr(model, item.name), getattr(shape, item.name), f"--model.{item.name.replace('_', '-')}"
        if item.name in (*OURS_TO_SET, "init_from") or asked == there:
            continue
        if item.name == "context_length":
            if asked > there and model.arch in ("gpt2", "bert"):
                raise ConfigError(f"{flag} {asked}: {model.init_from} has learned positions for {there} tokens and no more")
            continue
        raise ConfigError(f"{flag} {asked}: {model.init_from} has {there}; leave the setting out")


def files_of(folder: Path) -> list[Path]:
    """The files whose bytes are this model: the manifest, which holds the digests of all others, or the weights."""
    manifest = folder / MANIFEST
    return [manifest] if manifest.is_file() else [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
