"""A small corpus made here, and a tiny run over it: no stored curve may depend on what a machine has installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpilm.comm.base import SelfComm
from mpilm.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    resolve_config,
)
from mpilm.config.settings import override
from mpilm.data.corpus import Corpus
from mpilm.data.prepare import prepare_tokens
from mpilm.data.tokenizer import bytes_tokenizer

SYLLABLES = ("ba", "re", "mi", "no", "tu", "ska", "el", "or", "in", "thé", "qu", "ax")


def make_text(sentences: int = 600) -> str:
    """Return sentences of invented words, drawn by a linear congruential generator."""
    state = 12345

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % below

    words = ["".join(SYLLABLES[draw(len(SYLLABLES))] for _ in range(1 + draw(3))) for _ in range(40)]
    lines = (" ".join(words[min(draw(40), draw(40))] for _ in range(3 + draw(6))).capitalize() for _ in range(sentences))
    return "".join(f"{line}.\n" for line in lines)


def write_text(folder: Path) -> Path:
    """Write a text file of about 20 kB; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


def write_tokens(folder: Path) -> Path:
    """Write the same as prepared tokens of single bytes; return the prefix of their files."""
    prepare_tokens(DataConfig(path=(str(write_text(folder)),), tokenizer="bytes"), folder / "tokens", SelfComm())
    return folder / "tokens"


def corpus_of(tokens: Any) -> Corpus:
    """Return a corpus of these byte ids."""
    return Corpus(np.asarray(tokens), bytes_tokenizer(), "f", 1, "x", Path("x.bin"), 1.0)


TINY = Config(
    model=ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, context_length=16, dropout=0.1),
    data=DataConfig(tokenizer="bytes"),
    train=TrainConfig(steps=6, global_batch=16, micro_batch=2, warmup_steps=2, threads=1, device="cpu"),
    checkpoint=CheckpointConfig(every=0),
    run=RunConfig(log_every=1, eval_every=3, eval_batches=1),
    generate=GenerateConfig(max_tokens=0),
)
"""8 microbatches a step, some thirty thousand parameters, dropout on."""


def tiny_config(data: Path | tuple[str, ...], run: Path, **changes: Any) -> Config:
    """Return a run of a second over `data` (a path, or paths and shares) in the folder `run`; changes are section__key."""
    paths = data if isinstance(data, tuple) else (str(data),)
    return resolve_config(override(TINY, data__path=paths, run__dir=str(run), **changes))
