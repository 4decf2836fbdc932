"""Text from a model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mpilm.checkpoint.format import MANIFEST, read_json, verify
from mpilm.checkpoint.load import load_published
from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.together import on_root
from mpilm.config import Generate, Model
from mpilm.data.tokenizer import Tokenizer, load_tokenizer
from mpilm.errors import FileError
from mpilm.model.huggingface_config import read_config
from mpilm.model.rows import Rows
from mpilm.model.sample import sample
from mpilm.parallel.layout import owned
from mpilm.trainer.sharded import resolve_layouts, whole_model


def write(folder: str, settings: Generate, comm: Comm) -> None:
    """Print the prompt and what follows it. Collective; rank 0 works."""
    on_root(comm, lambda: _write(Path(folder), settings))


def _write(folder: Path, settings: Generate) -> None:
    model, shape, tokenizer = read_model(folder)
    start = tokenizer.encode(settings.prompt).tolist() if settings.prompt else [tokenizer.eos]

    def next_logits(tokens: Tensor) -> Tensor:
        return model(tokens[None], Rows(torch.arange(len(tokens))))[0, -1]

    written = sample(next_logits, start, settings, shape.context_length, tokenizer.eos)
    print(settings.prompt + tokenizer.decode(written), flush=True)


def read_model(folder: Path) -> tuple[nn.Module, Model, Tokenizer]:
    """The model, its shape and its tokenizer from a checkpoint or a Hugging Face folder of safetensors files."""
    if not folder.is_dir():
        raise FileError(f"--model.init-from {folder} is not a folder")
    if (folder / MANIFEST).exists():
        verify(folder)
    shape, vocab_size = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder))
    model, flat = whole_model(shape, vocab_size, torch.device("cpu"))
    shapes = {layout.name: layout.shape for layout in owned(resolve_layouts(shape, vocab_size, (shape.n_layers,)))}
    load_published(folder, flat.pieces(flat.values), shapes, shape, SelfComm("world"))
    return model, shape, tokenizer
