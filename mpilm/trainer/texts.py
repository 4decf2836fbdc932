"""The texts that the generate command prints: prompts in, shared out over the ranks, and out in their order."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mpilm.comm.base import Comm
from mpilm.comm.together import on_root, together
from mpilm.config import Config, Generate
from mpilm.data.files import touching, writable
from mpilm.data.template import Template, find_template
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import ConfigError, DataError
from mpilm.telemetry.display import Counter
from mpilm.trainer.folder import configured, open_folder, tokenizer_of
from mpilm.trainer.write import write


def print_texts(config: Config, world: Comm) -> None:
    """Print the prompt and what follows it; of many prompts, a JSON object each: prompt, text. Collective."""
    config = together(world, lambda: configured(config))
    together(world, lambda: _refuse_encoder(config))
    settings = config.generate
    tokenizer = together(world, lambda: tokenizer_of(config.data, config.model))
    template = together(world, lambda: _template(config)) if settings.chat else None
    prompts: list[str] = world.broadcast_json(on_root(world, lambda: _prompts(settings)))
    opened = open_folder(config, world)
    model = opened.model
    own = range(model.data.rank, len(prompts), model.data.size)
    mine = together(world, lambda: {n: _tokens(prompts[n], tokenizer, template) for n in own})
    written = write(model, mine, settings, tokenizer.eos, Counter("texts", len(mine), world.rank == 0 and len(prompts) > 1))
    texts = {n: tokenizer.decode(tokens) for n, tokens in written.items()} if model.pipeline.rank == 0 else {}
    everyone = world.all_gather_json([[n, text] for n, text in texts.items()])
    if world.rank == 0:
        _print(
            prompts,
            [text for _, text in sorted(pair for theirs in everyone for pair in theirs)],
            bool(settings.prompts),
            settings.chat,
        )


def _refuse_encoder(config: Config) -> None:
    if config.model.arch == "bert":
        raise ConfigError(f"{config.model.init_from} is a bert model: it fills masks, and cannot go on with a text")


def _prompts(settings: Generate) -> list[str]:
    if not settings.prompts:
        return [settings.prompt]
    if settings.prompt:
        raise ConfigError("--generate.prompt and --generate.prompts: one of the two")
    where = "standard input" if settings.prompts == "-" else settings.prompts
    if settings.prompts == "-":
        data = sys.stdin.buffer.read()
    else:
        path = Path(settings.prompts).expanduser()
        with touching(path):
            data = path.read_bytes()
    try:
        lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"--generate.prompts {where}: byte {error.start} is not UTF-8") from None
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise DataError(f"--generate.prompts {where}: holds no prompts")
    if not where.endswith(".jsonl"):
        return lines
    return [_field(line, f"{where}: line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _field(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--generate.prompts {where} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise DataError(f'--generate.prompts {where} is not an object with a "prompt" that is a string')
    if not writable(value["prompt"]):
        raise DataError(f"--generate.prompts {where} holds half a surrogate pair, which is no text")
    return value["prompt"]


def _template(config: Config) -> Template:
    found = find_template(config.data.tokenizer)
    if found is None:
        raise ConfigError(f"--generate.chat true: there is no chat template beside the tokenizer in {config.data.tokenizer}")
    return found


def _tokens(prompt: str, tokenizer: Tokenizer, template: Template | None) -> list[int]:
    if template is not None:
        return tokenizer.encode_marked(template.prompt(prompt))[0].tolist()
    return tokenizer.encode(prompt).tolist() or [tokenizer.eos]


def _print(prompts: Sequence[str], texts: Sequence[str], as_json: bool, chat: bool) -> None:
    for prompt, text in zip(prompts, texts, strict=True):
        print(
            json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if as_json else (text if chat else prompt + text)
        )
    sys.stdout.flush()
