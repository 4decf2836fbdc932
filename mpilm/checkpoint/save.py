"""Saving: ranks copy their state into blocks, hash and write them in parallel, and rank 0 commits the folder by a rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.format import (
    PARAMETER,
    TEMPORARY,
    CheckpointFolder,
    TensorShape,
    checkpoint_name,
    count_blocks,
    manifest_entry,
)
from mpilm.checkpoint.plan import HEADER, ByteRange, FileBlock, Parts, ShardOwners, plan_blocks, plan_files, plan_indexes
from mpilm.checkpoint.pretrained import find_base_model
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.config.schema import ModelConfig
from mpilm.data.chat import ChatTemplate
from mpilm.data.tokenizer import Tokenizer
from mpilm.errors import FileError, NonFiniteError, RanksDisagreeError, UserError
from mpilm.model.hf.config import ADAPTER_CONFIG, hf_adapter_config, hf_config
from mpilm.parallel.digests import CAUSE, sum_bits
from mpilm.parallel.flat_layout import ParamSlice

TAG = 5  # one tag is enough: two ranks send and receive their messages in the order of blocks
BLOCKS_IN_FLIGHT = 2  # in exchange at once, per rank
UNCHANGED = "older checkpoints are unchanged"

AssembledBlock = tuple[FileBlock, Tensor]  # a block and its bytes, uint8 in host memory


@dataclass(frozen=True)
class CheckpointState:
    """Everything that a checkpoint holds, as far as this rank has it."""

    model: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    trainer: Mapping[str, Any]  # trainer.json: step, tokens, config, versions, ...
    # Both by kind: PARAMETER, in model order and without second uses of tied parameters, or a kind of moment.
    shapes: Mapping[str, Mapping[str, TensorShape]]  # global, of the whole model
    slices: Mapping[str, Mapping[ParamSlice, Tensor]]  # of this rank; flat, contiguous, float32, on any device
    shard_owners: ShardOwners  # the same on all ranks; ranges cover a parameter in order, each owner has a slice with all of it
    parts: Parts = field(default_factory=dict)
    check: Callable[[], None] = lambda: None  # collective; raises CollectiveError if the slices hold wrong values


class PendingCheckpoint:
    """A checkpoint being saved below `parent`, a folder that all ranks see. The constructor copies the state into `buffers`, a
    thread writes it without messages to other ranks, and `poll` or `finalize` commits it. Without `buffers`, the constructor
    writes block by block, with neither copies nor a thread. Then it checks the state. All three are collective and raise
    CollectiveError on all ranks. An existing checkpoint is never overwritten."""

    def __init__(self, parent: Path, step: int, state: CheckpointState, comm: Comm, buffers: WriteBuffers | None = None):
        self.step, self.final, self.took_s = step, parent / checkpoint_name(step), 0.0  # took_s: to copy and to write
        self.state, self.comm, self._began_s = state, comm, time.perf_counter()
        self.work: Future[None] = Future()  # what this rank writes at the moment
        self._folder_writer = CheckpointFolder(parent / f"{TEMPORARY}{self.final.name}")
        self._files = plan_files(state.model, state.shapes, state.parts)
        self._digests = torch.zeros(sum(count_blocks(file.nbytes) for file in self._files), 32, dtype=torch.uint8)
        self._committing = False
        self._copied: dict[int, int] = {}  # sums of the bits of the copies in `buffers`, by block
        nbytes = sum(file.nbytes for file in self._files)
        run_on_root(comm, lambda: _make_folder(self.final, self._folder_writer.folder, nbytes))
        plan = plan_blocks(self._files, state.shard_owners, comm.size)
        local = LocalState(state.slices, {file.name: file.header for file in self._files})
        blocks: Iterable[AssembledBlock] = assemble_blocks(plan, local, comm, buffers)
        if buffers is None:
            with ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
                self._run(partial(self._write, blocks, hasher))
        else:
            blocks = list(blocks)
            self._copied = {block.number: _sum_words(data) for block, data in blocks}
        try:
            state.check()  # after the copy: memory that is right now was right then
        except CollectiveError:
            self._discard()
            raise
        if buffers is not None:
            self._start_thread(partial(self._write, blocks))

    def poll(self) -> bool:
        """Wait for this rank's writing; then start the commit on rank 0, or return True if that has succeeded."""
        try:
            run_on_all_ranks(self.comm, self.work.result)
        except CollectiveError:
            self._discard()  # a partial checkpoint would only take the space that the next one needs
            raise
        if self._committing:
            return True
        self.comm.all_reduce(self._digests.view(torch.int64))  # the row of a block is zero on all ranks but its writer
        if self.comm.rank == 0:
            self._start_thread(self._commit)
        self._committing = True
        return False

    def _discard(self) -> None:
        """Remove the folder, in which no rank is writing any more."""
        if self.comm.rank == 0:
            shutil.rmtree(self._folder_writer.folder, ignore_errors=True)

    def finalize(self) -> Path:
        """Wait until the checkpoint is complete, and return its folder."""
        while not self.poll():
            pass
        return self.final

    def _start_thread(self, action: Callable[[], None]) -> None:
        """Run `action` in a thread that takes only the processor time that training leaves."""

        def body() -> None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            self._run(action)

        self.work = Future()
        threading.Thread(target=body, name="checkpoint", daemon=True).start()

    def _run(self, action: Callable[[], None]) -> None:
        """Run `action`, and keep any error for `poll`, in which the ranks agree on it."""
        try:
            with _naming_checkpoint(self.final):
                action()
            self.work.set_result(None)
        except BaseException as error:
            self.work.set_exception(error)

    def _write(self, blocks: Iterable[AssembledBlock], hasher: ThreadPoolExecutor | None = None) -> None:
        """Write and hash this rank's blocks and, on rank 0, the metadata. `hasher` hashes a block while it is written."""
        waited_s = _scheduler_wait_s()
        failure: OSError | UserError | None = None
        with contextlib.closing(FileBlockWriter(self._folder_writer.folder)) as writer:
            for block, data in blocks:  # to the end even after a failure, because other ranks send to this one
                digest = hasher and hasher.submit(sha256_tensor, data)
                try:
                    if failure is None:
                        writer.write(block, data)
                except OSError as error:
                    failure = error
                self._digests[block.number] = digest.result() if digest else sha256_tensor(data)
                if self._copied.get(block.number) not in (None, _sum_words(data)):
                    problem = f"{self.final / block.file.name}: its copy in memory changed before it was written"
                    failure = RanksDisagreeError(f"{problem}: {CAUSE}; {UNCHANGED} (on {socket.gethostname()})")
                failure = failure or self._find_non_finite(block, data)
        if failure is not None:
            raise failure
        if self.comm.rank == 0:
            _write_metadata(self._folder_writer, self.state, plan_indexes(self._files))
        self.took_s = max(0.0, time.perf_counter() - self._began_s - (_scheduler_wait_s() - waited_s))

    def _find_non_finite(self, block: FileBlock, data: Tensor) -> NonFiniteError | None:
        """Return the error if a block holds non-finite numbers, which would replace the last good checkpoint."""
        for rank, ranges in block.parts.items():
            for r in ranges:
                kind, name = r.key
                if kind == HEADER:
                    continue
                x = r.view(data, block.offset).view(torch.float32)
                # The sum is finite for all but huge values, and takes a thirtieth of the time.
                if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
                    what = name if kind == PARAMETER else f"{name} ({kind})"
                    problem = f"after step {self.step} {what} of rank {rank} is not finite, although loss and gradient were"
                    advice = "A processor or its memory may be failing, or --train.lr is too high"
                    return NonFiniteError(f"{problem}; nothing of it is saved, and {UNCHANGED}. {advice}")
        return None

    def _commit(self) -> None:
        for file, rows in zip(self._files, self._digests.split([count_blocks(file.nbytes) for file in self._files])):
            self._folder_writer.entries[file.name] = manifest_entry(file.nbytes, rows.numpy().tobytes())
        self._folder_writer.commit(self.final)


