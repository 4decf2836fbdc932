"""From the words of a command line to a config: preset, then TOML file, then flags; later wins."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from mpilm.config import Config, Model, flatten, to_dict
from mpilm.data.files import writable
from mpilm.errors import ConfigError, UserError
from mpilm.settings import merge, read_toml
from mpilm.validation import validate

T = TypeVar("T")


def parse(
    argv: Sequence[str], default: T, prog: str, description: str, presets: Mapping[str, Callable[[], T]] | None = None
) -> T:
    """The validated config that `argv` asks for, of the type of `default`. No communication.

    Raises ConfigError for what cannot work, and SystemExit(text, code) for --help and for flags that cannot be read, so
    that the caller prints the text once and not once a rank.
    """
    _refuse_broken(argv)
    words, files = _take(list(argv), "--config")
    words, names = _take(words, "--preset") if presets else (words, [])
    config = default
    for name in names:
        if presets is None or name not in presets:
            raise ConfigError(f"--preset {name}: there is none of that name; there are {', '.join(presets or ())}")
        config = presets[name]()
    values = [(read_toml(path, f"--config {path}"), f"--config {path}") for path in files]
    config = _start(words, config, [toml for toml, _ in values])
    for toml, source in values:
        config = merge(config, _concerning(config, toml), source)
    config = _flags(words, config, f"python -m mpilm.{prog}", description + _shared_options(presets))
    _refuse_other_shape(config)
    validate(config)
    return config


def _concerning(config: Any, toml: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says to this command: the config of a run may be given to any, and what only others know is left out."""
    train, mine = to_dict(Config()), to_dict(config)
    found: dict[str, Any] = {}
    for raw, value in toml.items():
        key = raw.replace("-", "_")
        if key in train and key not in mine:
            continue
        if isinstance(value, Mapping) and isinstance(train.get(key), dict) and isinstance(mine.get(key), dict):
            value = {name: v for name, v in value.items() if name.replace("-", "_") not in train[key].keys() - mine[key].keys()}
        found[raw] = value
    return found


def _start(words: list[str], config: T, tomls: Sequence[Mapping[str, Any]]) -> T:
    """The config with the shape of the model that it is to start from, if words or files name one."""
    model = getattr(config, "model", None)
    if not isinstance(model, Model):
        return config
    said = [toml["model"] for toml in tomls if isinstance(toml.get("model"), Mapping)]
    named = [str(value) for section in said for key, value in section.items() if key.replace("-", "_") == "init_from"]
    for spelled in ("--model.init-from", "--model.init_from"):
        named += _take(words, spelled)[1]
    if not named or not named[-1]:
        return config
    from mpilm.checkpoint.pretrained import started

    bases = [str(section["base"]) for section in said if "base" in section] + _take(words, "--model.base")[1]
    model = replace(model, base=bases[-1]) if bases else model
    return replace(config, model=started(model, named[-1]))  # type: ignore[type-var]


def _refuse_other_shape(config: Any) -> None:
    model = getattr(config, "model", None)
    if isinstance(model, Model) and model.init_from:
        from mpilm.checkpoint.pretrained import refuse_other_shape

        refuse_other_shape(model)


def _refuse_broken(argv: Sequence[str]) -> None:
    """Words that are not UTF-8 could not be written down again."""
    for number, word in enumerate(argv):
        if not writable(word):
            flag = next((before for before in reversed(argv[:number]) if before.startswith("--")), "") if number else ""
            raise ConfigError(f"{flag or 'the command line'}: {word!a} is not UTF-8 text")


def run_alone(prepare: Callable[[], Callable[[], None]]) -> NoReturn:
    """Run a command that needs no other rank, nor MPI, and exit. `prepare` parses and returns what is to be done."""
    code = 0
    try:
        prepare()()
        sys.stdout.flush()
    except UserError as error:
        print(f"mpilm: error: {error}", file=sys.stderr)
        code = error.code
    except SystemExit as stop:
        if len(stop.args) != 2:
            raise
        text, code = stop.args  # of parse
        print(text, end="", file=sys.stderr if code else sys.stdout)
    except BrokenPipeError:
        os._exit(141)  # whoever read the output has gone, as in `| head`; flushing at exit would raise again
    sys.exit(code)


def _take(words: list[str], flag: str) -> tuple[list[str], list[str]]:
    """The words without `flag` and its values, and the values."""
    rest: list[str] = []
    values: list[str] = []
    queue = iter(words)
    for word in queue:
        if word == flag:
            value = next(queue, None)
            if value is None:
                raise ConfigError(f"{flag} needs a value")
            values.append(value)
        elif word.startswith(flag + "="):
            values.append(word.removeprefix(flag + "="))
        else:
            rest.append(word)
    return rest, values


def _shared_options(presets: Mapping[str, Any] | None) -> str:
    text = "\n\nAlso: --config FILE.toml (settings from a file)"
    if presets:
        text += f", --preset {{{','.join(presets)}}} (a named set of settings to start from)"
    return text + f". Order: {'preset, ' * bool(presets)}file, flags; later wins."


def _booleans(words: list[str], default: Any) -> list[str]:
    """true and false as Python spells them; a flag alone stands for true. Raises ConfigError for another word."""
    flags = {f"--{name.replace('_', '-')}" for name, value in flatten(default).items() if isinstance(value, bool)}
    words = [
        part for word in words for part in (word.split("=", 1) if word.split("=")[0].replace("_", "-") in flags else [word])
    ]
    spelled: list[str] = []
    for i, word in enumerate(words):
        previous_is_flag = i > 0 and words[i - 1].replace("_", "-") in flags
        if previous_is_flag and not word.startswith("--") and word.lower() not in ("true", "false"):
            raise ConfigError(f"{words[i - 1]} {word}: write true or false")
        spelled.append(word.capitalize() if previous_is_flag and word.lower() in ("true", "false") else word)
        if word.replace("_", "-") in flags and "".join(words[i + 1 : i + 2]).lower() not in ("true", "false"):
            spelled.append("True")
    return spelled


def _lists(words: list[str], default: Any) -> list[str]:
    """The items of a list setting apart, where they were written with commas."""
    flags = {f"--{name.replace('_', '-')}" for name, value in flatten(default).items() if isinstance(value, tuple)}
    apart: list[str] = []
    inside = False
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            inside = flag.replace("_", "-") in flags - {"--data.path"}  # in a path a comma is a comma
            apart += [flag, *value.split(",")] if inside and equals else [word]
        else:
            apart += [part for part in word.split(",") if part] if inside else [word]
    return apart


def _flags(words: list[str], default: T, prog: str, description: str) -> T:
    import tyro

    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            return tyro.cli(
                type(default),
                args=_lists(_booleans(words, default), default),
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.FlagConversionOff,),  # every setting is `--section.key value`, booleans too
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_plain(printed.getvalue())) from None
        raise SystemExit(printed.getvalue(), 0) from None


def _plain(drawn: str) -> str:
    """The words of a message that was drawn in a box with rules: a title, what is wrong, help, where there is more."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()]
    parts = " ".join("\0" if re.fullmatch("[-─]{5,}", line) else line.strip("─ ") for line in lines).split("\0")
    said = [" ".join(part.split()) for part in parts[1:]]
    return "; ".join(part for part in said if part and not part.startswith("Argument helptext"))
