"""Evaluation of a model on a text: every token is scored once, window by window, whatever the number of ranks."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpilm.checkpoint.format import checkpoint_step, read_trainer
from mpilm.checkpoint.pretrained import locate_model
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.config.parse import merge_settings
from mpilm.config.schema import QWEN_STYLE, Config, DataConfig
from mpilm.config.settings import flag_of
from mpilm.data.batch import Batch
from mpilm.data.corpus import Corpus, open_corpus
from mpilm.data.files import file_errors, read_json, write_durably
from mpilm.data.objective import Objective, make_objective
from mpilm.data.order import mix_key
from mpilm.data.token_files import document_starts, find_prefix
from mpilm.data.tokenizer import Tokenizer, fit_to_model, tokenizer_from_spec
from mpilm.engine.pipelined import PipelinedModel
from mpilm.errors import ConfigError, DataError, NonFiniteError
from mpilm.formatting import ProgressLine
from mpilm.inference.arguments import EvaluateArguments, to_config
from mpilm.inference.load import config_from_folder, load_model
from mpilm.kernels.base import IGNORE_INDEX
from mpilm.parallel.pipeline.stage import Logits
from mpilm.parallel.tensor import PartLogits

MASK_KEY = 0x6576616C  # masks are the same in every evaluation of a text


@dataclass(frozen=True)
class EvalWindows:
    """Windows of a text, read one by one. Causal windows share the token at which one ends and the next begins."""

    start: np.ndarray  # first token
    stop: np.ndarray  # the one after the last
    document: np.ndarray  # number of the document
    length: int  # tokens read in a window, at most


def cut_windows(segments: np.ndarray, length: int, causal: bool) -> EvalWindows:
    """Cut each segment [segments[i], segments[i + 1]) into windows of `length` read tokens, the last one shorter. A causal
    window has one token more, with which the next one begins; a window of one token predicts nothing."""
    starts = [np.arange(first, end - causal, length, dtype=np.int64) for first, end in pairwise(segments.tolist())]
    start, document = np.concatenate(starts), np.repeat(np.arange(len(starts)), [len(each) for each in starts])
    return EvalWindows(start, np.minimum(start + length + causal, segments[document + 1]), document, length)


def group_windows(sizes: np.ndarray, max_rows: int) -> list[tuple[int, int]]:
    """Return microbatches as ranges of windows: at most `max_rows` adjacent windows of one size."""
    ends = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    return [(at, min(at + max_rows, end)) for first, end in pairwise(ends) for at in range(first, end, max_rows)]


def row_scores(logits: Logits, batch: Batch) -> Tensor:
    """Return the sum of losses, correct predictions and targets of each row, for each sequence part, (S, B, 3) float64."""
    if isinstance(logits, PartLogits):
        losses, best = logits.losses(batch.targets), logits.argmax()
    else:
        flat, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
        losses, best = F.cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="none"), logits.argmax(dim=-1)
    correct = best == batch.targets
    counted = batch.targets != IGNORE_INDEX
    scores = torch.stack([losses.view_as(batch.targets).double(), correct.double(), counted.double()], dim=-1)  # (B, n, 3)
    return batch.place_parts([part.sum(dim=1) for part in batch.split_parts(scores)])


def score_windows(model: PipelinedModel, corpus: Corpus, windows: EvalWindows, objective: Objective) -> np.ndarray:
    """Return the scores of each window, (windows, 3), the same on all ranks. Collective."""
    groups = group_windows(windows.stop - windows.start, model.config.train.micro_batch)
    progress, done = ProgressLine("scoring", "batches", model.mesh.world.rank == 0), count()

    def fetch(m: int) -> Batch:
        progress(next(done), -(-len(groups) // model.replicas.size))
        numbers = np.arange(*groups[m])
        texts = np.stack([corpus.read(int(windows.start[n]), int(windows.stop[n])) for n in numbers])
        if not objective.is_causal:
            texts = np.pad(texts, ((0, 0), (0, 1)))  # an objective ignores the last token
        tokens, targets = objective(texts, [mix_key(MASK_KEY, n) for n in numbers.tolist()])
        return Batch.from_arrays(tokens=tokens, targets=targets, positions=np.arange(tokens.shape[1]), samples=numbers)

    table = torch.zeros(model.sequence.parts, len(windows.start), 3, dtype=torch.float64)
    for m, scores in model.forward(len(groups), fetch, row_scores).items():
        table[:, slice(*groups[m])] = scores.cpu()
    model.mesh.world.all_reduce(table)  # each row meets only zeros: exact
    return table.sum(dim=0).numpy()


def summarize_scores(table: np.ndarray, tokens: int, nbytes: float, masked: bool) -> dict[str, Any]:
    """Return the contents of evaluation.json from the scores of all windows, (windows, 3)."""
    loss, correct, targets = (math.fsum(column) for column in table.T.tolist())
    mean = loss / targets
    result = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    if not masked:  # the loss of some tokens does not give the bits of the whole text
        result["bits_per_byte"] = loss / math.log(2) / nbytes
    accuracy = {"masked_accuracy" if masked else "accuracy": correct / targets}
    return {**result, **accuracy, "tokens": tokens, "targets": int(targets)}


def score_documents(segments: np.ndarray, windows: EvalWindows, table: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield a row for each document, also for those too short to predict anything."""
    sums = np.zeros((len(segments) - 1, 3))
    np.add.at(sums, windows.document, table)
    for number, ((loss, correct, targets), tokens) in enumerate(zip(sums.tolist(), np.diff(segments).tolist())):
        scores = {"loss": loss / targets, "accuracy": correct / targets} if targets else {"loss": None, "accuracy": None}
        yield {"document": number, "tokens": tokens, "targets": int(targets), **scores}


