"""Reading of settings: preset, then TOML files, then flags; later wins."""

import argparse
import difflib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from mpilm.config.check import check_config
from mpilm.config.schema import OLD_NAMES, OLD_VALUES, Config, DataConfig, ModelConfig, flag_of, flatten, get_setting_types
from mpilm.errors import ConfigError, FileError, is_first_process

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
TYPE_NAMES = {int: "whole number", float: "number", str: "string"}


def parse(
    argv: Sequence[str],
    default: T,
    command: str,
    description: str,
    presets: Mapping[str, Callable[[], T]] | None = None,
    add_folder_shape: Callable[[ModelConfig, str], ModelConfig] | None = None,
    check_folder_shape: Callable[[ModelConfig], None] | None = None,
) -> T:
    """Return the checked config that the command line `argv` describes, of the type of `default`. Does not communicate.

    Commands that can start from a model folder (--model.init-from) pass two functions: one returns a model section with the
    shape of the folder, the other raises if a model section asks for another shape than its folder has. Raises ConfigError or
    FileError, and SystemExit(text, 0) for --help, so that the caller can print the text once instead of once per rank.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    description = description.strip() + "\n\n--config FILE.toml reads settings from a file; flags override it."
    if presets:
        parser.add_argument("--preset", choices=presets)
        description += f" --preset NAME starts from a named config: {', '.join(presets)}."
    try:
        sources, args = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from None
    base = presets[sources.preset]() if presets and sources.preset else default
    tomls = {f"--config {path}": read_toml(path, f"--config {path}") for path in sources.config}
    warnings: dict[str, None] = {}  # in order, each once
    args = _normalize_flags(args, default, warnings)

    def apply(config: T) -> T:
        for source, values in tomls.items():
            config = merge_settings(config, values, source, warnings)
        return _parse_flags(args, config, command, description)

    config: Any = apply(base)
    if isinstance(getattr(config, "model", None), ModelConfig) and config.model.init_from:
        if add_folder_shape is None or check_folder_shape is None:
            raise ConfigError("--model.init-from: this command cannot start from a model folder")
        start = replace(base.model, base=config.model.base)  # type: ignore[attr-defined]
        config = apply(replace(base, model=add_folder_shape(start, config.model.init_from)))  # type: ignore[type-var]
        check_folder_shape(config.model)
    check_config(config)
    if warnings and is_first_process():
        print("".join(f"mpilm: warning: {warning}\n" for warning in warnings), end="", file=sys.stderr, flush=True)
    return config


def _normalize_flags(args: Sequence[str], default: Any, warnings: dict[str, None]) -> list[str]:
    """Return the arguments as tyro reads them: current names, True or False for booleans, list items split."""
    settings, groups = flatten(default), [[""]]  # each a flag and its values
    for arg in args:
        flag, equals, value = arg.partition("=")
        if arg.startswith("--"):
            groups.append([flag, value] if equals else [flag])
        else:
            groups[-1].append(arg)
    normalized = groups[0][1:]
    for flag, *values in groups[1:]:
        name, values = _replace_old(flag[2:].replace("-", "_"), values, warnings)
        flag, current = flag_of(name), settings.get(name)
        if isinstance(current, bool):
            values = values or ["true"]
            if values[0].lower() not in ("true", "false"):
                raise ConfigError(f"{flag} {values[0]}: write true or false")
            values[0] = values[0].capitalize()
        elif isinstance(current, tuple) and name != "data.path":  # a path may contain commas
            values = [item for value in values for item in value.split(",") if item]
        elif isinstance(current, (int, float, str)) and values:
            flag, values = f"{flag}={values[0]}", values[1:]  # the value may begin with a hyphen
        normalized += [flag, *values]
    return normalized


def _replace_old(name: str, values: list[Any], warnings: dict[str, None] | None) -> tuple[str, list[Any]]:
    """Return a setting and its values with old names and values replaced by the current ones; add a warning for each."""
    current = OLD_NAMES.get(name, name)
    table = OLD_VALUES.get(current, {})
    new = [table.get(value, value) if isinstance(value, str) else value for value in values]
    if warnings is not None and (current, new) != (name, values):
        old_text, new_text = (" ".join(map(str, [flag_of(key), *items])) for key, items in ((name, values), (current, new)))
        warnings[f"{old_text} is now {new_text}; the next version will not accept the old form"] = None
    return current, new


def _parse_flags(args: list[str], default: T, command: str, description: str) -> T:
    import tyro

    prog, output = f"python -m mpilm.{command}", io.StringIO()
    config = (tyro.conf.FlagConversionOff,)  # every setting is `--section.key value`, booleans too
    try:
        with redirect_stdout(output), redirect_stderr(output):
            return tyro.cli(type(default), args=args, default=default, prog=prog, description=description, config=config)
    except SystemExit as stop:
        if stop.code == 0:
            raise SystemExit(output.getvalue(), 0) from None
    # tyro draws a box: title, message, hints, each under a rule
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()).splitlines()]
    parts = " ".join("\0" if re.fullmatch("[-─]{5,}", line) else line.strip("─ ") for line in lines).split("\0")
    texts = [" ".join(part.split()) for part in parts[1:]]
    raise ConfigError("; ".join(text for text in texts if text and not text.startswith("Argument helptext")))


def read_toml(path: str | Path, label: str = "") -> dict[str, Any]:
    """Return the values of a TOML file; raises FileError or ConfigError that begin with `label`, by default the path."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{label or path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{label or path}: is not valid TOML: {error}") from None


