"""Folders that a run can start from: a Hugging Face model, one of our checkpoints, or an adapter to either."""

import os
from dataclasses import fields, replace
from pathlib import Path

from mpilm.checkpoint.format import MANIFEST, list_checkpoints
from mpilm.checkpoint.hub import find_cached_model, suggest_fetch
from mpilm.config.schema import PART_SETTINGS, ModelConfig, order_lora_targets
from mpilm.data.files import read_json
from mpilm.errors import ConfigError, FileError
from mpilm.model.hf.config import ADAPTER_CONFIG, add_hf_adapter, read_base_model, read_hf_config

USER_SETTABLE = ("dropout", "router_loss", *PART_SETTINGS, "base")  # not part of a folder's shape
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "lora_targets")  # user-settable unless the folder holds an adapter


def locate_model(name: str | Path) -> Path:
    """Return the folder that a setting names: a path, or the name of a model of the Hugging Face Hub that is in the cache."""
    path = Path(name).expanduser()
    return path if path.exists() else find_cached_model(str(name)) or path


def read_pretrained_config(folder: str | Path, base: str = "") -> ModelConfig:
    """Return the shape that a folder's config.json describes, vocabulary included, or that of an adapter's model with the
    adapter. `base` overrides where the adapter's model lies. Raises FileError, DataError or ConfigError."""
    path = locate_model(folder)
    if has_adapter(path):
        model = read_pretrained_config(find_base_model(path, base))
        return add_hf_adapter(model, read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG))
    if not (path / "config.json").is_file():
        problem = "has no config.json, so it is not a Hugging Face folder" if path.is_dir() else "is not a folder"
        problem += "" if path.exists() else suggest_fetch(str(folder))
        if any(path.glob("adapter_model.*")):
            problem = f"holds an adapter but no {ADAPTER_CONFIG}, which describes its kind"
        if newest := list_checkpoints(path / "checkpoints"):
            problem = f"is a run; name one of its checkpoints, such as {newest[-1]}"
        raise FileError(f"--model.init-from {folder} {problem}")
    model, vocab_size = read_hf_config(read_json(path / "config.json"), str(path / "config.json"))
    return replace(model, vocab_size=vocab_size)


def with_pretrained_shape(model: ModelConfig, folder: str | Path) -> ModelConfig:
    """Return `model` with the shape of a folder, keeping what the user may set."""
    users = {name: getattr(model, name) for name in _user_settable(folder)}
    return replace(read_pretrained_config(folder, model.base), **users, init_from=str(folder))


def check_pretrained_shape(model: ModelConfig) -> None:
    """Raise ConfigError if a setting differs from the folder's shape, or the context exceeds its learned positions."""
    pretrained = read_pretrained_config(model.init_from, model.base)
    model = replace(model, lora_targets=order_lora_targets(model))
    length, limit = model.context_length, pretrained.context_length
    if length > limit and model.arch in ("gpt2", "bert"):
        raise ConfigError(f"--model.context-length {length}: {model.init_from} has learned positions for only {limit} tokens")
    for item in fields(ModelConfig):
        wanted, has, flag = getattr(model, item.name), getattr(pretrained, item.name), f"--model.{item.name.replace('_', '-')}"
        if item.name in (*_user_settable(model.init_from), "init_from", "context_length") or wanted == has:
            continue
        wanted_text = " ".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
        has_text = " ".join(map(str, has)) or "the usual ones" if isinstance(has, tuple) else has
        raise ConfigError(f"{flag} {wanted_text}: {model.init_from} has {has_text}; remove the setting")


def _user_settable(folder: str | Path) -> tuple[str, ...]:
    return USER_SETTABLE if has_adapter(folder) else USER_SETTABLE + ADAPTER_SETTINGS


def has_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter to a model in another folder."""
    return (locate_model(folder) / ADAPTER_CONFIG).is_file()


def find_base_model(folder: str | Path, base: str = "") -> Path:
    """Return the folder with the model itself: for an adapter, `base` or the one that the adapter names; raise UserError."""
    path = locate_model(folder)
    if not has_adapter(path):
        return path
    config = path / ADAPTER_CONFIG
    base = base or read_base_model(read_json(config), str(config))
    for model in (locate_model(base), path / base):  # a relative path starts here, or in the adapter's folder
        if base and os.path.isfile(model / "config.json"):  # False for any name that cannot be one
            return model
    problem = f"{path} holds an adapter to {base!r}, which is not a model folder here{suggest_fetch(base)}"
    raise FileError(f"{problem}; set --model.base to its folder")


def find_tokenizer_folder(folder: str | Path, base: str = "") -> str:
    """Return the folder with the tokenizer: the model's where an adapter has none of its own."""
    path = locate_model(folder)
    return str(path if (path / "tokenizer.json").is_file() else find_base_model(path, base))


def list_pretrained_files(folder: Path, base: str = "") -> list[Path]:
    """Return the files whose bytes identify the model: the manifest, which holds the digests of the others, or all weights."""
    base_files = list_pretrained_files(find_base_model(folder, base)) if has_adapter(folder) else []
    if (folder / MANIFEST).is_file():
        return [folder / MANIFEST, *base_files]
    return [*sorted(folder.glob("*config.json")), *sorted(folder.glob("*.safetensors")), *base_files]
