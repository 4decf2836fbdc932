#!/usr/bin/env python3
"""A fuzz test: seeded mutations of everything that a user, a download or an older run gives to mpilm.

Each case changes one valid input at random places: a bit, a byte, a span, or a value of its JSON, which becomes something
absurd (10^30, NaN, lists nested 100,000 deep). mpilm then reads it in this process, and must either refuse it with one message,
or accept something that makes sense. A case fails if it

  raises anything but a UserError,
  takes more than 20 seconds,
  takes more than 1.5 GiB of memory, or
  is accepted although it should not be, by the rule of its kind: a damaged manifest, say, or a shape beyond the limits.

  scripts/fuzz.py                               200 cases of each kind
  scripts/fuzz.py --count 2000 --only config.json index
  scripts/fuzz.py --only config.json --first 137 --count 1      one case again, with its traceback

It prints the number of cases refused and accepted, and the seed of each failure, and exits with 1 if there are any. It requires
the environment that scripts/test creates.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from machines import machine  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mpilm.checkpoint.format import MANIFEST, CheckpointFolder  # noqa: E402
from mpilm.checkpoint.load import DTYPES, open_tensors  # noqa: E402
from mpilm.checkpoint.pretrained import check_pretrained_shape, with_pretrained_shape  # noqa: E402
from mpilm.checkpoint.verify import find_newest_valid  # noqa: E402
from mpilm.comm.base import SelfComm  # noqa: E402
from mpilm.comm.collective_errors import CollectiveError  # noqa: E402
from mpilm.config.parse import parse  # noqa: E402
from mpilm.config.presets import PRESETS  # noqa: E402
from mpilm.config.schema import Config, DataConfig, ModelConfig, override, resolve_config  # noqa: E402
from mpilm.data.chat import ChatTemplate, find_chat_template, read_chats  # noqa: E402
from mpilm.data.prepare import prepare_tokens  # noqa: E402
from mpilm.data.sources import find_sources, partition_items, read_chunks  # noqa: E402
from mpilm.data.token_files import document_starts, open_tokens, read_metadata  # noqa: E402
from mpilm.data.tokenizer import bytes_tokenizer, load_tokenizer, train_bpe  # noqa: E402
from mpilm.errors import DataError, UserError  # noqa: E402
from mpilm.inference.load import config_from_folder  # noqa: E402
from mpilm.model.flops import flops_by_part  # noqa: E402
from mpilm.model.hf.config import hf_adapter_config, hf_config  # noqa: E402
from mpilm.parallel.layout_check import partition_by_cost, resolve_mesh_shape  # noqa: E402
from mpilm.planner.command import PlanConfig, make_plan  # noqa: E402
from mpilm.planner.profile import write_profile  # noqa: E402
from mpilm.report.page import write_report  # noqa: E402
from mpilm.telemetry.live import watch_run  # noqa: E402
from mpilm.telemetry.metrics import MetricsFollower, length_through_step, read_metrics_table  # noqa: E402

LIMIT_S, LIMIT_BYTES = 20, 3 * 2**29
DEEP = 100_000
HOSTILE_JSON = (
    "0", "-1", "1", "1.5", "1e999", "NaN", "-Infinity", "true", "null", '""', '"x"', "[]", "{}", "[[1]]", '{"a": 1}', "9" * 30,
    "-" + "9" * 30, "1" + "0" * 400, "9" * 5000, str(2**31), str(2**53), str(2**63 - 1), str(2**63), str(2**64), "1000000000",
    '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"' + "a" * 100_000 + '"', "[" * DEEP, "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 150 + "]" * 150, "[" + "[]," * 10_000 + "[]]",
)  # fmt: skip
HOSTILE_NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "1e999",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    str(2**31),
    str(2**63),
    "0x" + "f" * 5000,
)
HOSTILE_TEXTS = (
    *HOSTILE_NUMBERS, "", "''", "true", "[]", "[" * 5000, "a." * 5000, "[[", "]]", "{", "}", '"', "\\", "\x00", "\ud800", "é",
    "=", "--", "\n", "[model]\n", "a = 1\n", "../..", "/dev/zero", "1" * 50 + "e9",
)  # fmt: skip
HOSTILE_JINJA = (
    '{{ "a" * 3000000000 }}', "{{ [0] * 1000000000 }}", "{% for i in range(1000000000) %}x{% endfor %}", "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "{{ 'a'.center(3000000000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ '%03000000000d' % 1 }}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}", "{{ lipsum(n=100000) }}",
    "{{ messages|join('a' * 9999) }}", "{{ '{:3000000000}'.format(1) }}", "{{ ''.__class__.__mro__ }}", "{{ (" * 500,
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% if true %}" * 200, "{% endfor %}", "{{ a.b.c }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%9999999Y') }}", "{{ messages|tojson(indent=100000000) }}",
    "{{ 'a'|indent(1000000000) }}", "{% break %}",
)  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAPE = resolve_config(
    Config(model=ModelConfig(n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, context_length=16, vocab_size=257))
).model


class HangError(BaseException):
    """The alarm of a case that takes too long; no code under test catches it."""


class AcceptedError(AssertionError):
    """An input that was accepted and should not have been."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AcceptedError(what)


