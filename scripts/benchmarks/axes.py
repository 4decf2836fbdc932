"""Speed of the axes beside data parallelism: each against data parallelism on the same ranks, and against torch's DTensor."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.compute import products_alone
from benchmarks.measure import BENCH, make_config, mpilm_side, mpirun, print_report, speed_ratios, time_sides
from benchmarks.speed import torch_side
from mpilm.model.moe import MixtureOfExperts
from mpilm.model.sequence_info import SequenceInfo

SHAPE = {  # blocks of width 1,024
    "model__d_model": 1024, "model__n_layers": 4, "model__n_heads": 16, "model__n_kv_heads": 16, "model__context_length": 512,
    "model__tie_embeddings": False, "train__global_batch": 4, "train__micro_batch": 1, "train__threads": 1,
}  # fmt: skip
LONG = {"model__n_layers": 1, "model__context_length": 8192, "train__global_batch": 2}


MIXTRAL = {  # Mixtral 8x7B with an eighth of its width and a sixteenth of its layers
    "model__arch": "mixtral", "model__n_experts": 8, "model__d_model": 512, "model__d_ff": 1792, "model__n_layers": 2,
    "model__n_heads": 16, "model__n_kv_heads": 4,
}  # fmt: skip


def axes(args: argparse.Namespace) -> None:
    _start_worker(args, "axes-worker")


def long_contexts(args: argparse.Namespace) -> None:
    _start_worker(args, "context-worker")


def experts(args: argparse.Namespace) -> None:
    _start_worker(args, "expert-worker")


def _start_worker(args: argparse.Namespace, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder, "--dtype", args.dtype or "float32"]
        subprocess.run([*mpirun(2), sys.executable, BENCH, name, *words], check=True)


def context_worker(args: argparse.Namespace) -> None:
    ways = {method: {"parallel__context": 2, "parallel__context_method": method} for method in ("ring", "ulysses")}
    title = "context 2: a block of width 1,024, 2 sequences of 8,192 tokens a step"
    _compare_with_data_parallelism(args, title, {**SHAPE, **LONG}, ways, ">= 0.85")


def expert_worker(args: argparse.Namespace) -> None:
    """As the router of a young model sends the tokens, and with as many tokens for each expert, as a trained one aims at."""
    title, ways = "2 blocks of width 512 with 8 experts, 512 tokens a microbatch", {"expert 2": {"parallel__expert": 2}}
    _compare_with_data_parallelism(args, f"expert 2: {title}", {**SHAPE, **MIXTRAL}, ways, "")
    with mock.patch.object(MixtureOfExperts, "route", route_evenly):
        _compare_with_data_parallelism(args, f"equal tokens: {title}", {**SHAPE, **MIXTRAL}, ways, ">= 0.90")


def route_evenly(mixture: MixtureOfExperts, flat: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
    """Deal the tokens to the experts in turn, with weights from the router."""
    probs = mixture.router(flat).softmax(dim=-1, dtype=torch.float32)
    chosen = torch.arange(len(flat) * mixture.top_k).view(-1, mixture.top_k) % mixture.n_experts
    weights = probs.gather(-1, chosen)
    return chosen, weights / weights.sum(dim=-1, keepdim=True)


def _compare_with_data_parallelism(
    args: argparse.Namespace, title: str, shape: dict[str, Any], ways: dict[str, dict[str, Any]], goal: str
) -> None:
    from mpilm.comm.mpi import mpi_world

    comm, sides = mpi_world(), {}
    for name, changes in {"data 2": {}, **ways}.items():
        config = make_config(f"{args.folder}/{title[:5]}-{name.replace(' ', '-')}", args.preset, **{**shape, **changes})
        sides[name] = mpilm_side(config, comm)
    times, void = time_sides(sides, args.rounds, comm)
    if comm.rank == 0:
        ratios = {f"{name} / data 2": (speed_ratios(times, "data 2", name), goal) for name in ways}
        print_report(title, times, ratios, void)


class Table(nn.Embedding):
    """An embedding that may be called with ids alone, as torch's plans do."""

    def forward(self, ids: Tensor, info: object = None) -> Tensor:
        return super().forward(ids)


def divide_by_dtensor(model: nn.Module) -> nn.Module:
    """Divide matrices, and tokens between them, over all ranks of torch.distributed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh, table = init_device_mesh("cpu", (2,)), model.get_submodule("embed").weight
    model.embed = Table(*table.shape, _weight=table.data)
    gathered = PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None))
    row, norm = RowwiseParallel(output_layouts=Shard(1)), SequenceParallel()
    block = {name: ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")}
    block |= {"attn": gathered, "mlp": gathered, "attn.o": row, "mlp.down": row, "attn_norm": norm, "mlp_norm": norm}
    for each in model.get_submodule("blocks").children():
        parallelize_module(each, mesh, block)
    ends = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": norm,
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, ends)


def axes_worker(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    from mpilm.comm.base import SelfComm
    from mpilm.comm.mpi import mpi_world
    from mpilm.model.flops import block_matrices

    comm = mpi_world()
    dist.init_process_group("gloo", init_method=f"file://{args.folder}/gloo", rank=comm.rank, world_size=comm.size)

    def side(name, comm=comm, **changes):  # type: ignore[no-untyped-def]
        return mpilm_side(make_config(f"{args.folder}/{name}", args.preset, **{**common, **changes}), comm)

    common = {**SHAPE, "train__dtype": args.dtype}
    alone, plain = {"train__global_batch": 2}, make_config(f"{args.folder}/plain", args.preset, **common)
    shape = plain.model
    numel = shape.n_layers * sum(inputs * outputs * copies for inputs, outputs, copies in block_matrices(shape))
    sides = {
        "data 2": side("data"),
        "tensor 2": side("tensor", parallel__tensor=2),
        "each rank alone, 1 part": side(f"one-{comm.rank}", SelfComm(), **alone),
        "each rank alone, 2 parts": side(f"two-{comm.rank}", SelfComm(), model__tensor_parts=2, **alone),
        "torch DTensor, gloo": torch_side(plain, wrap=divide_by_dtensor),
        "products of the blocks alone": products_alone(args.dtype, 6 * numel * 4 * 512 / comm.size),
    }
    times, void = time_sides(sides, args.rounds, comm)
    if comm.rank == 0:
        print_report(f"axes, {args.dtype}: 4 blocks of width 1,024, 512 tokens a microbatch, 2,048 tokens a step", times, {
            "tensor 2 / data 2": (speed_ratios(times, "data 2", "tensor 2"), ">= 0.85"),
            "2 parts / 1 part": (speed_ratios(times, "each rank alone, 1 part", "each rank alone, 2 parts"), ">= 0.95"),
            "tensor 2 / DTensor": (speed_ratios(times, "torch DTensor, gloo", "tensor 2"), ">= 1.30"),
            "products alone / DTensor": (speed_ratios(times, "torch DTensor, gloo", "products of the blocks alone"), ""),
        }, void)  # fmt: skip
    dist.destroy_process_group()
