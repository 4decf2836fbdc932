"""Write a checkpoint: under a temporary name, hashed, synced, renamed; then remove those no longer wanted."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpilm.checkpoint.format import TEMPORARY, Writer, checkpoints, folder_name, read_json, sync_folder
from mpilm.comm.base import Comm
from mpilm.comm.together import on_root
from mpilm.config import Model
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import FileError, UserError
from mpilm.model.huggingface import published_config, published_name


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: parameters and moments at global shape by name, and the words about them."""

    model: Model
    tokenizer: Tokenizer
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    trainer: Mapping[str, Any]  # trainer.json: step, tokens, data, versions, ...


def save(parent: Path, step: int, state: State, comm: Comm) -> Path:
    """Write the checkpoint of `step` below `parent`; returns its folder. Collective; raises on all ranks alike.

    An existing one is never written over.
    """
    final = parent / folder_name(step)
    on_root(comm, lambda: _write(final, state))
    return final


def _write(final: Path, state: State) -> None:
    if final.exists():
        raise FileError(f"checkpoint {final} is there already, written by another job: two jobs work on one --run.dir")
    temporary = final.parent / f"{TEMPORARY}{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(Writer(temporary), state)
        sync_folder(temporary)
        os.rename(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        raise FileError(f"checkpoint {final} could not be written: {error.strerror}; the older ones are as they were") from None


def _write_files(writer: Writer, state: State) -> None:
    tokenizer = state.tokenizer
    end = tokenizer.decode([tokenizer.eos])
    writer.json("config.json", published_config(state.model, tokenizer.vocab_size, tokenizer.eos))
    writer.json("generation_config.json", {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos})
    writer.text("tokenizer.json", tokenizer.json)
    writer.json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "model_max_length": state.model.context_length,
            "clean_up_tokenization_spaces": False,
        },
    )
    writer.tensors("model.safetensors", {published_name(k): v.cpu().numpy() for k, v in state.parameters.items()})
    moments = {f"{name}.{kind}": v.cpu().numpy() for kind, of in state.moments.items() for name, v in of.items()}
    writer.tensors("optimizer.safetensors", moments)
    writer.json("trainer.json", dict(state.trainer))
    writer.manifest()


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
