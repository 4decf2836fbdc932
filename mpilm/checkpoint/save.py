"""Write a checkpoint: the ranks that hold the pieces share the writing, under a temporary name; then one rename. And remove
checkpoints no longer wanted."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.assemble import Buffers, Held, assemble, fresh
from mpilm.checkpoint.blocks import BlockWriter, digest_of
from mpilm.checkpoint.format import (
    BLOCK_BYTES,
    TEMPORARY,
    Point,
    Writer,
    checkpoints,
    folder_name,
    manifest_entry,
    nowhere,
    read_json,
)
from mpilm.checkpoint.load import moment_name, weights_stem
from mpilm.checkpoint.plan import Block, Holders, StoredTensor, TensorFile, index_of, plan_blocks, tensor_files
from mpilm.checkpoint.pretrained import base_of
from mpilm.checkpoint.tensors import Shape
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.config import Model
from mpilm.data.template import Template
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import FileError, UserError
from mpilm.model.hf.adapter import ADAPTER_CONFIG, hf_adapter_config
from mpilm.model.hf.config import hf_config
from mpilm.model.hf.names import hf_name
from mpilm.parallel.flat_layout import ParamSlice

MAX_SHARD_BYTES = 5_000_000_000  # as transformers cuts models
PARAMETER = "parameter"
LEAST_PRIORITY = 19
Hash = Callable[[Tensor], Callable[[], Tensor]]  # begins, and gives the digest when it is asked for


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
    parameters: Mapping[ParamSlice, Tensor]
    moments: Mapping[str, Mapping[ParamSlice, Tensor]]
    holders: Holders


def save(parent: Path, step: int, state: State, comm: Comm, at: Point = nowhere) -> Path:
    """Write the checkpoint of `step` below `parent`, a folder that all ranks see; returns its folder. Collective over the
    world; raises AgreedError on all ranks alike.

    An existing one is never written over.
    """
    return Saving(parent, step, state, comm, at, ahead=False).commit()


def reserve(buffers: Buffers, state: State, comm: Comm) -> None:
    """Have the memory that copies of such a state will lie in: the first save would wait for it."""
    buffers.again()
    for block in _plan(state, [file for group in _files(state).values() for file in group], comm):
        if block.writer == comm.rank:
            buffers.take(block.nbytes).zero_()


class Saving:
    """A checkpoint under way: copied by the constructor, written by a thread that talks to no other rank, and published by
    `commit`. Collective over the world; both raise AgreedError on all ranks alike. `at`: told of every point on the way.
    `ahead`: false: no copy and no thread; the constructor writes block by block. `buffers`: for the copy; nobody else's now."""

    def __init__(
        self, parent: Path, step: int, state: State, comm: Comm, at: Point = nowhere, ahead: bool = True,
        buffers: Buffers | None = None,
    ):  # fmt: skip
        self.step, self.state, self.comm, self.at = step, state, comm, at
        self._began, self.took_s = time.perf_counter(), 0.0  # copying and writing
        self.final = parent / folder_name(step)
        self.temporary = parent / f"{TEMPORARY}{self.final.name}"
        self.files = _files(state)
        tensor_files = [file for group in self.files.values() for file in group]
        self.counts = [file.blocks(BLOCK_BYTES) for file in tensor_files]
        at("checkpoint.open")
        run_on_root(comm, lambda: _prepare(self.final, self.temporary, sum(file.nbytes for file in tensor_files)))
        held = Held({PARAMETER: state.parameters, **state.moments}, tensor_files)
        blocks = assemble(_plan(state, tensor_files, comm), held, comm, buffers.again().take if buffers and ahead else fresh)
        self._digests = torch.zeros(sum(self.counts), 32, dtype=torch.uint8)  # a row a block
        self._writer = BlockWriter(self.temporary, at)
        self._words = Writer(self.temporary, at)  # on rank 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._agreed = False  # that all is written, and what the digests are
        if ahead:
            made = _copied(blocks)
            self._beside(lambda: self._write(made, lambda data: partial(digest_of, data)))
        else:  # beside steps, which have the cores, there would be nothing to gain
            with ThreadPoolExecutor(1, "checkpoint-hash") as pool:
                self._write(blocks, lambda data: pool.submit(digest_of, data).result)

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def _beside(self, action: Callable[[], None]) -> None:
        """Do it in a thread, to which the steps leave what they do not need."""

        def body() -> None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
            try:
                action()
            except BaseException as error:  # whatever it is, `commit` must hear of it
                self._failure = error

        self._thread = threading.Thread(target=body, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, blocks: Iterator[tuple[Block, Tensor]], hash_of: Hash) -> None:
        """Write and hash; on rank 0 also what it writes alone, but for the manifest."""
        waited_s = _waited_s()
        with self._writer:
            for block, data in blocks:
                digest = hash_of(data)
                self._writer.write(block, data)
                self._digests[block.number] = digest()
        if self.comm.rank == 0:
            try:
                self._write_words()
            except OSError as error:
                self._failure = error
        self.took_s = time.perf_counter() - self._began - (_waited_s() - waited_s)

    def abandon(self) -> None:
        """Wait for this rank's writing, and leave what there is; the next one to write here removes it."""
        if self._thread is not None:
            self._thread.join()

    def advance(self) -> bool:
        """The next step towards the end, when no rank is busy: agree that all is written, and what the digests are, and let
        rank 0 write the manifest and give the folder its name; or agree that this is done. Whether it is."""
        try:
            run_on_all_ranks(self.comm, self._check)
            if not self._agreed:
                self.comm.all_reduce(self._digests.view(torch.int64))  # rows of others are zero: the sum brings them together
                if self.comm.rank == 0:
                    self._beside(self._publish)
                self._agreed = True
                return False
        except CollectiveError:
            if self.comm.rank == 0:  # what is half-written only takes the space that the next one needs
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        return True

    def commit(self) -> Path:
        """Wait for it, and bring it to its end."""
        while True:
            if self._thread is not None:
                self._thread.join()
            if self.advance():
                return self.final

    def _check(self) -> None:
        with _writing(self.final):
            if self._failure is not None:
                raise self._failure
            self._writer.raise_error()

    def _write_words(self) -> None:
        _write_words(self._words, self.state)
        for stem, group in self.files.items():
            if len(group) > 1:
                self._words.json(f"{stem}.safetensors.index.json", index_of(group))
        self._words.json("trainer.json", dict(self.state.trainer))

    def _publish(self) -> None:
        names = [file for group in self.files.values() for file in group]
        for file, rows in zip(names, self._digests.split(self.counts)):
            self._words.entries[file.name] = manifest_entry(file.nbytes, rows.numpy().tobytes())
        self._words.all_gather_parameters(self.final)


