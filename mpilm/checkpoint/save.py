"""Write a checkpoint: the ranks that hold the pieces share the writing, under a temporary name; then one rename. And remove
checkpoints no longer wanted."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.assemble import Held, assemble
from mpilm.checkpoint.blocks import BlockWriter, digest_of
from mpilm.checkpoint.format import (
    BLOCK_BYTES,
    TEMPORARY,
    Writer,
    checkpoints,
    folder_name,
    manifest_entry,
    read_json,
)
from mpilm.checkpoint.load import moment_name, weights_stem
from mpilm.checkpoint.plan import Holders, StoredTensor, TensorFile, index_of, plan_blocks, tensor_files
from mpilm.checkpoint.pretrained import base_of
from mpilm.checkpoint.tensors import Shape
from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError, on_root, together
from mpilm.config import Model
from mpilm.data.template import Template
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import FileError, UserError
from mpilm.model.huggingface import published_name
from mpilm.model.huggingface_adapter import CONFIG as ADAPTER_CONFIG
from mpilm.model.huggingface_adapter import published_adapter
from mpilm.model.huggingface_config import published_config
from mpilm.parallel.shard import Piece

MAX_SHARD_BYTES = 5_000_000_000  # as transformers cuts models
PARAMETER = "parameter"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: this rank's pieces of parameters and moments, who holds the others, and the words about them.

    `shapes`: every parameter of the whole model that has memory of its own, at global shape, in model order, the same on all
    ranks; `moment_shapes`: of their moments, by kind. `parameters`, and `moments` by kind: flat contiguous float32 tensors on
    any device. `holders`: pure and the same on all ranks: for a parameter, ranges of elements that cover it in order and the
    world ranks that hold them; each of these ranks has a piece that contains the range. A moment of another shape lies whole
    where its parameter is whole.
    """

    model: Model
    tokenizer: Tokenizer
    template: Template | None
    trainer: Mapping[str, Any]  # trainer.json: step, tokens, data, versions, ...
    shapes: Mapping[str, Shape]
    moment_shapes: Mapping[str, Mapping[str, Shape]]
    parameters: Mapping[Piece, Tensor]
    moments: Mapping[str, Mapping[Piece, Tensor]]
    holders: Holders


def save(parent: Path, step: int, state: State, comm: Comm) -> Path:
    """Write the checkpoint of `step` below `parent`, a folder that all ranks see; returns its folder. Collective over the
    world; raises AgreedError on all ranks alike.

    An existing one is never written over.
    """
    final = parent / folder_name(step)
    temporary = parent / f"{TEMPORARY}{final.name}"
    on_root(comm, lambda: _prepare(final, temporary))
    files = {weights_stem(state.model): _model_files(state), "optimizer": _optimizer_files(state)}
    try:
        entries = _write_tensors(final, temporary, [file for group in files.values() for file in group], state, comm)
        on_root(comm, lambda: _publish(final, temporary, files, entries, state))
    except AgreedError:
        if comm.rank == 0:  # what is half-written only takes the space that the next one needs
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Turn an OSError inside into a FileError that names the checkpoint."""
    try:
        yield
    except OSError as error:
        reason = "not all ranks see its folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise FileError(f"checkpoint {final} could not be written: {reason}; the older ones are as they were") from None


def _prepare(final: Path, temporary: Path) -> None:
    if final.exists():
        raise FileError(f"checkpoint {final} is there already, written by another job: two jobs work on one --run.dir")
    with _writing(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)


def _model_files(state: State) -> list[TensorFile]:
    """In the reverse of the model's order, as the parameters lie in memory: neighbours here are mostly neighbours there."""
    tensors = [
        StoredTensor(published_name(name, state.model.arch), (PARAMETER, name), shape)
        for name, shape in _backward(state.shapes)
    ]
    return tensor_files(weights_stem(state.model), tensors, MAX_SHARD_BYTES)


def _optimizer_files(state: State) -> list[TensorFile]:
    tensors = [
        StoredTensor(moment_name(name, kind), (kind, name), shape, uncut=shape != state.shapes[name])
        for kind, shapes in state.moment_shapes.items()
        for name, shape in _backward(shapes)
    ]
    return tensor_files("optimizer", tensors, MAX_SHARD_BYTES)


