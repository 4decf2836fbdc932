"""The text of --help: the settings that most people use, examples, and all settings by section."""

import inspect
import io
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mpilm.config.settings import flag_of, flatten
from mpilm.formatting import command_text

MANUAL = Path(__file__).parents[1] / "docs"  # in the wheel and, by a link, in the repository


def draw_help(config: Any, command: str, description: str, sources: str, common: Sequence[str]) -> str:
    """Return the help text of a command whose settings have the values of `config`. `description` is its docstring, whose lines
    that begin with $ are examples; `sources` says where settings come from; `common`: settings to begin with."""
    import tyro

    output, columns = io.StringIO(), max(20, shutil.get_terminal_size().columns)
    os.environ["COLUMNS"] = str(columns)  # in fewer, tyro never ends
    options = (tyro.conf.FlagConversionOff,)  # every setting is `--section.key value`, booleans too
    with redirect_stdout(output), suppress(SystemExit):
        tyro.cli(type(config), args=["--help"], default=config, prog=command_text(command), description=" ", config=options)
    usage, _, settings = output.getvalue().partition("\n")
    examples = [line for line in description.splitlines() if line.startswith("$ ")]
    paragraphs = "\n".join(line for line in description.strip().splitlines() if line not in examples).strip().split("\n\n")
    lines = [usage, "", *(line for paragraph in paragraphs for line in (*_wrap(paragraph, columns), ""))]
    if common:
        lines += ["The settings that most people use:", "", *_describe_common(config, common, columns), ""]
    lines += ["Examples:", "", *(f"  {example}" for example in examples), "", *_wrap(sources, columns)]
    lines += [f"Manual: {MANUAL / 'reference' / 'commands.md'}", ""]
    text = re.sub(r"\b(True|False)\b", lambda match: match[0].lower(), "\n".join([*lines, settings.strip("\n"), ""]))
    return text.replace("python -m mpilm.", command_text(""))


def _describe_common(config: Any, names: Sequence[str], columns: int) -> Iterator[str]:
    """Yield the lines about settings: flag, default, and the first sentence of the comment in the schema."""
    values = flatten(config)
    for name in names:
        section, _, key = name.partition(".")
        sentence = field_comments(type(getattr(config, section)))[key].partition(". ")[0].rstrip(".")
        default = " ".join(map(str, values[name])) if isinstance(values[name], tuple) else str(values[name])
        yield f"  {flag_of(name)} VALUE"
        text = f"{sentence}. (default: {default})" if default else f"{sentence}."
        yield from _wrap(text, columns, " " * 8)


def _wrap(text: str, columns: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def field_comments(cls: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass, or the lines of comment above it."""
    found, above = dict[str, str](), list[str]()
    for line in inspect.getsource(cls).splitlines():
        match = re.match(r"    (\w+): [^#]*?(?:# (.*))?$", line)
        if match:
            found[match[1]] = match[2] or " ".join(above)
        above = [*above, line.strip()[2:]] if line.strip().startswith("# ") else []
    return found