def _sum_words(data: Tensor) -> int:
    return int(*sum_bits([data[: data.numel() // 4 * 4]]))


def _scheduler_wait_s() -> float:
    """Return how long this thread has waited for a core so far."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


@contextlib.contextmanager
def _naming_checkpoint(final: Path) -> Iterator[None]:
    """Turn an OSError into a FileError that names the checkpoint."""
    try:
        yield
    except OSError as error:
        reason = "not all ranks see its folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise FileError(f"checkpoint {final} could not be written: {reason}; {UNCHANGED}") from None


def _make_folder(final: Path, temporary: Path, nbytes: int) -> None:
    if final.exists():
        raise FileError(f"checkpoint {final} already exists, written by another job: two jobs use the same --run.dir")
    with _naming_checkpoint(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
    if free < nbytes:
        temporary.rmdir()
        needed, has = f"{nbytes / 2**20:,.1f} MiB", f"{free / 2**20:,.1f} MiB"
        raise FileError(f"checkpoint {final} needs {needed}, but only {has} are free there; {UNCHANGED}")


def _write_metadata(writer: CheckpointFolder, state: CheckpointState, indexes: Iterable[tuple[str, Any]]) -> None:
    """Write the files that make the folder one of Hugging Face's, or of PEFT's, and trainer.json."""
    model, tokenizer = state.model, state.tokenizer
    end = tokenizer.decode([tokenizer.eos])
    if model.lora_rank:
        base = str(find_base_model(model.init_from, model.base).resolve())
        writer.write_json(ADAPTER_CONFIG, hf_adapter_config(model, base))
    else:
        writer.write_json("config.json", hf_config(model, model.vocab_size or tokenizer.vocab_size, tokenizer.eos))
        if model.arch != "bert":
            writer.write_json("generation_config.json", {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos})
    writer.write_bytes("tokenizer.json", tokenizer.json.encode())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    config |= {} if tokenizer.mask is None else {"mask_token": tokenizer.decode([tokenizer.mask])}
    config |= {"chat_template": state.template.source, **state.template.special_tokens} if state.template else {}
    config |= {"model_max_length": model.context_length, "clean_up_tokenization_spaces": False}
    writer.write_json("tokenizer_config.json", config)
    for name, index in indexes:
        writer.write_json(name, index)
    writer.write_json("trainer.json", dict(state.trainer))


class LocalState:
    """The bytes that this rank holds: its slices of each kind of tensor, and the headers of all files."""

    def __init__(self, kinds: Mapping[str, Mapping[ParamSlice, Tensor]], headers: Mapping[str, bytes]):
        self._slices: dict[tuple[str, str], list[tuple[int, int, Tensor]]] = defaultdict(list)  # first byte, end, data
        for kind, tensors in kinds.items():
            for piece, tensor in tensors.items():
                if tensor.dtype != torch.float32 or tensor.numel() != piece.numel:
                    raise ValueError(f"{kind} {piece} is held in a tensor of {tensor.numel()} x {tensor.dtype}")
                start, stop = piece.start * tensor.itemsize, piece.stop * tensor.itemsize
                self._slices[kind, piece.name].append((start, stop, tensor.detach().view(-1).view(torch.uint8)))
        for name, header in headers.items():
            self._slices[HEADER, name] = [(0, len(header), torch.frombuffer(bytearray(header), dtype=torch.uint8))]

    def bytes_of(self, r: ByteRange) -> Tensor:
        """Return a view, which may lie on a device. Raises KeyError if this rank does not hold the range."""
        for start, stop, data in self._slices.get(r.key, ()):
            if start <= r.start and r.start + r.nbytes <= stop:
                return data[r.start - start :][: r.nbytes]
        raise KeyError(f"{' '.join(r.key)}: bytes from {r.start} on are not on this rank, an owner by `shard_owners`")


def allocate_pages(nbytes: int) -> Tensor:
    """Allocate page-aligned memory, as direct I/O requires. It is private: shared memory is not counted as a rank's own."""
    return torch.frombuffer(mmap(-1, max(1, nbytes), flags=MAP_PRIVATE | MAP_ANONYMOUS), dtype=torch.uint8)[:nbytes]


class WriteBuffers(dict[int, Tensor]):
    """Memory for this rank's blocks, by number, kept for the next checkpoint because the kernel is slow to hand out pages."""

    def reserve(self, state: CheckpointState, comm: Comm) -> None:
        """Allocate and touch the memory that copies of such a state need, so that the first save does not wait for it."""
        for block in plan_blocks(plan_files(state.model, state.shapes, state.parts), state.shard_owners, comm.size):
            if block.writer == comm.rank:
                self.allocate(block).zero_()

    def allocate(self, block: FileBlock) -> Tensor:
        if block.number not in self or self[block.number].numel() != block.nbytes:
            self[block.number] = allocate_pages(block.nbytes)
        return self[block.number]


def assemble_blocks(
    plan: Iterable[FileBlock], local: LocalState, comm: Comm, buffers: WriteBuffers | None = None
) -> Iterator[AssembledBlock]:
    """Yield the blocks that this rank writes, in order. Collective: iterate to the end. Every rank finishes its oldest block
    first. So the messages of the first unfinished block of all are always posted, which excludes a deadlock, and without
    `buffers` at most BLOCKS_IN_FLIGHT blocks are in memory."""
    in_flight: deque[Iterator[AssembledBlock | None]] = deque()
    for block in plan:
        if comm.rank == block.writer or comm.rank in block.parts:
            in_flight.append(_exchange_block(block, local, comm, buffers))
            next(in_flight[-1])
        if len(in_flight) == BLOCKS_IN_FLIGHT:
            yield from filter(None, in_flight.popleft())
    while in_flight:
        yield from filter(None, in_flight.popleft())


def _exchange_block(
    block: FileBlock, local: LocalState, comm: Comm, buffers: WriteBuffers | None
) -> Iterator[AssembledBlock | None]:
    """Start to send ranges of the block, or to receive them; yield None. Then wait and, on the writer, yield the block."""
    if comm.rank != block.writer:
        request = comm.isend(torch.cat([local.bytes_of(r) for r in block.parts[comm.rank]]).cpu(), block.writer, TAG)
        yield None
        request.wait()
        return
    sizes = {rank: sum(r.nbytes for r in ranges) for rank, ranges in block.parts.items() if rank != comm.rank}
    messages = {rank: torch.empty(nbytes, dtype=torch.uint8) for rank, nbytes in sizes.items()}
    requests = {rank: comm.irecv(message, rank, TAG) for rank, message in messages.items()}
    yield None
    data = allocate_pages(block.nbytes) if buffers is None else buffers.allocate(block)
    for rank, ranges in block.parts.items():
        if rank != comm.rank:
            requests[rank].wait()
        parts = map(local.bytes_of, ranges) if rank == comm.rank else messages[rank].split([r.nbytes for r in ranges])
        for r, part in zip(ranges, parts):
            place = r.view(data, block.offset)
            place.copy_(part.view(place.shape))
    yield block, data


def sha256_tensor(data: Tensor) -> Tensor:
    """Return the sha256 of a uint8 tensor in host memory, as a tensor of 32 bytes."""
    return torch.frombuffer(bytearray(hashlib.sha256(data.numpy().data).digest()), dtype=torch.uint8)


class FileBlockWriter:
    """Writes blocks into the files of one folder, and syncs the files when it is closed. Whole pages bypass the page cache if
    the file system allows it: filling the cache costs several times the CPU time of hashing and evicts what the run reads."""

    def __init__(self, folder: Path):
        self._folder, self._stack = folder, contextlib.ExitStack()
        self._handles: dict[tuple[str, int], int] = {}  # by file name and flags

    def write(self, block: FileBlock, data: Tensor) -> None:
        """Write a block at its place in its file."""
        view, name, done = data.numpy().data, block.file.name, 0
        handle = self._open(name, os.O_CREAT)
        pages_bytes = len(view) // PAGESIZE * PAGESIZE
        try:
            if pages_bytes and block.offset % PAGESIZE == data.data_ptr() % PAGESIZE == 0:
                done = os.pwrite(self._open(name, getattr(os, "O_DIRECT", 0)), view[:pages_bytes], block.offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the answer of a file system without direct I/O
                raise
        while done < len(view):
            done += os.pwrite(handle, view[done:], block.offset + done)

    def _open(self, name: str, flags: int) -> int:
        if (name, flags) not in self._handles:
            self._handles[name, flags] = os.open(self._folder / name, os.O_WRONLY | flags, 0o666)
            self._stack.callback(os.close, self._handles[name, flags])
        return self._handles[name, flags]

    def close(self) -> None:
        with self._stack:
            for (_, flags), handle in self._handles.items():
                if flags == os.O_CREAT:
                    os.fsync(handle)
