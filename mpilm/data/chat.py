"""Conversations to learn answers from: JSON lines of prompt and response, or of messages; only answers are predicted."""

import json
import re
import resource
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.config.schema import DataConfig
from mpilm.data.batch import Batch
from mpilm.data.files import is_valid_utf8, parse_json, read_bytes, read_json
from mpilm.data.gather import all_gather_rows
from mpilm.data.order import Indices, pick_samples
from mpilm.data.sources import TextSource, partition_items, read_json_lines
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import ConfigError, DataError
from mpilm.kernels.base import IGNORE_INDEX
from mpilm.model.sequence_info import NO_DOCUMENT

ASSISTANT = "assistant"
RENDER_S, RENDER_BYTES, RENDER_GROWTH = 10.0, 2**29, 16  # that a conversation may take, and the growth of its text
PROCESS_PAGES = Path("/proc/self/statm")
Turn = tuple[str, bool]  # text, and whether it is an answer


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer: messages to the text that the model was made for, rendered as Hugging Face does it."""

    source: str  # in Jinja; it comes from a stranger and runs in a sandbox
    special_tokens: Mapping[str, str]  # that it may use
    folder: str  # for messages

    @cached_property
    def _template(self) -> Any:
        from jinja2.exceptions import SecurityError, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def fail(message: str) -> NoReturn:
            raise TemplateError(message)

        class Environment(ImmutableSandboxedEnvironment):
            """The sandbox of Hugging Face, without products and powers that take endless memory or time."""

            intercepted_binops = frozenset(("*", "**"))

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
                is_list = hasattr(left, "__len__") or hasattr(right, "__len__")
                most = 2**10 if operator == "**" else 2**20 if is_list else 2**64
                if max(sizes) > most or (is_list and prod(sizes) > most):
                    raise SecurityError(f"the result of {operator} is too large")
                return super().call_binop(context, operator, left, right)

        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.source)  # marks what is learnt, and prints nothing
        with self._limit_resources("", "cannot be read", []):
            return environment.from_string(source)

    @contextmanager
    def _limit_resources(self, place: str, problem: str, messages: Sequence[Mapping[str, str]]) -> Iterator[int]:
        """Limit time and memory in the main thread; yield the messages' length. Any error becomes a DataError with its line."""

        def stop(number: int, frame: object) -> None:
            raise TimeoutError(f"it takes more than {RENDER_S:g} s")

        size = sum(len(message["role"]) + len(message["content"]) for message in messages)
        is_limited = threading.current_thread() is threading.main_thread() and PROCESS_PAGES.exists()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        try:
            if is_limited:
                used = int(PROCESS_PAGES.read_text().split()[0]) * resource.getpagesize()
                most = used + RENDER_BYTES + RENDER_GROWTH * size
                resource.setrlimit(resource.RLIMIT_AS, (min(most, soft % 2**63), hard))  # -1 means none
                before = signal.signal(signal.SIGVTALRM, stop)
                signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S, 1.0)
            yield size
        except DataError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [getattr(error, "lineno", None), *(f.lineno for f in reversed(frames) if f.filename == "<template>"), 1]
            text = "it takes too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
            line = next(line for line in lines if line)
            raise DataError(f"{place}the chat template of {self.folder}, line {line}, {problem}: {text[:500]}") from None
        finally:
            if is_limited:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, before)
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def split_turns(self, messages: Sequence[Mapping[str, str]], place: object) -> list[Turn]:
        """Return the text of messages in turns; an answer reaches to the end of its turn. Raises DataError naming `place`."""
        turns: list[Turn] = []
        done, template = "", self._template
        with self._limit_resources(f"{place}: ", "refuses it", messages) as size:
            for i, message in enumerate(messages):
                if message["role"] == ASSISTANT:
                    prompt, text = (self._render(template, messages[: i + n], n == 0, size) for n in (0, 1))
                    if not (prompt.startswith(done) and text.startswith(prompt)):
                        why = f"changes what came before when message {i + 1} is added"
                        rest = "so its answers cannot be told from the rest"
                        raise DataError(f"{place}: the chat template of {self.folder} {why}, {rest}")
                    turns += [(prompt[len(done) :], False), (text[len(prompt) :], True)]
                    done = text
        if not turns:
            raise DataError(f'{place}: no message has the role "{ASSISTANT}", so there is nothing to learn')
        return turns

    def render(self, messages: Sequence[Mapping[str, str]], place: object, begin_answer: bool) -> str:
        """Return the text of messages; raises DataError naming `place`."""
        template = self._template
        with self._limit_resources(f"{place}: ", "refuses it", messages) as size:
            return self._render(template, messages, begin_answer, size)

    def _render(self, template: Any, messages: Sequence[Mapping[str, str]], begin_answer: bool, size: int) -> str:
        text = template.render(messages=list(messages), add_generation_prompt=begin_answer, **self.special_tokens)
        if len(text) > RENDER_GROWTH * (size + 2**16) or not is_valid_utf8(text):
            raise ValueError(f"it makes {len(text):,} characters of {size:,}, or half a surrogate pair")
        return text


