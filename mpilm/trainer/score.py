"""How well a model predicts a text, whatever the number of ranks: window by window, each token once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpilm.data.batch import Batch
from mpilm.data.corpus import Corpus
from mpilm.data.objective import Objective
from mpilm.data.order import key_of
from mpilm.model.loss import IGNORED
from mpilm.telemetry.display import Counter
from mpilm.trainer.staged import StagedModel

MASK_KEY = 0x6576616C  # masks are the same in every evaluation of a text


@dataclass(frozen=True)
class Windows:
    """Pieces of the text that are read one by one: tokens [start, stop) of document number `document`; causal windows overlap
    by the token that one ends and the next begins with."""

    start: np.ndarray
    stop: np.ndarray
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


def windows(segments: np.ndarray, length: int, looks_ahead: bool) -> Windows:
    """Cut each of the segments [segments[i], segments[i + 1]) into windows of `length` read tokens, the last one shorter.

    Where the next token is predicted (`looks_ahead`) a window has one more, which the next one begins with, and a piece of one
    token predicts nothing.
    """
    starts, stops, documents = [], [], []
    for number, (first, end) in enumerate(zip(segments[:-1].tolist(), segments[1:].tolist())):
        begin = np.arange(first, end - looks_ahead, length, dtype=np.int64)
        starts.append(begin)
        stops.append(np.minimum(begin + length + looks_ahead, end))
        documents.append(np.full(len(begin), number))
    return Windows(np.concatenate(starts), np.concatenate(stops), np.concatenate(documents))


def microbatches(sizes: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Neighbours of one size, at most so many: ranges of windows."""
    ends = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    return [(at, min(at + most, end)) for first, end in pairwise(ends) for at in range(first, end, most)]


class Reader:
    """Batches of windows of a corpus."""

    def __init__(self, corpus: Corpus, pieces: Windows, objective: Objective, groups: Sequence[tuple[int, int]]):
        self.corpus, self.pieces, self.objective, self.groups = corpus, pieces, objective, groups

    def __call__(self, m: int) -> Batch:
        numbers = np.arange(*self.groups[m])
        rows = np.stack([self._row(n) for n in numbers.tolist()])
        read, targets = self.objective(rows, [key_of(MASK_KEY, n) for n in numbers.tolist()])
        tokens, right = (torch.from_numpy(np.ascontiguousarray(x)) for x in (read, targets))
        count = int(np.count_nonzero(targets != IGNORED))
        return Batch(tokens, right, torch.arange(tokens.shape[1]), torch.from_numpy(numbers), count)

    def _row(self, number: int) -> np.ndarray:
        row = self.corpus.read(int(self.pieces.start[number]), int(self.pieces.stop[number]))
        return row if self.objective.looks_ahead else np.append(row, 0)  # an objective leaves the last one out


def row_scores(logits: Tensor, batch: Batch) -> Tensor:
    """Sum of the losses, right guesses, and targets of each row, (B, 3) float64."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
    right = logits.argmax(dim=-1) == batch.targets
    counted = batch.targets != IGNORED
    parts = losses.view_as(batch.targets), right, counted
    return torch.stack([part.double().sum(dim=1) for part in parts], dim=1)


def score(model: StagedModel, corpus: Corpus, pieces: Windows, objective: Objective, rows: int, speaks: bool) -> np.ndarray:
    """The scores of each window, (windows, 3), `rows` windows at a time; the same on all ranks. Collective over the mesh."""
    groups = microbatches(pieces.stop - pieces.start, rows)
    reader, counter = Reader(corpus, pieces, objective, groups), Counter("batches", -(-len(groups) // model.data.size), speaks)

    def batch_of(m: int) -> Batch:
        counter()
        return reader(m).to(model.device)

    model.forward(len(groups), batch_of, row_scores)
    table = torch.zeros(len(pieces), 3, dtype=torch.float64)
    for m, scores in model.results().items():
        table[slice(*groups[m])] = scores.cpu()
    model.mesh.world.all_reduce(table)  # adds zeros: exact
    return table.numpy()


def summary(table: np.ndarray, tokens: int, nbytes: float, masked: bool) -> dict[str, Any]:
    """What evaluation.json says, from the scores of all windows: (windows, 3)."""
    loss, right, targets = (math.fsum(column) for column in table.T.tolist())
    mean = loss / targets
    result = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    if not masked:  # a part of the tokens says nothing of the bytes of the whole
        result["bits_per_byte"] = loss / math.log(2) / nbytes
    return {**result, "masked_accuracy" if masked else "accuracy": right / targets, "tokens": tokens, "targets": int(targets)}


def by_document(segments: np.ndarray, pieces: Windows, table: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row a document, also for those that are too short to predict anything."""
    sums = np.zeros((len(segments) - 1, 3))
    np.add.at(sums, pieces.document, table)
    for number, ((loss, right, targets), tokens) in enumerate(zip(sums.tolist(), np.diff(segments).tolist())):
        found = {"loss": loss / targets, "accuracy": right / targets} if targets else {"loss": None, "accuracy": None}
        yield {"document": number, "tokens": tokens, "targets": int(targets), **found}
