"""Settings from TOML files: put over those of a config, each of the right type or refused by name."""

from __future__ import annotations

import difflib
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from mpilm.config import Data
from mpilm.errors import ConfigError, FileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def merge(base: T, values: dict[str, Any], source: str, prefix: str = "") -> T:
    """`base` with the nested `values` of `source` put in its place.

    Raises ConfigError naming the source and the key when a key is unknown or a value has the wrong type.
    """
    known = {item.name: getattr(base, item.name) for item in fields(base)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for raw, value in values.items():
        key = raw.replace("-", "_")
        if key not in known:
            raise ConfigError(f"{source}: unknown key {prefix}{raw}{_nearest(key, known, prefix)}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{raw} is a section; write [{prefix}{raw}] and its keys below it")
            changes[key] = merge(known[key], value, source, f"{prefix}{raw}.")
        else:
            value = _paths(value) if isinstance(base, Data) and key == "path" else value
            changes[key] = _typed(value, known[key], _item_type(base, key), f"{source}: {prefix}{raw}")
    return replace(base, **changes)  # type: ignore[type-var]


def _nearest(key: str, known: dict[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known here are {', '.join(sorted(known))}"


TOML_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", tuple: "a list"}


def _item_type(section: Any, key: str) -> type | None:
    """What the items of a list setting are."""
    arguments = get_args(get_type_hints(type(section))[key])
    return arguments[0] if arguments and isinstance(arguments[0], type) else None


def _typed(value: Any, like: Any, item: type | None, where: str) -> Any:
    if isinstance(like, tuple) and isinstance(value, list):
        value = [float(entry) if item is float and type(entry) is int else entry for entry in value]
        if all(type(entry) is item for entry in value):
            return tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(like):
        of = f" of {TOML_NAMES[item].split(' ', 1)[1]}s" if item in (int, float, str) else ""
        raise ConfigError(f"{where} must be {TOML_NAMES[type(like)]}{of}, not {value!r}")
    return value


def _paths(value: Any) -> Any:
    """A path by itself, or a list of paths and parts or of pairs of them, as one list of strings."""
    pairs = value if isinstance(value, list) else [value]
    flat = [entry for pair in pairs for entry in (pair if isinstance(pair, list) else [pair])]
    return [str(entry) for entry in flat if entry != ""] if all(type(entry) in (str, int, float) for entry in flat) else value


def read_toml(path: str | Path, named: str = "") -> dict[str, Any]:
    """The values of a TOML file; raises FileError or ConfigError with the file named, or what `named` says in its place."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{named or path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named or path}: is not TOML: {error}") from None
