"""Write text with a trained model.

python -m mpilm.generate --model.init-from runs/NAME/checkpoints/step-00000240 --generate.prompt "def main("
mpirun -n 4 python -m mpilm.generate --model.init-from FOLDER --generate.prompts prompts.txt > texts.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from mpilm.cli import parse
from mpilm.comm.base import Comm
from mpilm.config import Generate
from mpilm.launch.run import Body, run
from mpilm.usage import Compute, Folder, Stages, used

DESCRIPTION = (
    "Write text with a model: a checkpoint of mpilm or a Hugging Face folder of a Llama, GPT-2, Qwen or Mixtral model. Many "
    "prompts are shared out over the ranks; no text depends on how many there are."
)


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of the generate command."""

    model: Folder = field(default_factory=Folder)
    generate: Generate = field(default_factory=Generate)
    parallel: Stages = field(default_factory=Stages)
    train: Compute = field(default_factory=Compute)


def prepare() -> Body:
    asked = parse(sys.argv[1:], GenerateConfig(), "generate", DESCRIPTION)
    config = used(asked.model, asked.parallel, asked.train, generate=asked.generate)

    def body(comm: Comm) -> None:
        from mpilm.inference.generate import generate_texts

        generate_texts(config, comm)

    return body


if __name__ == "__main__":
    run(prepare)
