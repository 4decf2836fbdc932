"""Settings by name: "section.key" for the fields of nested dataclasses, of any depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")
get_setting_types: Callable[[type], dict[str, Any]] = lru_cache(partial(get_type_hints, include_extras=True))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting of a config, or of nested dictionaries, as "section.key" -> value."""
    flat: dict[str, Any] = {}
    for key, value in (config if isinstance(config, dict) else vars(config)).items():
        is_section = is_dataclass(value) or isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def flatten_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting as "section.key" -> type."""
    kinds: dict[str, Any] = {}
    for key, kind in get_setting_types(type(config)).items():
        value = getattr(config, key)
        kinds |= flatten_types(value, f"{prefix}{key}.") if is_dataclass(value) else {prefix + key: kind}
    return kinds


def to_dict(config: Any) -> dict[str, Any]:
    """Return the settings as nested dictionaries of plain values, as TOML and JSON hold them."""
    return {key: list(v) if isinstance(v, tuple) else to_dict(v) if is_dataclass(v) else v for key, v in vars(config).items()}


def override(config: T, settings: Mapping[str, Any] | None = None, /, **changes: Any) -> T:
    """Return the config with other values for `settings`, "section.key" -> value, and for the keywords `section__key`."""
    for name, value in {**(settings or {}), **{path.replace("__", "."): value for path, value in changes.items()}}.items():
        section, _, key = name.partition(".")
        value = replace(getattr(config, section), **{key: value}) if key else value
        config = replace(config, **{section: value})  # type: ignore[type-var]
    return config


def flag_of(name: str) -> str:
    """Return the flag of a setting: --section.some-key."""
    return "--" + name.replace("_", "-")