def _waited_s() -> float:
    """How long this thread has waited for a core so far."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _copied(blocks: Iterator[tuple[Block, Tensor]]) -> Iterator[tuple[Block, Tensor]]:
    """The same, all of them made now; each is let go when it has been taken."""
    made = deque(blocks)
    return (made.popleft() for _ in range(len(made)))


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Turn an OSError inside into a FileError that names the checkpoint."""
    try:
        yield
    except OSError as error:
        reason = "not all ranks see its folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise FileError(f"checkpoint {final} could not be written: {reason}; the older ones are as they were") from None


def _prepare(final: Path, temporary: Path, nbytes: int) -> None:
    if final.exists():
        raise FileError(f"checkpoint {final} is there already, written by another job: two jobs work on one --run.dir")
    with _writing(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        room = shutil.disk_usage(temporary).free
    if room < nbytes:
        temporary.rmdir()
        raise FileError(
            f"checkpoint {final} needs {nbytes / 2**20:,.1f} MiB, and {room / 2**20:,.1f} MiB are free there; the older ones "
            "are as they were"
        )


def _files(state: State) -> dict[str, list[TensorFile]]:
    """By the stem of their names."""
    return {weights_stem(state.model): _model_files(state), "optimizer": _optimizer_files(state)}


def _plan(state: State, files: list[TensorFile], comm: Comm) -> Iterable[Block]:
    return plan_blocks(files, cache(state.holders), comm.size, BLOCK_BYTES)


def _model_files(state: State) -> list[TensorFile]:
    """In the reverse of the model's order, as the parameters lie in memory: neighbours here are mostly neighbours there."""
    tensors = [
        StoredTensor(hf_name(name, state.model.arch), (PARAMETER, name), shape) for name, shape in _backward(state.shapes)
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


def _write_words(writer: Writer, state: State) -> None:
    """What makes the folder one of Hugging Face's, or of PEFT's."""
    model, tokenizer = state.model, state.tokenizer
    end = tokenizer.decode([tokenizer.eos])
    if model.lora_rank:
        writer.json(ADAPTER_CONFIG, hf_adapter_config(model, str(base_of(model.init_from, model.base).resolve())))
    else:
        writer.json("config.json", hf_config(model, model.vocab_size or tokenizer.vocab_size, tokenizer.eos))
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
