"""Score a text with a trained model: loss, perplexity, bits per byte.

python -m mpilm.evaluate --model.init-from runs/NAME/checkpoints/step-00000240 --data.path book.txt
mpirun -n 4 python -m mpilm.evaluate --model.init-from FOLDER --data.path books/ --documents true
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from mpilm.cli import parse
from mpilm.comm.base import Comm
from mpilm.config import Data
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run
from mpilm.usage import Compute, Folder, Stages, used

DESCRIPTION = (
    "Score a text with a model: a checkpoint of mpilm or a Hugging Face folder. The whole text is read in windows of the "
    "context length that do not overlap, and every token but the first is predicted once; a bert model predicts masked tokens. "
    "The work is shared out over the ranks, and the result does not depend on how many there are."
)


@dataclass(frozen=True)
class Scored(Folder):
    """The model to use."""

    context_length: int = 0
    """Tokens of a window; 0: as many as the model was made for."""


@dataclass(frozen=True)
class Scoring(Compute):
    """How it is computed."""

    micro_batch: int = 4
    """Windows computed at once; a larger number may be faster, and changes the last digits."""


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    dir: str = "auto"
    """Folder of evaluation.json; auto: the run folder of the checkpoint, or runs/evaluation-NAME."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluate command."""

    model: Scored = field(default_factory=Scored)
    data: Data = field(default_factory=Data)
    parallel: Stages = field(default_factory=Stages)
    train: Scoring = field(default_factory=Scoring)
    run: Output = field(default_factory=Output)
    documents: bool = False
    """Score each document by itself, and write the scores to documents.jsonl."""
    held_out: bool = False
    """Score what the run of the checkpoint has held out of its own text, all of it."""


def prepare() -> Body:
    asked = parse(sys.argv[1:], EvaluateConfig(), "evaluate", DESCRIPTION)
    if asked.model.context_length < 0:
        raise ConfigError(f"--model.context-length must not be negative, but is {asked.model.context_length}")
    config = used(asked.model, asked.parallel, asked.train, data=asked.data)

    def body(comm: Comm) -> None:
        from mpilm.inference.evaluate import EvaluateOptions, evaluate_model

        more = EvaluateOptions(asked.documents, asked.held_out, asked.model.context_length, asked.run.dir)
        evaluate_model(config, more, comm)

    return body


if __name__ == "__main__":
    run(prepare)
