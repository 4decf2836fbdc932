"""MkDocs hooks of the documentation: reference tables made from the package, and drawings placed inline.

A page holds a marker where generated text goes:

    <!-- settings -->        the settings of a training run, from the dataclasses of mpilm/config/schema.py
    <!-- presets -->         the named configs of mpilm/config/presets.py
    <!-- help COMMAND -->    the output of python -m mpilm.COMMAND --help
    <!-- quickstart -->      the output of scripts/quickstart that README.md shows
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mpilm, also where it is not installed

OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages beside docs/
TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def on_files(files, config):  # type: ignore[no-untyped-def]
    """Add the pages that lie outside docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text().replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace markers by generated text, and adapt links to the pages outside docs/."""
    markdown = re.sub(rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(OUTSIDE)}))", r"](\1", markdown)
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", "\n".join(settings_tables()))
    if "<!-- presets -->" in markdown:
        markdown = markdown.replace("<!-- presets -->", "\n".join(presets_table()))
    if "<!-- quickstart -->" in markdown:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
        output = next(block for language, block in blocks if not language)
        markdown = markdown.replace("<!-- quickstart -->", f"```text\n{output}```")
    return re.sub("<!-- help (.*) -->", lambda match: help_block(match[1]), markdown)


def on_page_content(html: str, page: Any, config: Any, **_: Any) -> str:
    """Replace images of drawings by the drawings, whose colours then follow the theme, and keep short code on one line."""
    html = re.sub(r'<img alt="([^"]*)" src="[^"]*drawings/([\w-]+)\.svg"\s*/?>', inline_drawing, html)
    return re.sub(r"<code>([^<>\n]{1,36})</code>", r'<code class="short">\1</code>', html)


def inline_drawing(match: re.Match[str]) -> str:
    alt, name = match.groups()
    svg = (ROOT / "docs" / "drawings" / f"{name}.svg").read_text()
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.S)
    width = int(re.findall(r'width="(\d+)"', svg)[0])
    style = f"min-width: {0.75 * width:.0f}px; max-width: {width}px"  # wider drawings scroll sideways
    svg = re.sub(r'width="\d+" height="\d+"', f'style="{style}" aria-label="{alt}"', svg, count=1)
    return f'<span class="drawing" data-search-exclude>{svg}</span>'


def settings_tables() -> Iterator[str]:
    """Yield the table of each section of a training run's settings."""
    from mpilm.config.help import field_comments
    from mpilm.config.schema import Config

    for section in fields(Config):
        cls = get_type_hints(Config)[section.name]
        yield from (f"## {section.name}", "", cls.__doc__ or "", "", '<div class="settings" markdown>', "")
        yield from ("| setting | values | default | meaning |", "|---|---|---|---|")
        helps, types = field_comments(cls), get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            flag, values = f"{section.name}.{field.name.replace('_', '-')}", describe_type(types[field.name])
            text = helps[field.name].replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
            yield f"| `--{flag}` | {values} | `{format_default(field.default)}` | {text} |"
        yield from ("", "</div>", "")


def describe_type(kind: Any) -> str:
    """Return the values that a setting may have."""
    if get_origin(kind) is Annotated:
        base, *metadata = get_args(kind)
        return ", ".join([describe_type(base), *(item.text for item in metadata if hasattr(item, "text"))])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list: {describe_type(get_args(kind)[0])}"
    return TYPE_NAMES[kind]


def format_default(value: Any) -> str:
    """Return a default as it is written on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) or "(empty)" if isinstance(value, tuple) else str(value) or "(empty)"


def presets_table() -> Iterator[str]:
    """Yield a table of the named configs."""
    from mpilm.config.presets import PRESETS, VOCABULARIES
    from mpilm.config.schema import resolve_config
    from mpilm.model.flops import parameter_count

    yield from (
        "| `--preset` | architecture | blocks | width | heads | context | sequences a step | parameters |",
        "|---|" + "--:|" * 7,
    )
    for name, make in PRESETS.items():
        config = resolve_config(make())
        model, count = config.model, parameter_count(config.model, VOCABULARIES.get(name, 2048))
        size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"
        cells = (
            model.arch,
            model.n_layers,
            model.d_model,
            model.n_heads,
            model.context_length,
            config.train.global_batch,
            size,
        )
        yield f"| `{name}` | " + " | ".join(map(str, cells)) + " |"


def help_block(command: str) -> str:
    """Return the output of --help as a block that the reader opens."""
    text = "\n".join(f"    {line}".rstrip() for line in help_texts()[command].splitlines())
    return f'??? quote "python -m mpilm.{command} --help"\n\n    ```text\n{text}\n    ```\n'


@lru_cache(maxsize=1)
def help_texts() -> dict[str, str]:
    """Run every command with --help, several at a time."""
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}

    def run(command: str) -> str:
        words = [sys.executable, "-m", f"mpilm.{command}", "--help"]
        text = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
        return text.replace(f"{ROOT}/mpilm/", "")  # of the manual

    from mpilm.__main__ import COMMANDS

    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        return dict(zip(COMMANDS, pool.map(run, COMMANDS)))
