"""A folder with a model to start from: what shape it has, and what tells it from others."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from mpilm.checkpoint.format import MANIFEST, checkpoints, read_json
from mpilm.config import Model, lora_targets
from mpilm.errors import ConfigError, FileError
from mpilm.model.hf.adapter import ADAPTER_CONFIG, add_hf_adapter, read_base_model
from mpilm.model.hf.config import read_hf_config

OURS_TO_SET = ("dropout", "router_loss", "base")  # no part of a published shape
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets")  # to be set, unless the folder holds some


def shape_of(folder: str | Path, base: str = "") -> Model:
    """The shape that the config.json of a folder describes, its vocabulary included; of a folder with an adapter, that of its
    model with the adapter. Raises FileError, DataError or ConfigError naming --model.init-from."""
    path = Path(folder).expanduser()
    if has_adapter(path):
        return add_hf_adapter(shape_of(base_of(path, base)), read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG))
    if not (path / "config.json").is_file():
        what = "holds no config.json: it is no Hugging Face folder" if path.is_dir() else "is not a folder"
        if any(path.glob("adapter_model.*")):
            what = f"holds an adapter and no {ADAPTER_CONFIG}, which says of what kind it is"
        if newest := checkpoints(path / "checkpoints"):
            what = f"is a run; name one of its checkpoints, such as {newest[-1]}"
        raise FileError(f"--model.init-from {folder} {what}")
    shape, vocab_size = read_hf_config(read_json(path / "config.json"), str(path / "config.json"))
    return replace(shape, vocab_size=vocab_size)


def started(model: Model, folder: str | Path) -> Model:
    """`model` with the shape of a folder, and what is the user's to set as it was."""
    ours = _to_set(folder)
    return replace(shape_of(folder, model.base), **{name: getattr(model, name) for name in ours}, init_from=str(folder))


def has_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter to a model that lies elsewhere."""
    return (Path(folder).expanduser() / ADAPTER_CONFIG).is_file()


def base_of(folder: str | Path, stated: str = "") -> Path:
    """The folder with the model itself: another one where `folder` holds an adapter, `stated` or where the adapter says. Raises
    FileError, DataError or ConfigError."""
    path = Path(folder).expanduser()
    if not has_adapter(path):
        return path
    config = path / ADAPTER_CONFIG
    said = stated or read_base_model(read_json(config), str(config))
    for base in (Path(said).expanduser(), path / said):  # a relative one as seen from here, or from the adapter
        if said and (base / "config.json").is_file():
            return base
    raise FileError(f"{path} holds an adapter to {said!r}, no folder of a model here; say with --model.base where it is")


def tokenizer_folder(folder: str | Path, stated: str = "") -> str:
    """The folder with the tokenizer: that of the model, where an adapter has none of its own."""
    path = Path(folder).expanduser()
    return str(folder if (path / "tokenizer.json").is_file() else base_of(path, stated))


def _to_set(folder: str | Path) -> tuple[str, ...]:
    return OURS_TO_SET if has_adapter(folder) else OURS_TO_SET + ADAPTERS


def refuse_other_shape(model: Model) -> None:
    """A model that starts from a folder has its shape: raise ConfigError naming settings that ask for another one. The context
    may be shorter; where positions are not learned, longer too."""
    shape = shape_of(model.init_from, model.base)
    model = replace(model, lora_targets=lora_targets(model))
    for item in fields(Model):
        asked, there, flag = getattr(model, item.name), getattr(shape, item.name), f"--model.{item.name.replace('_', '-')}"
        if item.name in (*_to_set(model.init_from), "init_from") or asked == there:
            continue
        if item.name == "context_length":
            if asked > there and model.arch in ("gpt2", "bert"):
                raise ConfigError(f"{flag} {asked}: {model.init_from} has learned positions for {there} tokens and no more")
            continue
        shown = " ".join(map(str, asked)) if isinstance(asked, tuple) else asked
        has = " ".join(map(str, there)) or "the usual ones" if isinstance(there, tuple) else there
        raise ConfigError(f"{flag} {shown}: {model.init_from} has {has}; leave the setting out")


def files_of(folder: Path, stated: str = "") -> list[Path]:
    """The files whose bytes are this model: the manifest, which holds the digests of all others, or the weights."""
    base = files_of(base_of(folder, stated)) if has_adapter(folder) else []
    if (folder / MANIFEST).is_file():
        return [folder / MANIFEST, *base]
    return [*sorted(folder.glob("*config.json")), *sorted(folder.glob("*.safetensors")), *base]