def evaluate_model(arguments: EvaluateArguments, world: Comm) -> None:
    """Score a text, print the result and write it. Collective."""
    config, data = run_on_all_ranks(world, lambda: _resolve_inputs(arguments))
    spec = config.data.tokenizer
    tokenizer = run_on_all_ranks(world, lambda: fit_to_model(tokenizer_from_spec(spec, arguments.held_out), config.model))
    model = load_model(config, world)
    corpus = open_corpus(data, world.with_options(gpu_aware=False, yield_while_waiting=True), eos=arguments.held_out)
    objective = make_objective(config.model, config.data, tokenizer)
    run_on_all_ranks(world, lambda: _check_corpus(corpus, tokenizer, config, arguments.held_out))
    segments = run_on_all_ranks(world, lambda: _find_segments(data, arguments, corpus))
    windows = cut_windows(segments, config.model.context_length, objective.is_causal)
    if not windows.start.size:
        problem = f"{len(corpus.tokens)} tokens are too few to predict anything"
        raise CollectiveError(DataError(f"--data.path {corpus.source}: {problem}"))
    table = score_windows(model, corpus, windows, objective)
    run_on_root(world, lambda: _write_results(arguments, corpus, segments, windows, table, not objective.is_causal))


def _resolve_inputs(arguments: EvaluateArguments) -> tuple[Config, DataConfig]:
    """Return the config, with the folder's tokenizer unless another is named, and the data to open."""
    config = to_config(arguments.model, arguments.parallel, arguments.train, data=arguments.data)
    for key in ("format", "packing", "too_long"):
        if getattr(config.data, key) != getattr(DataConfig, key):
            raise ConfigError(f"{flag_of(f'data.{key}')} is for training; evaluate reads running text, window by window")
    if arguments.held_out and config.data != DataConfig():
        raise ConfigError("--held-out true scores what the run has held out of its own text; omit the --data settings")
    run = read_run_config(config.model.init_from)
    resolved = config_from_folder(config, arguments.model.context_length or (run.model.context_length if run else 0))
    if not arguments.held_out:
        is_prepared = config.data.source and find_prefix(config.data.source)  # prepared tokens name their tokenizer
        return resolved, config.data if is_prepared else resolved.data
    folder = config.model.init_from
    if run is None:
        raise ConfigError(f"--held-out true: {folder} is not a checkpoint of a run, so nothing was held out")
    trained_others = resolved.model.arch in QWEN_STYLE  # version 0.1.0, of tokenizers
    data = replace(run.data, tokenizer=folder) if trained_others else run.data
    for is_refused, reason in (
        (data.format == "chat", "the run was trained on conversations, and only running text can be scored"),
        (len(data.path) > 1, "the run has mixed several corpora; score each with --data.path"),
        (not data.eval_fraction, "the run has held out nothing (its data.eval-fraction is 0)"),
    ):
        if is_refused:
            raise ConfigError(f"--held-out true: {reason}")
    return resolved, data


