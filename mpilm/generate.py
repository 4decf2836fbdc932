"""Write text with a trained model.

python -m mpilm.generate --model.init-from runs/NAME/checkpoints/step-00000240 --generate.prompt "def main("
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from mpilm.cli import parse
from mpilm.config import Generate
from mpilm.errors import ConfigError
from mpilm.guard.launch import Body, run

DESCRIPTION = "Write text with a model: a checkpoint of mpilm or a Hugging Face folder of a Llama model."


@dataclass(frozen=True)
class Source:
    """The model to use."""

    init_from: str = ""
    """A checkpoint, or a Hugging Face folder with config.json, *.safetensors and tokenizer.json."""


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of the generate command."""

    model: Source = field(default_factory=Source)
    generate: Generate = field(default_factory=Generate)


def prepare() -> Body:
    config = parse(sys.argv[1:], GenerateConfig(), "generate", DESCRIPTION)
    if not config.model.init_from:
        raise ConfigError("--model.init-from is needed: the folder of a checkpoint, RUN/checkpoints/step-NNNNNNNN")

    def body(comm) -> None:  # type: ignore[no-untyped-def]
        from mpilm.trainer.write import write

        write(config.model.init_from, config.generate, comm)

    return body


if __name__ == "__main__":
    run(prepare)