# Mutations.


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Change one to three places of a file."""
    for _ in range(random.randint(1, 3)):
        at, size = random.randrange(len(data) + 1), random.choice((1, 1, 2, 4, 8, 64, len(data)))
        kind = random.choice((0, 0, 1, 1, 1, 1, 2, 3, 4, 5, 6))
        if kind <= 1 and at < len(data):
            data = (
                data[:at] + bytes([data[at] ^ (1 << random.randrange(8) if kind else random.randrange(256))]) + data[at + 1 :]
            )
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[:at] + data[at : at + size] * random.choice((2, 3, 1000 if size < 99 else 2)) + data[at:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            number = random.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, random.getrandbits(40)))
            data = data[:at] + number.to_bytes(8, "little")[: random.choice((4, 8))] + data[at + 8 :]
        else:
            data = data[:at] + random.choice(HOSTILE_JSON).encode() + data[at:]
    return data


def mutate_json(random: Random, data: bytes) -> bytes:
    """Replace, remove, rename or repeat a value of a JSON text, or change its bytes."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    root = [json.loads(data)]
    places: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in places:
        value = holder[key]
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += [(value, each) for each in list(keys)[:200]]
    hole = "@HOLE@"
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0 and holder is not root:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(("x", "", "__metadata__", "../a"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder += [holder[key]] * random.choice((1, 1000)) if holder is not root else []
    else:
        holder[key] = hole
    return json.dumps(root[0]).replace(f'"{hole}"', random.choice(HOSTILE_JSON)).encode()


def mutate_text(hostile: tuple[str, ...]) -> Callable[[Random, bytes], bytes]:
    """Return a mutation that puts hostile texts in the place of numbers, words or lines."""

    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.2:
            return mutate_bytes(random, data)
        text = data.decode()
        for _ in range(random.randint(1, 2)):
            pattern = random.choice((r"-?\d[\d.e-]*", r"[\w.-]+", r"[^\n]*\n", r"\"[^\"]*\"", r"(?=[^\w])", r"(?m)^(?=.)"))
            spots = [match.span() for match in re.finditer(pattern, text)] or [(0, 0)]
            start, stop = random.choice(spots)
            text = text[:start] + random.choice(hostile) + text[stop if random.random() < 0.8 else start :]
        return text.encode("utf-8", "surrogatepass")

    return mutate


def mutate_header(random: Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file, with its length made right, or any byte of the file."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(random, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_compressed(random: Random, data: bytes) -> bytes:
    """Change the text inside a stream, or the stream, or make it expand to 256 MiB."""
    if random.random() < 0.01:
        return gzip.compress(random.choice((b'{"text": "' + b"a" * 2**28 + b'"}\n', b"{}\n" * 2**26)), 1)
    if random.random() < 0.5:
        return mutate_bytes(random, data)
    return gzip.compress(mutate_json(random, gzip.decompress(data).splitlines()[0]) + b"\n")


# Kinds: the valid input, its mutation, and the use that accepts or refuses it.


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str  # of the file in its folder
    make: Callable[[Path], None]  # writes the valid folder
    mutate: Callable[[Random, bytes], bytes]
    use: Callable[[Path, bytes], None]  # of the file, and its bytes before the mutation
    is_harmless: Callable[[bytes, bytes], bool] = lambda before, after: False


def check_config_use(config: Config) -> None:
    config = resolve_config(config)
    for name, value in vars(config.model).items():
        require(not isinstance(value, (int, float)) or 0 <= value <= 1e30, f"model.{name} {value}")
    require(config.model.n_layers <= 1024 and config.model.d_ff <= 2**24, "a shape beyond the limits")
    require(all(math.isfinite(part) for part in flops_by_part(config.model, config.model.vocab_size or 257).values()), "FLOPs")
    resolve_mesh_shape(config, config.parallel.pipeline)
    if config.parallel.pipeline * config.parallel.chunks <= 64:
        partition_by_cost(config, config.model.vocab_size or 257)


def use_flags(path: Path, before: bytes) -> None:
    words = path.read_bytes().decode("utf-8", "replace").split(" ")
    with contextlib.suppress(SystemExit), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        check_config_use(parse(words, Config(), "train", "", PRESETS, with_pretrained_shape, check_pretrained_shape))


def use_toml(path: Path, before: bytes) -> None:
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        check_config_use(
            parse(["--config", str(path)], Config(), "train", "", PRESETS, with_pretrained_shape, check_pretrained_shape)
        )


def use_model(path: Path, before: bytes) -> None:
    config = config_from_folder(override(Config(), model__init_from=str(path.parent)))
    check_config_use(config)


def use_tensors(path: Path, before: bytes) -> None:
    with open_tensors(path if path.suffix == ".safetensors" else path.parent) as refs:
        for ref in refs.values():
            size = math.prod(ref.shape)
            require(0 <= ref.offset <= os.path.getsize(ref.file.name), "a tensor outside its file")
            require(size == 0 or size <= os.path.getsize(ref.file.name), "a tensor larger than its file")
            if ref.dtype in DTYPES:
                ref.read(torch.empty(size))


def use_tokenizer(path: Path, before: bytes) -> None:
    tokenizer = load_tokenizer(path)
    template = find_chat_template(path)
    if template:
        template.render(MESSAGES, "x", True)
    require(0 <= tokenizer.eos < tokenizer.vocab_size <= 10**7, "ids beyond the vocabulary")
    for text in ("hello world", "naïve 猫\n<|endoftext|>", ""):
        ids = tokenizer.encode(text)
        require(len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size), "an id beyond the vocabulary")
        tokenizer.decode(ids)
    tokenizer.word_starts(np.array([tokenizer.eos]))
    tokenizer.with_mask()


def use_token_files(path: Path, before: bytes) -> None:
    prefix = path.with_suffix("")
    read_metadata(prefix)
    tokens, documents = open_tokens(prefix)
    starts = document_starts(prefix.with_suffix(".bin"))
    require(len(starts) == documents + 1 and starts[0] == 0 and starts[-1] == len(tokens), "documents beyond the tokens")
    require(bool((np.diff(starts) >= 0).all()) and int(tokens.max()) >= 0, "documents in the wrong order")


def read_all(path: Path, settings: DataConfig) -> str:
    return "".join(chunk.text for item in partition_items(find_sources(str(path))) for chunk in read_chunks(item, settings))


def use_lines(path: Path, before: bytes) -> None:
    text = read_all(path, DataConfig())
    require(len(text.encode()) <= 64 << 20, "a document beyond the limit")
    with contextlib.suppress(UserError, CollectiveError):
        read_chats(find_sources(str(path)), bytes_tokenizer(), None, SelfComm())


def use_parquet(path: Path, before: bytes) -> None:
    other = path.with_name("before.parquet")
    other.write_bytes(before)
    require(read_all(path, DataConfig()) == read_all(other, DataConfig()), "other text than was written")


def use_template(path: Path, before: bytes) -> None:
    template = ChatTemplate(path.read_bytes().decode("utf-8", "replace"), {"eos_token": "</s>"}, str(path.parent))
    try:
        require(len(template.render(MESSAGES, "x", True)) < 2**22, "a text out of proportion")
    except DataError as error:
        require(str(path.parent) in str(error) and ", line " in str(error), f"no folder or line in {error}")
        raise


def use_checkpoint(path: Path, before: bytes) -> None:
    newest, errors = find_newest_valid(path.parents[1])
    require(newest is not None and newest.name == "step-00000001", f"the damaged checkpoint: {newest}")
    raise DataError(next(iter(errors.values())))


def use_metrics(path: Path, before: bytes) -> None:
    table = read_metrics_table(path)
    require({len(column) for column in table.columns.values()} == {len(table.columns["step"])}, "columns of unequal lengths")
    MetricsFollower(path).read()
    with open(path, "rb") as file:
        require(length_through_step(file, 3) <= path.stat().st_size, "more than the file")
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        watch_run(str(path.parent), 1.0, once=True)
    write_report([path.parent])


def use_machine(path: Path, before: bytes) -> None:
    text = make_plan(PlanConfig(machine=str(path), ranks=(2,), model=SHAPE))
    require("nan" not in text.lower(), f"a prediction that is no number: {text}")


def make_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(hf_config(SHAPE, 257, 256)))
    (folder / "tokenizer.json").write_text(bytes_tokenizer().json)


def make_adapter(folder: Path) -> None:
    (folder / "base").mkdir()
    make_model(folder / "base")
    model = replace(SHAPE, lora_rank=2, lora_targets=("q", "v"))
    (folder / "adapter_config.json").write_text(json.dumps(hf_adapter_config(model, str(folder / "base"))))
    (folder / "tokenizer.json").write_text(bytes_tokenizer().json)


def make_tensors(folder: Path) -> None:
    shapes = {"a": (3, 4), "b.weight": (5,), "c": ()}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model-1.safetensors")
    weight_map = dict.fromkeys(shapes, "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": weight_map}))