def merge_settings(
    base: T, values: Mapping[str, Any], source: str, warnings: dict[str, None] | None = None, prefix: str = ""
) -> T:
    """Return `base` with the nested `values` of `source`; old names are accepted and, if it is given, added to `warnings`.

    Settings of a training run that `base` lacks are skipped, so that every command accepts the config.toml of a run. Raises
    ConfigError naming the source and the key if a key is unknown or a value has the wrong type.
    """
    known = vars(base)
    changes: dict[str, Any] = {}
    for written, value in values.items():
        name, items = _replace_old(prefix + written.replace("-", "_"), value if isinstance(value, list) else [value], warnings)
        key, where = name.removeprefix(prefix), f"{source}: {prefix}{written}"
        value = items if isinstance(value, list) else items[0]
        if key not in known:
            if any(f"{other}.".startswith(f"{name}.") for other in flatten(Config())):
                continue
            close = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else f"known here are {', '.join(sorted(known))}"
            raise ConfigError(f"{source}: unknown key {prefix}{written}; {advice}")
        if isinstance(base, DataConfig) and key == "path":  # a path, or a list of paths and shares or of pairs of them
            flat = [entry for item in items for entry in (item if isinstance(item, list) else [item])]
            value = [str(entry) if type(entry) in (str, int, float) else entry for entry in flat if entry != ""]
        if not is_dataclass(known[key]):
            changes[key] = _convert(value, get_setting_types(type(base))[key], where)
        elif isinstance(value, Mapping):
            changes[key] = merge_settings(known[key], value, source, warnings, f"{name}.")
        else:
            raise ConfigError(f"{where} is a section; write [{prefix}{written}] and its keys below it")
    return replace(base, **changes)  # type: ignore[type-var]


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Return a TOML value as a setting of the type `kind`; raises ConfigError if it has another type."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    is_list = get_origin(kind) is tuple
    item = get_args(kind)[0] if is_list else kind
    item = type(get_args(item)[0]) if get_origin(item) is Literal else item
    items = value if is_list and isinstance(value, list) else [value]
    items = [float(entry) if item is float and type(entry) is int else entry for entry in items]
    if is_list != isinstance(value, list) or any(type(entry) is not item for entry in items):
        name = TYPE_NAMES.get(item, "")
        expected = f"a list of {name}s" if is_list else f"a {name}" if name else "true or false"
        raise ConfigError(f"{where} must be {expected}, not {value!r}")
    return tuple(items) if is_list else items[0]
