"""Reading of settings: preset, then TOML files, then flags; later wins."""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from mpilm.config.check import check_config
from mpilm.config.help import draw_help
from mpilm.config.old_names import OLD_NAMES, OLD_VALUES
from mpilm.config.schema import Config, ModelConfig
from mpilm.config.settings import flag_of, flatten, flatten_types, override
from mpilm.errors import ConfigError, FileError, is_first_process
from mpilm.formatting import format_bytes, format_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
MAX_TOML_BYTES = 2**22
TYPE_NAMES = {int: "whole number", float: "number", str: "string"}
OTHER_NAMES = {  # setting -> keys that mean the same in other programs
    "train.lr": "learning_rate max_lr", "train.steps": "max_steps train_iters max_iters epochs num_train_epochs",
    "train.global_batch": "batch_size global_batch_size gradient_accumulation_steps", "train.warmup_steps": "warmup",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size", "train.clip_norm": "grad_clip max_grad_norm clip_grad",
    "train.recompute": "gradient_checkpointing activation_checkpointing", "run.dir": "output_dir out_dir save_dir",
    "data.path": "data dataset data_path dataset_name train_file", "model.init_from": "model model_name model_name_or_path",
    "model.context_length": "seq_len seq_length sequence_length max_seq_length block_size",
    "model.n_layers": "num_layers n_layer num_hidden_layers", "model.n_heads": "num_heads n_head num_attention_heads",
    "model.d_model": "hidden_size n_embd dim", "parallel.tensor": "tp tensor_parallel tensor_model_parallel_size",
    "parallel.pipeline": "pp pipeline_parallel pipeline_model_parallel_size", "checkpoint.every": "save_steps save_interval",
}  # fmt: skip
SYNONYMS = MappingProxyType({key: setting for setting, keys in OTHER_NAMES.items() for key in keys.split()})


def parse(
    argv: Sequence[str], default: T, command: str, description: str,
    presets: Mapping[str, Callable[[], T]] | None = None,
    add_folder_shape: Callable[[ModelConfig, str], ModelConfig] | None = None,
    check_folder_shape: Callable[[ModelConfig], None] | None = None,
    positional: str = "", common: Sequence[str] = (),
) -> T:  # fmt: skip
    """Return the checked config that `argv` describes, of the type of `default`. Does not communicate. `add_folder_shape` gives
    a model section the shape of --model.init-from, `check_folder_shape` raises if it has another. Words after no flag set
    `positional`. Raises ConfigError or FileError, and SystemExit(text, 0) for --help, which the caller prints on one rank; the
    help begins with the settings `common`."""
    sources = "--config FILE.toml reads settings from a file; flags override it."
    kinds = flatten_types(default) | {"config": tuple[str, ...]} | ({"preset": str} if presets else {})
    if presets:
        sources += f" --preset NAME starts from a named config: {', '.join(presets)}."
    if "--list-settings" in argv:  # for the completion of shells
        raise SystemExit("".join(f"{flag_of(name)}\n" for name in ("help", *kinds) if name != positional), 0)
    warnings: dict[str, None] = {}  # in order, each once
    flags = _read_flags([arg for arg in argv if arg not in ("-h", "--help")], kinds, positional, warnings)
    paths, preset = flags.pop("config", ()), flags.pop("preset", "")
    if presets and preset not in ["", *presets]:
        raise ConfigError(f"--preset must be one of {', '.join(presets)}, not {preset!r}")
    base = presets[preset]() if presets and preset else default
    tomls = {f"--config {path}": read_toml(path, f"--config {path}") for path in paths}

    def apply(config: T) -> T:
        for source, values in tomls.items():
            config = merge_settings(config, values, source, warnings)
        if {"-h", "--help"} & set(argv):
            raise SystemExit(draw_help(config, command, description, sources, common), 0)
        return override(config, flags)

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


def _read_flags(args: Sequence[str], kinds: Mapping[str, Any], positional: str, warnings: dict[str, None]) -> dict[str, Any]:
    """Return the settings that the arguments set, as "section.key" -> value; raises ConfigError naming the flag."""
    groups: list[list[str]] = [[""]]  # each a flag and its values
    for arg in args:
        if arg.startswith("--"):
            groups.append(arg.split("=", 1))
        else:
            groups[-1].append(arg)
    words, settings = groups.pop(0)[1:], dict[str, Any]()  # words follow no flag
    for flag, *texts in groups:
        name, texts = _replace_old(_setting_name(flag), texts, warnings)
        flag = flag_of(name)
        if name not in kinds:
            raise ConfigError(_describe_unknown(name, kinds))
        is_list, item = _item_type(kinds[name])
        if not is_list:
            texts, words = texts[:1] or ["true"] * (item is bool), words + texts[1:]
        elif name not in ("config", "data.path"):  # a path may contain commas
            texts = [part for text in texts for part in text.split(",") if part]
        if not texts and (not is_list or name == "config"):
            raise ConfigError(f"{flag} needs a value")
        values = [_read_value(text, item) for text in texts]
        value = _convert(values if is_list else values[0], kinds[name], flag)
        settings[name] = settings.get(name, ()) + value if name == "config" else value
    is_list = bool(positional) and _item_type(kinds[positional])[0]
    if len(words) > (1 if positional else 0) and not is_list:
        word = words[-1 if positional else 0]
        is_name = word.startswith("-") or _setting_name(word) in kinds
        raise ConfigError(f"{format_value(word)} follows no setting; {_suggest(_setting_name(word) if is_name else '', kinds)}")
    if words:
        settings[positional] = tuple(words) if is_list else words[0]
    return settings


