"""Made-up models, cut up and dealt out at random, for tests of checkpoints on threads and on MPI."""

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

from mpilm.checkpoint import format, save, verify
from mpilm.checkpoint.load import load
from mpilm.checkpoint.save import State
from mpilm.checkpoint.tensors import find, open_tensors
from mpilm.comm.base import Comm
from mpilm.config import Model
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.model.families import tied_parameters
from mpilm.model.hf.config import hf_config
from mpilm.model.hf.names import hf_name
from mpilm.parallel.flat_layout import ParamSlice

Shapes = dict[str, tuple[int, ...]]
Sharding = Mapping[str, list[tuple[int, int, list[int]]]]
Tensors = Mapping[str, Mapping[str, Tensor]]  # kind -> parameter -> values

NAMES = ("attn_norm", "attn.q", "attn.k", "attn.v", "attn.o", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down")
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
SMALL_DIMS = (0, 1, 2, 3, 7, 16)


@contextlib.contextmanager
def small_files(block_bytes: int, max_shard_bytes: int = save.MAX_SHARD_BYTES) -> Iterator[None]:
    """Blocks and files so small that even made-up models have many."""
    with contextlib.ExitStack() as stack:
        for module in (save, format, verify):
            stack.enter_context(mock.patch.object(module, "BLOCK_BYTES", block_bytes))
        stack.enter_context(mock.patch.object(save, "MAX_SHARD_BYTES", max_shard_bytes))
        yield


def draw_shapes(random: Random, most: int = 6) -> Shapes:
    names = ["embed.weight", *(f"blocks.{i}.{name}.weight" for i in range(2) for name in NAMES), "norm.weight"]
    chosen = sorted(random.sample(names, random.randint(1, most)), key=names.index)
    return {name: tuple(random.choice(SMALL_DIMS) for _ in range(random.randint(0, 2))) for name in chosen}


def draw_sharding(random: Random, shapes: Shapes, size: int) -> Sharding:
    """Each parameter in random ranges, each held by some of `size` ranks."""
    found = {}
    for name, shape in shapes.items():
        numel = prod(shape)
        cuts = sorted(random.randint(0, numel) for _ in range(random.randint(0, 3)))
        ends = [0, *cuts, numel]
        held_by = [sorted(random.sample(range(size), random.randint(1, size))) for _ in ends[1:]]
        found[name] = list(zip(ends, ends[1:], held_by))
    return found


def held_by_all(shapes: Shapes, size: int) -> Sharding:
    return {name: [(0, prod(shape), list(range(size)))] for name, shape in shapes.items()}


def striped(shapes: Shapes, size: int, elements: int, first: int = 0) -> Sharding:
    """Stripes of so many elements in turn to each rank, beginning with rank `first`: every block has many givers."""
    return {
        name: [
            (at, min(at + elements, prod(shape)), [(first + at // elements) % size]) for at in range(0, prod(shape), elements)
        ]
        for name, shape in shapes.items()
    }


def draw_tensors(shapes: Shapes) -> Tensors:
    """Values that are all different, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}


def intervals(sharding: Sharding, name: str, rank: int) -> list[tuple[int, int]]:
    """What `rank` holds of a parameter, neighbours joined: ranges may lie in larger pieces."""
    found: list[tuple[int, int]] = []
    for start, stop, ranks in sharding[name]:
        if rank in ranks:
            joined = found and found[-1][1] == start
            found[-1:] = [(found[-1][0], stop)] if joined else [*found[-1:], (start, stop)]
    return found


def pieces(tensors: Mapping[str, Tensor], sharding: Sharding, rank: int) -> dict[ParamSlice, Tensor]:
    return {
        ParamSlice(name, start, stop): tensor.reshape(-1)[start:stop].clone()
        for name, tensor in tensors.items()
        for start, stop in intervals(sharding, name, rank)
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def state_of(tensors: Tensors, sharding: Sharding, rank: int) -> State:
    parameters, *moments = (pieces(tensors[kind], sharding, rank) for kind in KINDS)
    return State(
        model=tiny_config(Path(), Path()).model,
        tokenizer=bytes_tokenizer(),
        template=None,
        trainer={"step": 7},
        shapes=shapes_of(tensors["parameter"]),
        moment_shapes={kind: shapes_of(tensors[kind]) for kind in KINDS[1:]},
        parameters=parameters,
        moments=dict(zip(KINDS[1:], moments)),
        holders=sharding.__getitem__,
    )


def saved(parent: Path, tensors: Tensors, sharding: Sharding, comm: Comm, step: int = 7) -> Path:
    return save.save(parent, step, state_of(tensors, sharding, comm.rank), comm)


def loads_the_same(folder: Path, tensors: Tensors, sharding: Sharding, comm: Comm) -> None:
    """Every piece of this rank comes back with the values that were saved, whatever the sharding then was."""
    expected = state_of(tensors, sharding, comm.rank)
    parameters = {piece: torch.full_like(tensor, -1.0) for piece, tensor in expected.parameters.items()}
    moments = {
        kind: {piece: torch.full_like(tensor, -1.0) for piece, tensor in of.items()} for kind, of in expected.moments.items()
    }
    load(folder, parameters, moments, expected.shapes, expected.moment_shapes, expected.model, comm)
    for found, wanted in zip((parameters, *moments.values()), (expected.parameters, *expected.moments.values())):
        assert all(torch.equal(found[piece], wanted[piece]) for piece in wanted)


def read_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Fill whole tensors by their names in a safetensors file, or in the files of a folder."""
    with open_tensors(path) as slots:
        for name, tensor in wanted.items():
            find(slots, name, tuple(tensor.shape), path).read(tensor)


def write_published(folder: Path, model: nn.Module, shape: Model, vocab_size: int) -> None:
    """A Hugging Face folder with a whole model."""
    own = {name: p.detach().contiguous() for name, p in model.named_parameters() if name not in tied_parameters(shape)}
    folder.mkdir(exist_ok=True)
    save_file({hf_name(name, shape.arch): p for name, p in own.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(shape, vocab_size, 7)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
