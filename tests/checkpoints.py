"""Small models with random sharding, for tests of checkpoints on threads and on MPI."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from random import Random
from unittest import mock

import torch
from safetensors.torch import save_file
from text import tiny_config
from torch import Tensor, nn

from mpilm.checkpoint import format, plan, save
from mpilm.checkpoint.format import PARAMETER
from mpilm.checkpoint.load import load_checkpoint, lookup_tensor, open_tensors
from mpilm.checkpoint.save import CheckpointState
from mpilm.comm.base import Comm
from mpilm.config.schema import ModelConfig
from mpilm.data import gather
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.model.families import tied_parameters
from mpilm.model.hf.config import hf_config
from mpilm.model.hf.names import hf_name
from mpilm.parallel.flat_layout import ParamSlice

Shapes = dict[str, tuple[int, ...]]
Sharding = Mapping[str, list[tuple[int, int, list[int]]]]  # parameter -> (first element, end, owners)
Tensors = Mapping[str, Mapping[str, Tensor]]  # kind -> parameter -> values

NAMES = ("attn_norm", "attn.q", "attn.k", "attn.v", "attn.o", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down")
KINDS = (PARAMETER, "exp_avg", "exp_avg_sq")
SMALL_DIMS = (0, 1, 2, 3, 7, 16)


@contextlib.contextmanager
def small_files(block_bytes: int, max_shard_bytes: int = plan.MAX_SHARD_BYTES) -> Iterator[None]:
    """Make blocks and files so small that even tiny models have many."""
    with contextlib.ExitStack() as stack:
        for module in (plan, format, gather):
            stack.enter_context(mock.patch.object(module, "BLOCK_BYTES", block_bytes))
        stack.enter_context(mock.patch.object(plan, "MAX_SHARD_BYTES", max_shard_bytes))
        yield


def draw_shapes(random: Random, most: int = 6) -> Shapes:
    names = ["embed.weight", *(f"blocks.{i}.{name}.weight" for i in range(2) for name in NAMES), "norm.weight"]
    chosen = sorted(random.sample(names, random.randint(1, most)), key=names.index)
    return {name: tuple(random.choice(SMALL_DIMS) for _ in range(random.randint(0, 2))) for name in chosen}


def draw_tensors(shapes: Shapes) -> Tensors:
    """Draw values that are all different and the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}


def draw_sharding(random: Random, shapes: Shapes, size: int) -> Sharding:
    """Cut each parameter into random ranges, each owned by some of `size` ranks."""
    sharding = {}
    for name, shape in shapes.items():
        cuts = sorted(random.randint(0, prod(shape)) for _ in range(random.randint(0, 3)))
        ends = [0, *cuts, prod(shape)]
        owners = [sorted(random.sample(range(size), random.randint(1, size))) for _ in ends[1:]]
        sharding[name] = list(zip(ends, ends[1:], owners))
    return sharding


def replicate(shapes: Shapes, size: int) -> Sharding:
    """Let every rank own everything."""
    return {name: [(0, prod(shape), list(range(size)))] for name, shape in shapes.items()}


def stripe(shapes: Shapes, size: int, elements: int, first: int = 0) -> Sharding:
    """Deal stripes of so many elements to ranks in turn, from rank `first` on, so that every block has many sources."""
    return {
        name: [
            (at, min(at + elements, prod(shape)), [(first + at // elements) % size]) for at in range(0, prod(shape), elements)
        ]
        for name, shape in shapes.items()
    }


def slice_tensors(tensors: Mapping[str, Tensor], sharding: Sharding, rank: int) -> dict[ParamSlice, Tensor]:
    """Return what `rank` owns, with neighbouring ranges joined: a range may be part of a larger slice."""
    slices = {}
    for name, tensor in tensors.items():
        intervals: list[tuple[int, int]] = []
        for start, stop, owners in sharding[name]:
            if rank in owners:
                joined = intervals and intervals[-1][1] == start
                intervals[-1:] = [(intervals[-1][0], stop)] if joined else [*intervals[-1:], (start, stop)]
        slices |= {ParamSlice(name, start, stop): tensor.reshape(-1)[start:stop].clone() for start, stop in intervals}
    return slices


def make_state(tensors: Tensors, sharding: Sharding, rank: int) -> CheckpointState:
    return CheckpointState(
        model=tiny_config(Path(), Path()).model,
        tokenizer=bytes_tokenizer(),
        template=None,
        trainer={"step": 7},
        shapes={kind: {name: tuple(x.shape) for name, x in values.items()} for kind, values in tensors.items()},
        slices={kind: slice_tensors(values, sharding, rank) for kind, values in tensors.items()},
        shard_owners=sharding,
    )


def save_tensors(parent: Path, tensors: Tensors, sharding: Sharding, comm: Comm, step: int = 7) -> Path:
    return save.PendingCheckpoint(parent, step, make_state(tensors, sharding, comm.rank), comm).finalize()


def assert_loads(folder: Path, tensors: Tensors, sharding: Sharding, comm: Comm) -> None:
    """Assert that this rank reads the values that were saved, whatever the sharding was then."""
    state = make_state(tensors, sharding, comm.rank)
    slices = {kind: {piece: torch.full_like(x, -1.0) for piece, x in of.items()} for kind, of in state.slices.items()}
    load_checkpoint(folder, slices, state.shapes, state.model, comm)
    for kind, expected in state.slices.items():
        assert all(torch.equal(slices[kind][piece], x) for piece, x in expected.items())


def read_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Fill tensors from those of their names in a safetensors file or a folder."""
    with open_tensors(path) as refs:
        for name, tensor in wanted.items():
            lookup_tensor(refs, name, tuple(tensor.shape), path).read(tensor)


def write_hf_model(folder: Path, model: nn.Module, shape: ModelConfig, vocab_size: int) -> None:
    """Write a model as a Hugging Face folder."""
    own = {name: p.detach().contiguous() for name, p in model.named_parameters() if name not in tied_parameters(shape)}
    folder.mkdir(exist_ok=True)
    save_file({hf_name(name, shape.arch): p for name, p in own.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(shape, vocab_size, 7)))


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
