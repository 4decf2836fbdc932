"""Merging of a LoRA adapter: its base model with W + alpha / rank x B A in the place of each adapted matrix W."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from mpilm.checkpoint import pretrained
from mpilm.checkpoint.format import MANIFEST, PARAMETER, TEMPORARY, file_stem
from mpilm.checkpoint.load import DTYPES, TensorRef, lookup_tensor, open_tensors
from mpilm.checkpoint.verify import verify_checkpoint
from mpilm.config.schema import ModelConfig
from mpilm.data.files import file_errors
from mpilm.errors import ConfigError
from mpilm.formatting import ProgressLine, name_some
from mpilm.model.families import build_model
from mpilm.model.hf.config import ADAPTER_CONFIG
from mpilm.model.hf.names import match_keys

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "*_tokens*.json", "vocab.*", "merges.txt", "chat_template.jinja")


def merge_adapter(adapter: str, out: Path, base: str = "") -> Path:
    """Write the base model of an adapter, with the adapter merged, as a Hugging Face folder; return the base. Compute matrix by
    matrix in float64, and round it once to the dtype of the base. Raises UserError, and leaves nothing then."""
    path = pretrained.locate_model(adapter)
    if not pretrained.has_adapter(path):
        raise ConfigError(f"{adapter} is not the folder of an adapter: it has no {ADAPTER_CONFIG}")
    if out.exists():
        raise ConfigError(f"{out} exists; name a folder that does not")
    model, folder = pretrained.read_pretrained_config(path, base), pretrained.find_base_model(path, base)
    for each in (each for each in (folder, path) if (each / MANIFEST).is_file()):
        verify_checkpoint(each)
    temporary = out.with_name(f"{TEMPORARY}{out.name}-{os.getpid()}")
    with file_errors(out, "written"):
        temporary.mkdir(parents=True)
        try:
            _copy(folder, temporary, MODEL_FILES)
            _copy(Path(pretrained.find_tokenizer_folder(path, base)), temporary, TOKENIZER_FILES)
            _write_weights(path, folder, temporary, model)
            temporary.rename(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)


def _write_weights(adapter: Path, base: Path, target: Path, model: ModelConfig) -> None:
    """Copy the files of the base, then overwrite the adapted matrices in them."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(model, model.vocab_size).named_parameters()}
    parts = [name for name in shapes if ".lora." in name]
    matrices = [name.replace(".lora.a.", ".") for name in parts if ".lora.a." in name]
    factor, progress = model.lora_alpha / model.lora_rank, ProgressLine("merging", "matrices")
    with open_tensors(adapter, file_stem(PARAMETER, model)) as lora, open_tensors(base) as weights:
        part_keys, missing, unexpected = match_keys(parts, lora, model.arch, ())
        keys, missing_weights, _ = match_keys(matrices, weights, model.arch, ())
        if wrong := [*missing, *missing_weights, *unexpected]:
            raise ConfigError(f"{adapter} does not fit its base {base}: {name_some(wrong)} is in one of them only")
        pairs = [[name.replace(".weight", f".lora.{part}.weight") for part in "ab"] for name in matrices]
        found = [[lookup_tensor(lora, part_keys[part], shapes[part], adapter) for part in pair] for pair in pairs]
        refs = [lookup_tensor(weights, keys[name], shapes[name], base) for name in matrices]
        for file in {Path(ref.file.name) for ref in weights.values()}:
            shutil.copyfile(file, target / file.name)
        for number, (ref, (a, b)) in enumerate(zip(refs, found, strict=True), 1):
            delta = _read(b) @ _read(a) * factor  # (out, in)
            merged = _read(ref) + (delta.T if model.arch == "gpt2" else delta)  # Conv1D stores the transpose
            with open(target / Path(ref.file.name).name, "r+b") as out:
                out.seek(ref.offset)
                out.write(merged.to(DTYPES[ref.dtype]).contiguous().view(torch.uint8).numpy().tobytes())
            progress(number, len(refs))


def _read(ref: TensorRef) -> Tensor:
    values = torch.empty(ref.shape, dtype=torch.float64)
    ref.read(values)
    return values
