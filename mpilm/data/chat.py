"""Conversations to learn answers from: JSON lines of prompt and response, or of messages; only answers are predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.config import Data
from mpilm.data.files import writable
from mpilm.data.gather import gather_rows
from mpilm.data.order import Indices, permute, sample_at
from mpilm.data.pieces import open_stream
from mpilm.data.samples import HELD_OUT_KEY
from mpilm.data.sources import Source
from mpilm.data.stream import Examples
from mpilm.data.template import Template
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import ConfigError, DataError
from mpilm.model.loss import IGNORE_INDEX
from mpilm.model.sequence_info import NO_DOCUMENT

Part = tuple[str, bool]  # text, and whether it is an answer


@dataclass(frozen=True)
class Counts:
    """Of conversations and tokens: what there was, and what became of it."""

    conversations: int
    cut: int
    left_out: int
    tokens: int
    targets: int
    rows: int


class Conversations:
    """Conversations laid into rows of the context length.

    `tokens`: of all conversations, one after the other; `answer`: which of them are to be predicted; `ends`: where each ends.
    `too_long`: "truncate", cut at the context, or "drop"; one that then has no answer is left out. `packing`: "concat", a
    conversation a row, the rest of it empty; "documents", as many as fit into it, in their order, each by itself. The last
    `eval_fraction` of the rows is held out. Raises ConfigError or DataError where nothing is left.
    """

    def __init__(
        self, tokens: Indices, answer: np.ndarray, ends: Indices, context_length: int, eval_fraction: float, eos: int,
        too_long: str, packing: str,
    ):  # fmt: skip
        self.context_length, self.eos = context_length, eos
        self.tokens, self.answer = tokens, answer
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.pieces, cut = self._fit(starts, ends, too_long)
        self.rows = self._lay(packing)
        self.targets = np.array([sum(self._targets(piece) for piece in row) for row in self.rows], dtype=np.int64)
        self.train_samples = len(self.rows) - int(len(self.rows) * eval_fraction)
        self.eval_samples = len(self.rows) - self.train_samples
        self.counts = Counts(
            len(ends), cut, len(ends) - len(self.pieces), len(tokens), int(self.targets.sum()), len(self.rows)
        )  # fmt: skip

    def _fit(self, starts: Indices, ends: Indices, too_long: str) -> tuple[list[tuple[int, int]], int]:
        """What each conversation becomes, [start, stop), those left out left out; and how many are cut."""
        pieces, cut = [], 0
        for start, end in zip(starts.tolist(), ends.tolist()):
            stop = min(end, start + self.context_length + 1)
            if (stop < end and too_long == "drop") or not self.answer[start + 1 : stop].any():
                continue
            cut += stop < end
            pieces.append((start, stop))
        return pieces, cut

    def _lay(self, packing: str) -> list[list[tuple[int, int]]]:
        """The pieces of each row."""
        rows: list[list[tuple[int, int]]] = []
        free = 0
        for start, stop in self.pieces:
            need = stop - start - 1  # the last token is predicted, and not read
            if packing == "concat" or need > free:
                rows.append([])
                free = self.context_length
            rows[-1].append((start, stop))
            free -= need
        return rows

    def _targets(self, piece: tuple[int, int]) -> int:
        return int(np.count_nonzero(self.answer[piece[0] + 1 : piece[1]]))

    def train(self, numbers: Indices, seed: int) -> Examples:
        return self._examples(sample_at(numbers, seed, self.train_samples))

    def held_out(self, numbers: Indices) -> Examples:
        return self._examples(self._held_out_rows(numbers))

    def train_targets(self, numbers: Indices, seed: int) -> int:
        return int(self.targets[sample_at(numbers, seed, self.train_samples)].sum())

    def held_out_targets(self, numbers: Indices) -> int:
        return int(self.targets[self._held_out_rows(numbers)].sum())

    def _held_out_rows(self, numbers: Indices) -> Indices:
        return self.train_samples + permute(numbers, self.eval_samples, HELD_OUT_KEY)

    def _examples(self, rows: Indices) -> Examples:
        shape = len(rows), self.context_length
        read, targets = np.full(shape, self.eos, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions, documents = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for i, row in enumerate(rows.tolist()):
            at = 0
            for number, (start, stop) in enumerate(self.rows[row]):
                end = at + stop - start - 1
                read[i, at:end] = self.tokens[start : stop - 1]
                targets[i, at:end] = np.where(self.answer[start + 1 : stop], self.tokens[start + 1 : stop], IGNORE_INDEX)
                positions[i, at:end], documents[i, at:end] = np.arange(end - at), number
                at = end
            positions[i, at:], documents[i, at:] = np.arange(self.context_length - at), NO_DOCUMENT
        return Examples(read, targets, positions, documents)


def read_conversations(
    sources: list[Source], tokenizer: Tokenizer, template: Template | None, comm: Comm
) -> tuple[Indices, np.ndarray, Indices]:
    """Tokens, which of them are answers, and ends of all conversations of some JSON-lines files. Every rank reads, and encodes
    its share. Collective; raises DataError on all ranks, with file and line."""
    mine = run_on_all_ranks(comm, lambda: list(_encoded(sources, tokenizer, template, comm.rank, comm.size)))
    lengths = np.array([len(row) for row in mine], dtype=np.int64)
    flat = np.concatenate(mine) if mine else np.empty(0, dtype=np.int64)
    every_length, every = gather_rows(comm, lengths), gather_rows(comm, flat)
    total = sum(map(len, every_length))
    each = np.empty(total, dtype=np.int64)
    for rank, theirs in enumerate(every_length):
        each[rank :: comm.size] = theirs
    ends = np.cumsum(each)
    marked = np.empty(int(ends[-1]) if total else 0, dtype=np.int64)
    for rank, (theirs, tokens) in enumerate(zip(every_length, every)):
        inner = np.cumsum(theirs)
        for i, stop in enumerate(inner.tolist()):
            end = int(ends[rank + i * comm.size])
            length = int(theirs[i])
            marked[end - length : end] = tokens[stop - length : stop]
    return marked >> 1, (marked & 1).astype(bool), ends


def _encoded(sources: list[Source], tokenizer: Tokenizer, template: Template | None, rank: int, size: int) -> Iterator[Indices]:
    """Of every size-th conversation, from the rank-th on: its tokens, each times two, plus one where it is an answer."""
    for number, (line, where) in enumerate(_lines(sources)):
        if number % size == rank:
            parts = conversation(line, where, template)
            yield _whole(parts, tokenizer) if template else _in_parts(parts, tokenizer)


def _in_parts(parts: list[Part], tokenizer: Tokenizer) -> Indices:
    """A prompt is encoded by itself, as it is when a text is to go on from it; the end is learnt too."""
    rows = [2 * tokenizer.encode(text).astype(np.int64) + int(answer) for text, answer in parts]
    return np.concatenate([*rows, np.array([2 * tokenizer.eos + 1])])


def _whole(parts: list[Part], tokenizer: Tokenizer) -> Indices:
    """What a template has written is encoded in one; a token belongs to the part that it begins in."""
    ids, begins = tokenizer.encode_marked("".join(text for text, _ in parts))
    ends = np.cumsum([len(text) for text, _ in parts])
    answers = np.array([answer for _, answer in parts] + [False])
    return 2 * ids.astype(np.int64) + answers[np.searchsorted(ends, begins, side="right")]


def _lines(sources: list[Source]) -> Iterator[tuple[bytes, str]]:
    """The lines that hold something, each with its place."""
    for source in sources:
        with open_stream(source) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield line, f"{source.path}: line {number}"


def conversation(line: bytes, where: str, template: Template | None) -> list[Part]:
    """The parts of a conversation; raises DataError naming file and line, ConfigError where messages need a template."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not writable(json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{where} holds half a surrogate pair, which is no text")
    if isinstance(value, dict) and isinstance(value.get("prompt"), str) and isinstance(value.get("response"), str):
        turns = [{"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["response"]}]
        return template.parts(turns, where) if template else [(value["prompt"], False), (value["response"], True)]
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f'{where} has neither "prompt" and "response", which are strings, nor "messages", a list of objects with "role" '
            'and "content"'
        )
    if template is None:
        raise ConfigError(
            f"{where} has messages, and the tokenizer no chat template; name the folder of one that has (--data.tokenizer "
            "FOLDER with a tokenizer_config.json), or give prompt and response"
        )
    return template.parts(messages, where)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def refuse_nothing(found: Conversations, data: Data) -> None:
    """Raise where no row is left to train on, or none to evaluate on although some were asked for."""
    counts = found.counts
    if not found.rows:
        raise DataError(
            f"--data.path {data.source}: none of {counts.conversations} conversations has an answer within the "
            f"--model.context-length {found.context_length}"
        )
    if not found.train_samples or (data.eval_fraction and not found.eval_samples):
        raise ConfigError(
            f"--data.eval-fraction {data.eval_fraction} of {counts.rows} rows leaves {found.train_samples} to train on and "
            f"{found.eval_samples} held out; give more conversations, or another fraction (0: hold out nothing)"
        )