@cache
def small_tokenizer() -> str:
    return train_bpe(["the quick brown fox jumps over the lazy dog " * 20], 280).json


def make_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(small_tokenizer())
    config = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<s>"}, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_token_files(folder: Path) -> None:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(5)))
    prepare_tokens(DataConfig(path=(str(folder / "text.jsonl"),), tokenizer="bytes"), folder / "tokens", SelfComm())


def make_lines(folder: Path) -> None:
    rows = [{"text": f"document {i} é", "prompt": "a", "response": "b", "messages": MESSAGES} for i in range(3)]
    (folder / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def make_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"document {i} " * 20 for i in range(50)], "n": range(50)})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=25, write_page_checksum=True)


def make_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        (folder / f".{step}").mkdir()
        checkpoint = CheckpointFolder(folder / f".{step}")
        checkpoint.write_json("trainer.json", {"step": step, "eval_loss": None})
        checkpoint.write_bytes("model.safetensors", bytes(range(200)) * step)
        checkpoint.commit(folder / f"step-{step:08d}")


def make_metrics(folder: Path) -> None:
    start = {"event": "start", "step": 0, "time": 1.0, "ranks": 2, "layout": {"data": 2}, "hosts": ["a", "b"], "versions": {}}
    step = {
        "time": 2.0,
        "tokens": 64,
        "loss": 5.5,
        "grad_norm": 1.0,
        "lr": 0.1,
        "step_s": 0.1,
        "tokens_per_s": 640.0,
        "mfu": 0.1,
    }
    rows = [start, *({"step": i, **step, "memory_bytes": [1, 2], "rank_s": {"compute": [0.1, 0.1]}} for i in range(1, 5))]
    rows += [{"step": 4, "time": 3.0, "eval_loss": 5.0}, {"event": "end", "step": 4, "time": 4.0}]
    (folder / "config.toml").write_text(TOML)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mutate_row(random: Random, data: bytes) -> bytes:
    """Change one row of a file of JSON lines."""
    rows = data.splitlines(keepends=True)
    at = random.randrange(len(rows))
    return b"".join([*rows[:at], mutate_json(random, rows[at].strip()) + b"\n" * (random.random() < 0.9), *rows[at + 1 :]])


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(text))


