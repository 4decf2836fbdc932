"""The kinds of input: a valid one, its mutation, and the use that accepts or refuses it."""

import contextlib
import gzip
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from machines import machine
from safetensors.torch import save_file

from fuzzing.mutations import (
    HOSTILE_JINJA,
    HOSTILE_TEXTS,
    mutate_bytes,
    mutate_compressed,
    mutate_header,
    mutate_json,
    mutate_row,
    mutate_text,
)
from mpilm.checkpoint.format import MANIFEST, CheckpointFolder
from mpilm.checkpoint.load import DTYPES, open_tensors
from mpilm.checkpoint.pretrained import check_pretrained_shape, with_pretrained_shape
from mpilm.checkpoint.verify import find_newest_valid
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.parse import parse
from mpilm.config.presets import PRESETS
from mpilm.config.schema import Config, DataConfig, ModelConfig, resolve_config
from mpilm.config.settings import override
from mpilm.data.chat import ChatTemplate, find_chat_template, read_chats
from mpilm.data.prepare import prepare_tokens
from mpilm.data.sources import find_sources, partition_items, read_chunks
from mpilm.data.token_files import document_starts, open_tokens, read_metadata
from mpilm.data.tokenizer import bytes_tokenizer, load_tokenizer, train_bpe
from mpilm.errors import DataError, UserError
from mpilm.inference.load import config_from_folder
from mpilm.model.flops import flops_by_part
from mpilm.model.hf.config import hf_adapter_config, hf_config
from mpilm.parallel.layout_check import partition_by_cost, resolve_mesh_shape
from mpilm.planner.command import PlanConfig, make_plan
from mpilm.planner.profile import write_profile
from mpilm.report.page import write_report
from mpilm.telemetry.live import watch_run
from mpilm.telemetry.metrics import MetricsFollower, length_through_step, read_metrics_table

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAPE = resolve_config(
    Config(
        model=ModelConfig(
            n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, d_ff=32, context_length=16, vocab_size=257, tensor_parts=2
        )
    )
).model


class AcceptedError(AssertionError):
    """An input that was accepted and should not have been."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AcceptedError(what)


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