def _setting_name(word: str) -> str:
    """Return the name of the setting that a word on the command line spells."""
    return word.lstrip("-").replace("-", "_")


def _read_value(text: str, item: type) -> Any:
    """Return a flag's text as a value of the type `item`, or unchanged if it is none."""
    if item is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    with suppress(ValueError):
        return item(text)
    return text


def _replace_old(name: str, values: list[Any], warnings: dict[str, None] | None) -> tuple[str, list[Any]]:
    """Return a setting and its values with old names and values replaced by the current ones; add a warning for each."""
    current = OLD_NAMES.get(name, name)
    table = OLD_VALUES.get(current, {})
    words = [str(value).lower() if isinstance(value, bool) else value for value in values]
    new = [table.get(word, value) if isinstance(word, str) else value for word, value in zip(words, values)]
    if warnings is not None and (current, new) != (name, values):
        old_text, new_text = (" ".join(map(str, [flag_of(key), *items])) for key, items in ((name, values), (current, new)))
        warnings[f"{old_text} is now {new_text}; the next version will not accept the old form"] = None
    return current, new


def read_toml(path: str | Path, label: str = "") -> dict[str, Any]:
    """Return the values of a TOML file; raises FileError or ConfigError that begin with `label`, by default the path."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)
        if len(data) > MAX_TOML_BYTES:
            raise ValueError(f"it is larger than {format_bytes(MAX_TOML_BYTES)}")
        values = tomllib.loads(data.decode())
        repr(list(flatten(values).values()))  # fails for lists nested too deep and integers of thousands of digits
        return values
    except OSError as error:
        raise FileError(f"{label or path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of the parser, or UTF-8
        text = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        text = "a number in it has thousands of digits" if "integer string conversion" in text else text
        raise ConfigError(f"{label or path} is not valid TOML: {text}") from None


def merge_settings(base: T, values: Mapping[str, Any], source: str, warnings: dict[str, None] | None = None) -> T:
    """Return `base` with the nested `values` of `source`; old names are accepted and add `warnings`. Settings of a run that
    `base` lacks are skipped, so every command accepts its config.toml. Raises ConfigError naming source and key."""
    kinds, settings = flatten_types(base), {}
    for written, value in flatten(values).items():
        name, items = _replace_old(written.replace("-", "_"), value if isinstance(value, list) else [value], warnings)
        if name not in kinds and name in flatten(Config()):
            continue
        if name not in kinds:
            raise ConfigError(f"{source}: {_describe_unknown(name, kinds)}")
        value = items if isinstance(value, list) else items[0]
        if name == "data.path":  # a path, or a list of paths and shares or of pairs of them
            flat = [entry for item in items for entry in (item if isinstance(item, list) else [item])]
            value = [str(entry) if type(entry) in (str, int, float) else entry for entry in flat if entry != ""]
        settings[name] = _convert(value, kinds[name], f"{source}: {written}")
    return override(base, settings)


def _describe_unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    if any(other.startswith(f"{name}.") for other in known):
        meant = f"; did you mean {flag_of(SYNONYMS[name])}?" if SYNONYMS.get(name) in known else ""
        return f"{name} is a section: write --{name}.KEY or, in a file, [{name}] and its keys below it{meant}"
    return f"unknown setting {flag_of(name)}; {_suggest(name, known)}"


def _suggest(name: str, known: Iterable[str]) -> str:
    """Return the advice for a name that is no setting: the setting of this key, or of this meaning, or the most similar one."""
    key = name[:100].rpartition(".")[2]
    by_key = {setting.rpartition(".")[2]: setting for setting in reversed(list(known))}  # the first section wins
    meant = [setting for setting in (by_key.get(key, ""), SYNONYMS.get(key, "")) if setting in by_key.values()]
    meant += difflib.get_close_matches(name[:100], known, n=1)
    meant += [by_key[close] for close in difflib.get_close_matches(key, by_key, n=1)]
    return f"did you mean {flag_of(meant[0])}?" if meant else "--help lists the settings"


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Return a value as a setting of the type `kind`; raises ConfigError if it has another type."""
    is_list, item = _item_type(kind)
    items = value if is_list and isinstance(value, list) else [value]
    items = [float(entry) if item is float and type(entry) is int and abs(entry) < 2**64 else entry for entry in items]
    if is_list != isinstance(value, list) or any(type(entry) is not item for entry in items):
        name = TYPE_NAMES.get(item, "")
        expected = f"a list of {name}s" if is_list else f"a {name}" if name else "true or false"
        wrong = [entry for entry in items if type(entry) is not item] if is_list == isinstance(value, list) else [value]
        raise ConfigError(f"{where} must be {expected}, not {format_value(wrong[0])}")
    return tuple(items) if is_list else items[0]


def _item_type(kind: Any) -> tuple[bool, type]:
    """Return whether the type of a setting is a tuple, and the plain type of its items or of its value."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    is_list = get_origin(kind) is tuple
    item = get_args(kind)[0] if is_list else kind
    return is_list, type(get_args(item)[0]) if get_origin(item) is Literal else item
