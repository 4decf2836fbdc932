"""Cost of a checkpoint: writing and reading against the raw disk, and the time that training waits for an asynchronous save."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.measure import (
    BENCH,
    MAX_OTHER_CORES,
    MAX_ROUNDS,
    Load,
    format_ratio,
    make_config,
    make_reduce,
    mpirun,
    print_table,
)

BLOCK = 16 << 20
BEFORE, AFTER = 3, 6  # steps before a save, and beside its writing
SHAPE = {  # 110 million parameters, 4,096 tokens per step
    "model__context_length": 512, "model__vocab_size": 32768, "data__tokenizer": "bytes", "train__global_batch": 8,
    "train__micro_batch": 2, "train__threads": 1, "checkpoint__keep": 1, "checkpoint__keep_best": False,
    "checkpoint__every": 100,
}  # fmt: skip


def checkpoint(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        words = ["--rounds", str(args.rounds), "--folder", folder]
        subprocess.run([*mpirun(2), sys.executable, BENCH, "checkpoint-worker", *words], check=True)


def checkpoint_worker(args: argparse.Namespace) -> None:
    from mpilm.checkpoint.manager import CheckpointManager
    from mpilm.checkpoint.save import PendingCheckpoint
    from mpilm.checkpoint.verify import run_on_root_with_verify
    from mpilm.comm.mpi import mpi_world
    from mpilm.engine.train_model import load_checkpoint_state
    from mpilm.trainer.build import build_run
    from mpilm.trainer.run import collect_state

    comm = mpi_world()
    run = build_run(make_config(f"{args.folder}/run", "llama-100m", **SHAPE), comm)
    run.mesh.check_calls(False)
    checkpoints, make_state = run.folder.checkpoints, partial(collect_state, run)
    manager = CheckpointManager(
        checkpoints, run.config.checkpoint, run.mesh.world, run.recorder, make_state, lambda *_: None, lambda message: None
    )
    manager.reserve_memory(run.folder.step, run.config.train.steps)
    folder = Path(args.folder)
    share = run.model.saved_bytes // comm.size
    found: dict[str, list[float]] = {}
    reduce = make_reduce(comm)

    def read(path: Path) -> None:
        run_on_root_with_verify(comm, lambda verify: verify(path))
        load_checkpoint_state(run.model, path, 1, comm)

    for number in range(MAX_ROUNDS):
        load = Load(reduce)
        took = time_save(run, manager, comm, 1 + number * (BEFORE + AFTER))
        took["write"] = timed(
            comm, lambda number=number: PendingCheckpoint(folder / "saved", number, make_state(number, None), comm).finalize()
        )
        took["write raw"] = timed(comm, lambda: write_raw(folder / f"raw-{comm.rank}", share))
        (path,) = (folder / "saved").iterdir()
        drop_page_cache(comm, path)
        took["read"] = timed(comm, lambda path=path: read(path))
        took["read raw"] = timed(comm, lambda: read_raw(folder / f"raw-{comm.rank}"))
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(path)
        other_cores = reduce(load.other_cores(), "max")
        if number and other_cores < MAX_OTHER_CORES:  # the first round is a warm-up
            for name, seconds in took.items():
                found.setdefault(name, []).append(seconds)
        if len(found.get("step", [])) == args.rounds:
            break
    else:
        raise SystemExit("too many rounds were void; run this on a quiet machine")
    if comm.rank == 0:
        print_times(found, run.model.saved_bytes)


def print_times(found: dict[str, list[float]], nbytes: int) -> None:
    def divide(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(found[one], found[other])]

    rows = [("", "median s", "lowest .. highest", "")] + [format_ratio(name, seconds, "") for name, seconds in found.items()]
    print_table(f"checkpoint of {nbytes / 2**30:.2f} GiB, 2 ranks, {len(found['step'])} rounds", rows)
    print_table("ratios", [
        ("ratio", "median", "lowest .. highest", "goal"),
        format_ratio("write raw / write with hashing", divide("write raw", "write"), ">= 0.80"),
        format_ratio("read raw / read, check and load", divide("read raw", "read"), ""),
        format_ratio("training waits for a save / a step", divide("waited", "step"), "< 0.05"),
    ])  # fmt: skip
    print("JSON " + json.dumps({"what": "checkpoint", "times_s": found}))


def time_save(run, manager, comm, first: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Return the seconds of a step, and those that training waits for a save. The time that the writing takes from the steps
    beside it is less than their spread, and is not measured."""
    from mpilm.engine.step import StepFlags, train_step

    def step(number: int) -> float:
        def body() -> None:
            result = train_step(run.model, run.batches, number, StepFlags(0, manager.is_writing))
            manager.poll(result.flags.checkpoint_pending)

        return timed(comm, body)

    step_s = statistics.median([step(first + i) for i in range(BEFORE)])
    waited = timed(comm, lambda: manager.save(first + BEFORE, None))
    for i in range(AFTER):
        step(first + BEFORE + i)
    manager.close()
    return {"step": step_s, "waited": waited}


def timed(comm, body: Callable[[], object]) -> float:  # type: ignore[no-untyped-def]
    """Return the seconds until `body` has ended on all ranks."""
    comm.barrier()
    began = time.perf_counter()
    body()
    return make_reduce(comm)(time.perf_counter() - began, "max")


def write_raw(path: Path, nbytes: int) -> None:
    """Write and sync so many bytes, bypassing the page cache."""
    memory = mmap.mmap(-1, BLOCK)
    memory.write(os.urandom(BLOCK))
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_DIRECT", 0), 0o600)
    for at in range(0, nbytes, BLOCK):
        os.pwrite(handle, memory, at)
    os.fsync(handle)
    os.close(handle)


def read_raw(path: Path) -> None:
    memory = mmap.mmap(-1, BLOCK)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    while os.readv(handle, [memory]):
        pass
    os.close(handle)


def drop_page_cache(comm, folder: Path) -> None:  # type: ignore[no-untyped-def]
    """Remove the files of a folder from the page cache."""
    for path in folder.iterdir() if comm.rank == 0 else ():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