def find_chat_template(tokenizer: str | Path) -> ChatTemplate | None:
    """Return the template beside a tokenizer.json, in tokenizer_config.json or a file of its own, if there is one."""
    path = Path(tokenizer).expanduser()
    if not path.exists():  # a setting such as "bytes"
        return None
    folder = path if path.is_dir() else path.parent
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    values = read_json(config) if config.is_file() else {}
    source = values.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {str(each.get("name")): each.get("template") for each in source if isinstance(each, dict)}.get("default")
    if file.is_file():
        try:
            source = read_bytes(file).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 at byte {error.start}") from None
    named = ((name, values.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token"))
    tokens = {name: str(token.get("content", "") if isinstance(token, dict) else token) for name, token in named if token}
    return ChatTemplate(source, tokens, str(folder)) if isinstance(source, str) else None


class EncodedChats(NamedTuple):
    """Conversations as tokens, one after the other."""

    tokens: Indices  # (N,)
    is_answer: np.ndarray  # (N,) bool: whether a token is to be predicted
    ends: Indices  # where each conversation ends


def read_chats(
    sources: list[TextSource], tokenizer: Tokenizer, template: ChatTemplate | None, comm: Comm,
    max_document_mib: int = DataConfig.max_document_mib,
) -> EncodedChats:  # fmt: skip
    """Read JSON lines, of which each rank encodes a part. Collective; raises DataError on all ranks, with file and line."""

    def encode() -> list[np.ndarray]:
        items = partition_items(sources, comm.rank, comm.size)
        lines = (entry for item in items for entry in read_json_lines(item, max_document_mib))
        return [_encode(parse_conversation(line, place, template), tokenizer, bool(template)) for line, place in lines]

    mine = run_on_all_ranks(comm, encode)
    lengths = np.array([len(rows) for rows in mine], dtype=np.int64)
    rows = np.concatenate([np.empty((0, 2), np.int32), *mine])
    lengths, rows = (np.concatenate(all_gather_rows(comm, array)) for array in (lengths, rows))
    return EncodedChats(tokens=rows[:, 0].astype(np.int64), is_answer=rows[:, 1].astype(bool), ends=np.cumsum(lengths))


def parse_conversation(line: bytes, place: object, template: ChatTemplate | None) -> list[Turn]:
    """Return the turns of a conversation; raises DataError naming file and line, ConfigError if messages need a template."""
    fields = parse_json(line, place)
    if not is_valid_utf8(json.dumps(fields, ensure_ascii=False)):
        raise DataError(f"{place} holds half a surrogate pair, which is no text")
    prompt, response, messages = (fields.get(name) for name in ("prompt", "response", "messages"))
    if isinstance(prompt, str) and isinstance(response, str):
        if template is None:
            return [(prompt, False), (response, True)]
        messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": response}]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        forms = 'neither "prompt" and "response", two strings, nor "messages", a list of objects with "role" and "content"'
        raise DataError(f"{place} has {forms}")
    if template is None:
        advice = "name a FOLDER that has one (--data.tokenizer FOLDER with tokenizer_config.json), or give prompt and response"
        raise ConfigError(f"{place} has messages, and the tokenizer no chat template; {advice}")
    return template.split_turns(messages, place)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _encode(turns: Sequence[Turn], tokenizer: Tokenizer, is_rendered: bool) -> np.ndarray:
    """Return the tokens of a conversation, and whether each is an answer; (n, 2) int32. Rendered text is encoded in one, and a
    token belongs to the turn it begins in. Otherwise each turn is encoded by itself, as prompts are; an eos ends the answer."""
    texts, answers = [text for text, _ in turns], [is_answer for _, is_answer in turns]
    if is_rendered:
        tokens, begins = tokenizer.encode_rendered("".join(texts))
        ends = np.cumsum([len(text) for text in texts])
        is_answer = np.array([*answers, False])[np.searchsorted(ends, begins, side="right")]
    else:
        parts = [*tokenizer.encode_batch(texts), np.array([tokenizer.eos])]
        tokens, is_answer = np.concatenate(parts), np.repeat([*answers, True], [len(part) for part in parts])
    return np.column_stack([tokens, is_answer]).astype(np.int32)


class ChatExamples:
    """Conversations in rows of the context length. Longer conversations are cut or, with data.too-long "drop", left out, as are
    those that then have no answer. With data.packing "concat" a row holds one; with "documents", as many as fit, in order,
    each by itself. The last data.eval-fraction of rows is held out. Raises ConfigError or DataError if a part is empty."""

    def __init__(self, chats: EncodedChats, context_length: int, data: DataConfig, eos: int):
        self.chats, self.context_length, self.eos = chats, context_length, eos
        self.rows: list[list[tuple[int, int]]] = []  # [start, stop) of the tokens of each conversation in a row
        self.truncated, self.left_out, free = 0, 0, 0
        for start, end in zip([0, *chats.ends[:-1].tolist()], chats.ends.tolist()):
            stop = min(end, start + context_length + 1)
            if (stop < end and data.too_long == "drop") or not chats.is_answer[start + 1 : stop].any():
                self.left_out += 1
                continue
            self.truncated += stop < end
            if data.packing == "concat" or stop - start - 1 > free:  # the last token is predicted, and not read
                self.rows.append([])
                free = context_length
            self.rows[-1].append((start, stop))
            free -= stop - start - 1
        counts = [sum(int(chats.is_answer[start + 1 : stop].sum()) for start, stop in row) for row in self.rows]
        self.targets = np.array(counts, dtype=np.int64)
        self.train_samples = len(self.rows) - int(len(self.rows) * data.eval_fraction)
        self.eval_samples = len(self.rows) - self.train_samples
        if not self.rows:
            problem = f"none of {len(chats.ends)} conversations has an answer within --model.context-length {context_length}"
            raise DataError(f"--data.path {data.source}: {problem}")
        if not self.train_samples or (data.eval_fraction and not self.eval_samples):
            split = f"{self.train_samples} to train on and {self.eval_samples} held out"
            advice = "give more conversations, or another fraction (0: hold out nothing)"
            raise ConfigError(f"--data.eval-fraction {data.eval_fraction} of {len(self.rows)} rows leaves {split}; {advice}")

    def make_batch(self, numbers: Indices, seed: int | None) -> Batch:
        shape = len(numbers), self.context_length
        inputs, targets = np.full(shape, self.eos, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions, documents = np.zeros(shape, dtype=np.int64), np.full(shape, NO_DOCUMENT, dtype=np.int64)
        tokens, is_answer, _ = self.chats
        for i, row in enumerate(self._pick_rows(numbers, seed).tolist()):
            at = 0
            for number, (start, stop) in enumerate(self.rows[row]):
                end = at + stop - start - 1
                inputs[i, at:end] = tokens[start : stop - 1]
                targets[i, at:end] = np.where(is_answer[start + 1 : stop], tokens[start + 1 : stop], IGNORE_INDEX)
                positions[i, at:end], documents[i, at:end] = np.arange(end - at), number
                at = end
            positions[i, at:] = np.arange(self.context_length - at)
        return Batch.from_arrays(tokens=inputs, targets=targets, positions=positions, samples=numbers, documents=documents)

    def count_targets(self, numbers: Indices, seed: int | None) -> int:
        return int(self.targets[self._pick_rows(numbers, seed)].sum())

    def _pick_rows(self, numbers: Indices, seed: int | None) -> Indices:
        first, count = (self.train_samples, self.eval_samples) if seed is None else (0, self.train_samples)
        return first + pick_samples(numbers, seed, count)