def read_run_config(folder: str) -> Config | None:
    """Return the settings of the run whose checkpoint, of a model or an adapter, the folder is; None for other folders."""
    trainer = locate_model(folder) / "trainer.json"
    return merge_settings(Config(), read_json(trainer).get("config", {}), str(trainer)) if trainer.is_file() else None


def _check_corpus(corpus: Corpus, tokenizer: Tokenizer, config: Config, held_out: bool) -> None:
    """Raise ConfigError if the tokens do not match the model, or the text is not what the run has held out."""
    folder = config.model.init_from
    if corpus.tokenizer.with_mask().digest != tokenizer.with_mask().digest:
        problem = f"was tokenized with another tokenizer than that of {folder}"
        raise ConfigError(f"--data.path {corpus.source} {problem}; pass the text itself")
    if held_out and read_trainer(Path(folder).expanduser())["content"].get("data.path") != corpus.fingerprint:
        raise ConfigError(f"--held-out true: {corpus.source} is no longer the text that the run was trained on")


def _find_segments(data: DataConfig, arguments: EvaluateArguments, corpus: Corpus) -> np.ndarray:
    """Return the boundaries of the parts that are scored separately."""
    total = len(corpus.tokens)
    first = total - int(total * data.eval_fraction) if arguments.held_out else 0
    if not arguments.documents:
        return np.array([first, total])
    starts = document_starts(corpus.path)
    return np.concatenate([[first], starts[starts > first]])


def _write_results(
    arguments: EvaluateArguments, corpus: Corpus, segments: np.ndarray, windows: EvalWindows, table: np.ndarray, masked: bool
) -> None:
    tokens = int(segments[-1] - segments[0])
    result: dict[str, Any] = {"model": arguments.model.init_from, "text": corpus.source, "context_length": windows.length}
    result |= summarize_scores(table, tokens, corpus.bytes_per_token * tokens, masked)
    if not math.isfinite(result["loss"]):
        raise NonFiniteError(f"the loss is {result['loss']}: weights in {arguments.model.init_from} are not finite")
    folder = _results_folder(arguments.model.init_from, arguments.run.dir)
    with file_errors(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "evaluation.json", (json.dumps(result, indent=2) + "\n").encode())
    source = "the length that the run trained with" if read_run_config(result["model"]) else "the model's context length"
    source = "--model.context-length" if arguments.model.context_length else source
    result |= {"windows": f"of {windows.length} tokens: {source}", "written to": folder / "evaluation.json"}
    if arguments.documents:
        lines = (json.dumps(row) + "\n" for row in score_documents(segments, windows, table))
        write_durably(folder / "documents.jsonl", "".join(lines).encode())
        result["documents"] = folder / "documents.jsonl"
    for name, value in result.items():
        print(f"{name:<16}{value:.8g}" if isinstance(value, float) else f"{name:<16}{value}", flush=True)


def _results_folder(init_from: str, run_dir: str) -> Path:
    """Return the run that the checkpoint belongs to, or a folder for the results of other models."""
    if run_dir != "auto":
        return Path(run_dir)
    model = Path(init_from).expanduser().resolve()
    if checkpoint_step(model) is not None and (model.parents[1] / "config.toml").is_file():
        return Path(os.path.relpath(model.parents[1]))
    return Path("runs") / f"evaluation-{model.name}"