def void(_: object) -> None:
    return None


FLAGS = (
    "--model.arch llama --model.n-layers 2 --model.d-model 16 --model.n-heads 2 --model.d-ff 32 --model.head-width 8 "
    "--train.global-batch 8 --train.micro-batch 2 --train.steps 5 --train.lr 0.01 --parallel.pipeline 2 --parallel.chunks 1 "
    "--parallel.schedule 1f1b --parallel.cut 1,1 --data.path a.txt 0.5 b.txt 0.5 --run.trace-steps 1:2 --train.compile false"
)
TOML = """
[model]
arch = "llama"
n-layers = 4
d-model = 32
n_heads = 2
rope-scaling = [8.0, 1.0, 4.0, 8192.0]
[data]
path = [["a.txt", 0.5], ["b.txt", 0.5]]
eval-fraction = 0.1
[train]
lr = 1e-3
global-batch = 8
[parallel]
pipeline = 2
chunks = 2
schedule = "interleaved"
"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content']|trim }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ eos_token * 2 }}{% endif %}\n"
)
KINDS = {
    "flags": Kind("flags", write("flags", FLAGS), mutate_text(HOSTILE_TEXTS), use_flags),
    "toml": Kind("a.toml", write("a.toml", TOML), mutate_text(HOSTILE_TEXTS), use_toml),
    "config.json": Kind("config.json", make_model, mutate_json, use_model),
    "adapter_config.json": Kind("adapter_config.json", make_adapter, mutate_json, use_model),
    "safetensors": Kind("model-1.safetensors", make_tensors, mutate_header, use_tensors),
    "index": Kind("model.safetensors.index.json", make_tensors, mutate_json, use_tensors),
    "tokenizer.json": Kind("tokenizer.json", make_tokenizer, mutate_json, use_tokenizer),
    "tokenizer_config.json": Kind(
        "tokenizer_config.json",
        make_tokenizer,
        mutate_json,
        lambda path, before: use_tokenizer(path.with_name("tokenizer.json"), before),
    ),
    "idx": Kind("tokens.idx", make_token_files, mutate_bytes, use_token_files),
    "tokens.json": Kind("tokens.json", make_token_files, mutate_json, use_token_files),
    "jsonl": Kind("a.jsonl", make_lines, mutate_row, use_lines),
    "jsonl.gz": Kind("b.jsonl.gz", make_lines, mutate_compressed, use_lines),
    "parquet": Kind("a.parquet", make_parquet, mutate_bytes, use_parquet),
    "template": Kind("chat_template.jinja", write("chat_template.jinja", CHATML), mutate_text(HOSTILE_JINJA), use_template),
    "manifest": Kind(f"step-00000002/{MANIFEST}", make_checkpoints, mutate_json, use_checkpoint),
    "metrics": Kind("metrics.jsonl", make_metrics, mutate_row, use_metrics),
    "machine.json": Kind(
        "machine.json", lambda folder: write_profile(folder / "machine.json", machine()), mutate_json, use_machine
    ),
}


# Cases.


@dataclass(frozen=True)
class Outcome:
    """The end of a case."""

    verdict: str  # refused, accepted, unchanged or failed
    text: str = ""  # the refusal, or the reason of the failure


@contextlib.contextmanager
def alarm(limit_s: int) -> Iterator[None]:
    """Raise HangError inside after this time."""

    def ring(number: int, frame: object) -> None:
        raise HangError(f"more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def run_case(name: str, number: int, folder: Path, seed: int = 0) -> Outcome:
    """Make the valid input in an empty folder, mutate it, and use it."""
    kind = KINDS[name]
    kind.make(folder)
    path = folder / kind.name
    before = path.read_bytes()
    after = kind.mutate(Random(f"{name} {seed} {number}"), before)
    if after == before:
        return Outcome("unchanged")
    path.write_bytes(after)
    reset_peak_memory()
    start = memory_bytes("VmRSS")
    try:
        with alarm(LIMIT_S), mock.patch("mpilm.data.chat.RENDER_S", 0.5):
            kind.use(path, before)
        outcome = Outcome("accepted")
    except (UserError, CollectiveError) as error:
        outcome = Outcome("refused", str(error))
        if not str(error).strip() or len(str(error)) > 4010:
            outcome = Outcome("failed", f"a message of {len(str(error))} characters: {str(error)[:200]}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = Outcome("failed", "".join(traceback.format_exception(error))[-3000:])
    taken = memory_bytes("VmHWM") - start
    return outcome if taken < LIMIT_BYTES else Outcome("failed", f"{taken >> 20} MiB of memory; {outcome}")


def run_kind(name: str, numbers: range, seed: int = 0, verbose: bool = False) -> tuple[Counter[str], dict[int, str]]:
    """Run cases of a kind; return how many ended how, and the reasons of failures by number."""
    counts, failures = Counter[str](), dict[int, str]()
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix="mpilm-fuzz-"))
        try:
            outcome = run_case(name, number, folder, seed)
        finally:
            shutil.rmtree(folder)
        counts[outcome.verdict] += 1
        if verbose:
            print(f"{name} {number}: {outcome.verdict}: {outcome.text}", flush=True)
        if outcome.verdict == "failed":
            failures[number] = outcome.text
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other cases")
    parser.add_argument("--verbose", action="store_true", help="print the outcome of each case")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds to run")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    failed = 0
    for name in arguments.only:
        started = time.monotonic()
        numbers = range(arguments.first, arguments.first + arguments.count)
        counts, failures = run_kind(name, numbers, arguments.seed, arguments.verbose)
        failed += len(failures)
        texts = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in ("refused", "accepted", "unchanged", "failed"))
        print(f"{name:<22} {texts}; {time.monotonic() - started:.0f} s", flush=True)
        for number, text in list(failures.items())[:5]:
            print(
                f"  --only {name} --seed {arguments.seed} --first {number} --count 1:\n    " + text.replace("\n", "\n    "),
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
