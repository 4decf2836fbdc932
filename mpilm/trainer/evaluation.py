"""The evaluate command: a text, a model from a folder, and what comes out, printed and written down."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpilm.checkpoint.format import read_json, step_of
from mpilm.comm.base import Comm
from mpilm.comm.together import on_root, together
from mpilm.config import Config, Data
from mpilm.data.corpus import Corpus, open_corpus
from mpilm.data.files import touching, write_durably
from mpilm.data.indexed import document_starts, prefix_of
from mpilm.data.objective import Masked, Objective, objective_of
from mpilm.data.prepare import silent
from mpilm.data.progress import ProgressLine
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import ConfigError, DataError, NonFiniteError
from mpilm.settings import merge
from mpilm.trainer.folder import configured, open_folder, tokenizer_of
from mpilm.trainer.score import Windows, by_document, score, summary, windows


@dataclass(frozen=True)
class Asked:
    """`documents`: score each by itself and write the scores down; `held_out`: only what the run has held out;
    `context_length`: 0, the model's; `run_dir`: where the results go, auto: the run of the checkpoint."""

    documents: bool
    held_out: bool
    context_length: int
    run_dir: str


def evaluate(config: Config, asked: Asked, world: Comm) -> None:
    """Score the text and print and write what comes out. Collective."""
    config, data = together(world, lambda: _configured(config, asked))
    tokenizer = together(world, lambda: tokenizer_of(config.data, config.model))
    opened = open_folder(config, world)
    waiting = world.with_options(gpu_aware=False, patient=True)
    corpus = open_corpus(data, waiting, eos=asked.held_out, progress=ProgressLine() if world.rank == 0 else silent)
    together(world, lambda: _refuse_other_tokens(corpus, tokenizer, config))
    together(world, lambda: _refuse_other_text(corpus, config, asked))
    objective = objective_of(config.model, config.data, tokenizer)
    together(world, lambda: _refuse_without_mask(config, objective))
    segments = together(world, lambda: _segments(data, asked, corpus))
    pieces = windows(segments, config.model.context_length, objective.looks_ahead)
    together(world, lambda: _refuse_nothing(pieces, corpus))
    table = score(opened.model, corpus, pieces, objective, config.train.micro_batch, world.rank == 0)
    on_root(world, lambda: _tell(config, asked, corpus, segments, pieces, table))


def _configured(config: Config, asked: Asked) -> tuple[Config, Data]:
    """The config, with the folder's tokenizer unless another one is asked for; and what is to be opened."""
    other = [key for key in ("format", "packing", "too_long") if getattr(config.data, key) != getattr(Data(), key)]
    if other:
        raise ConfigError(f"--data.{other[0].replace('_', '-')} is for training; evaluate reads running text, window by window")
    if not asked.held_out:
        found = configured(config, asked.context_length)
        prepared = config.data.source and prefix_of(config.data.source)  # says itself what it was made with
        return found, config.data if prepared else found.data
    folder = Path(config.model.init_from).expanduser()
    if config.data != Data():
        raise ConfigError("--held-out true scores what the run has held out of its own text; leave the --data settings out")
    config = configured(config, asked.context_length)
    if not (folder / "trainer.json").is_file():
        raise ConfigError(f"--held-out true: {folder} is no checkpoint of a run, so nothing was held out")
    data = merge(Data(), read_json(folder / "trainer.json")["config"]["data"], str(folder / "trainer.json"))
    if data.format == "chat":
        raise ConfigError("--held-out true: the run has learnt from conversations, and only running text can be scored")
    if len(data.path) > 1:
        raise ConfigError("--held-out true: the run has mixed several corpora; score each with --data.path")
    if not data.eval_fraction:
        raise ConfigError("--held-out true: the run has held out nothing (its data.eval-fraction is 0)")
    return config, data


def _refuse_without_mask(config: Config, objective: Objective) -> None:
    if isinstance(objective, Masked) and objective.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(f"--data.tokenizer {config.data.tokenizer} has no [MASK] token, and a bert model needs one")


def _refuse_other_tokens(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> None:
    if corpus.tokenizer.with_mask().digest != tokenizer.with_mask().digest:
        raise ConfigError(
            f"--data.path {corpus.source} was made into tokens with another tokenizer than that of {config.model.init_from}; "
            "give the text itself"
        )


def _refuse_other_text(corpus: Corpus, config: Config, asked: Asked) -> None:
    if asked.held_out:
        trainer = read_json(Path(config.model.init_from).expanduser() / "trainer.json")
        if trainer["content"]["data.path"] != corpus.fingerprint:
            raise ConfigError(f"--held-out true: {corpus.source} is no longer the text that the run was trained on")


def _segments(data: Data, asked: Asked, corpus: Corpus) -> np.ndarray:
    total = len(corpus.tokens)
    first = total - int(total * data.eval_fraction) if asked.held_out else 0
    if not asked.documents:
        return np.array([first, total])
    starts = document_starts(corpus.path)
    return np.concatenate([[first], starts[starts > first]])


def _refuse_nothing(pieces: Windows, corpus: Corpus) -> None:
    if not len(pieces):
        raise DataError(f"--data.path {corpus.source}: {len(corpus.tokens)} tokens are too few: nothing can be predicted")


def _tell(config: Config, asked: Asked, corpus: Corpus, segments: np.ndarray, pieces: Windows, table: np.ndarray) -> None:
    read = int(segments[-1] - segments[0])
    result = summary(table, read, corpus.bytes_per_token * read, config.model.arch == "bert")
    if not math.isfinite(result["loss"]):
        raise NonFiniteError(f"the loss is {result['loss']}: weights in {config.model.init_from} are not finite")
    folder = _folder(config.model.init_from, asked.run_dir)
    with touching(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "evaluation.json", (json.dumps(result, indent=2) + "\n").encode())
    print(
        "\n".join(
            f"{name:<16}{value:,}" if isinstance(value, int) else f"{name:<16}{value:.8g}" for name, value in result.items()
        )
    )
    print(f"written to      {folder / 'evaluation.json'}")
    if asked.documents:
        lines = (json.dumps(row) + "\n" for row in by_document(segments, pieces, table))
        write_durably(folder / "documents.jsonl", "".join(lines).encode())
        print(f"documents       {folder / 'documents.jsonl'}", flush=True)


def _folder(init_from: str, run_dir: str) -> Path:
    """The run that the checkpoint belongs to, or a folder for the results of models from elsewhere."""
    if run_dir != "auto":
        return Path(run_dir)
    model = Path(init_from).expanduser().resolve()
    if step_of(model) is not None and (model.parents[1] / "config.toml").is_file():
        return Path(os.path.relpath(model.parents[1]))
    return Path("runs") / f"evaluation-{model.name}"