def _backward(shapes: Mapping[str, Shape]) -> list[tuple[str, Shape]]:
    return list(shapes.items())[::-1]


def _write_tensors(
    final: Path, temporary: Path, files: Sequence[TensorFile], state: State, comm: Comm
) -> dict[str, dict[str, Any]]:
    """Write the tensor files together; returns what the manifest says of them. Collective."""
    held = Held({PARAMETER: state.parameters, **state.moments}, files)
    plan = plan_blocks(files, cache(state.holders), comm.size, BLOCK_BYTES)
    counts = [file.blocks(BLOCK_BYTES) for file in files]
    digests = torch.zeros(sum(counts), 32, dtype=torch.uint8)  # a row a block
    with BlockWriter(temporary) as writer:
        for block, data in assemble(plan, held, comm):
            writer.write(block, data)
            digests[block.number] = digest_of(data)

    def check() -> None:
        with _writing(final):
            writer.raise_error()

    together(comm, check)
    comm.all_reduce(digests.view(torch.int64))  # rows of others are zero, so the sum brings them together
    return {file.name: manifest_entry(file.nbytes, rows.numpy().tobytes()) for file, rows in zip(files, digests.split(counts))}


def _publish(
    final: Path,
    temporary: Path,
    files: Mapping[str, Sequence[TensorFile]],
    entries: Mapping[str, dict[str, Any]],
    state: State,
) -> None:
    """Write what rank 0 writes alone, the manifest last, and give the folder its name."""
    writer = Writer(temporary)
    with _writing(final):
        _write_words(writer, state)
        for stem, group in files.items():
            if len(group) > 1:
                writer.json(f"{stem}.safetensors.index.json", index_of(group))
        writer.entries.update(entries)
        writer.json("trainer.json", dict(state.trainer))
        writer.publish(final)


def _write_words(writer: Writer, state: State) -> None:
    """What makes the folder one of Hugging Face's, or of PEFT's."""
    model, tokenizer = state.model, state.tokenizer
    end = tokenizer.decode([tokenizer.eos])
    if model.lora_rank:
        writer.json(ADAPTER_CONFIG, published_adapter(model, str(base_of(model.init_from).resolve())))
    else:
        writer.json("config.json", published_config(model, model.vocab_size or tokenizer.vocab_size, tokenizer.eos))
    if model.arch != "bert" and not model.lora_rank:
        writer.json("generation_config.json", {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos})
    writer.text("tokenizer.json", tokenizer.json)
    writer.json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            **({} if tokenizer.mask is None else {"mask_token": tokenizer.decode([tokenizer.mask])}),
            **({"chat_template": state.template.source, **state.template.words} if state.template else {}),
            "model_max_length": model.context_length,
            "clean_up_tokenization_spaces": False,
        },
    )


def prune(parent: Path, keep: int, keep_best: bool) -> None:
    """Remove all but the `keep` newest checkpoints and, with `keep_best`, the one with the lowest evaluation loss."""
    found = checkpoints(parent)
    wanted = set(found[-keep:] if keep else found)
    if keep_best:
        losses = [
            (loss, folder) for folder in found if (loss := evaluation_loss(folder)) is not None and loss == loss
        ]  # no nan
        wanted |= {min(losses)[1]} if losses else set()
    for folder in found:
        if folder not in wanted:
            remove(folder)


def set_aside(folders: Iterable[Path]) -> list[Path]:
    """Rename checkpoints that are not whole, so that their names are free when the run comes to their steps again.
    Returns the new names."""
    aside: list[Path] = []
    for folder in folders:
        names = (folder.with_name(f"broken-{n}-{folder.name}") for n in range(1, 10**6))
        aside.append(folder.rename(next(name for name in names if not name.exists())))
    return aside


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed job has left half-written or half-removed."""
    for folder in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def evaluation_loss(folder: Path) -> float | None:
    """The evaluation loss noted in a checkpoint."""
    try:
        return read_json(folder / "trainer.json").get("eval_loss")
    except UserError:
        return None


def remove(folder: Path) -> None:
    """Take a checkpoint away: renamed first, so that a half-removed one does not look whole."""
    doomed = folder.parent / f"{TEMPORARY}removing-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):  # one checkpoint too many is no reason to stop
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
