"""The chat template of a tokenizer: messages to the text that the model was made for, as Hugging Face's libraries render it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from mpilm.data.files import read_object, touching
from mpilm.errors import DataError

ANSWERING = "assistant"


class Template:
    """`source`: a Jinja template; it comes from a stranger and runs in a sandbox. `words`: special tokens that it may use."""

    def __init__(self, source: str, words: Mapping[str, str], where: str):
        self.source, self.words, self.where = source, dict(words), where

    @cached_property
    def _template(self) -> Any:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.source)  # marks what is learnt, and prints nothing
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"{self.where}: its chat template cannot be read: {error}") from None

    def parts(self, messages: Sequence[Mapping[str, str]], place: str) -> list[tuple[str, bool]]:
        """The text of messages in parts, and which are answers: what stands from the place where the model is to begin to the
        end of its turn. Raises DataError naming `place`."""
        parts: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] == ANSWERING:
                prompt, turn = self._render(messages[:i], place, True), self._render(messages[: i + 1], place, False)
                if not (prompt.startswith(done) and turn.startswith(prompt)):
                    raise DataError(
                        f"{place}: the chat template of {self.where} changes what came before when message {i + 1} is added, "
                        "so its answers cannot be told from the rest"
                    )
                parts += [(prompt[len(done) :], False), (turn[len(prompt) :], True)]
                done = turn
        if not parts:
            raise DataError(f'{place}: no message has the role "{ANSWERING}", so there is nothing to learn')
        return parts

    def prompt(self, said: str) -> str:
        """What a model reads that is to answer a user."""
        return self._render([{"role": "user", "content": said}], "the prompt", True)

    def _render(self, messages: Sequence[Mapping[str, str]], place: str, begin: bool) -> str:
        template = self._template
        try:
            return template.render(messages=list(messages), add_generation_prompt=begin, **self.words)
        except Exception as error:  # a stranger's template may raise anything
            raise DataError(f"{place}: the chat template of {self.where} refuses it: {error}") from None


def _raise(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def find_template(tokenizer: str | Path) -> Template | None:
    """The chat template beside a tokenizer.json, in tokenizer_config.json or a file of its own; None where there is none."""
    path = Path(tokenizer).expanduser()
    folder = path if path.is_dir() else path.parent
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    values = read_object(config) if config.is_file() else {}
    source = values.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((of.get("template") for of in source if isinstance(of, dict) and of.get("name") == "default"), None)
    if file.is_file():
        with touching(file):
            source = file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    words = {name: _word(values[name]) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if values.get(name)}
    return Template(source, words, str(folder))


def _word(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
