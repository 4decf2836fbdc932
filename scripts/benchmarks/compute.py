"""Compute of 2 ranks against plain transformers and torch on the same two cores, in float32 and bfloat16."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from benchmarks.measure import BENCH, make_config, mpilm_side, mpirun, print_report, speed_ratios, time_sides

SHAPE = {
    "model__d_model": 768,
    "model__n_layers": 6,
    "model__n_heads": 12,
    "model__context_length": 512,
    "train__global_batch": 8,
    "train__micro_batch": 2,
}
VOCAB_SIZE = 2048
SEQUENCES, TOKENS = 8, 512


def transformers_step(dtype: str, compiles: bool, sequences: int, wrap: Callable = lambda model: model) -> Callable[[], None]:  # type: ignore[type-arg]
    """Return a training step of transformers' Llama as its users write it: autocast, clipping, torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=TOKENS, use_cache=False, tie_word_embeddings=True, **widths
    )
    torch.manual_seed(0)
    model = wrap(LlamaForCausalLM(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, VOCAB_SIZE, (sequences, TOKENS))

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]

    function = torch.compile(loss_of, dynamic=False) if compiles else loss_of

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = function(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        float(loss.detach())

    return step


def products_alone(dtype: str, flops: float) -> Callable[[int], None]:
    """Return a step that only multiplies large matrices, with as many operations as a rank's matrices need."""
    import torch

    x = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    count = round(flops / (2 * 2048**3))

    def step(number: int) -> None:
        for _ in range(count):
            x @ x

    return step


def on_both_cores(step: Callable[[], None] | None, folder: str, name: str) -> Callable[[int], None]:
    """Return a step of one process with two threads, for which the other rank, which has no `step`, waits asleep."""
    import torch

    def run(number: int) -> None:
        done = Path(folder, f"{name}-{number}")
        if step is None:
            while not done.exists():
                time.sleep(0.001)
            return
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        torch.set_num_threads(2)
        step()
        torch.set_num_threads(1)
        os.sched_setaffinity(0, own)
        done.touch()

    return run


def compute_worker(args: argparse.Namespace) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from mpilm.comm.mpi import mpi_world

    comm = mpi_world()
    dist.init_process_group("gloo", init_method=f"file://{args.folder}/gloo", rank=comm.rank, world_size=comm.size)
    for dtype in [args.dtype] if args.dtype else ["bfloat16", "float32"]:

        def side(kernels: str, dtype: str = dtype) -> Callable[[int], None]:
            folder, settings = f"{args.folder}/{dtype}-{kernels}", {**SHAPE, "train__dtype": dtype, "train__threads": 1}
            return mpilm_side(make_config(folder, args.preset, train__kernels=kernels, **settings), comm)

        sides = {"mpilm, 2 ranks": side("fused"), "mpilm, torch's kernels": side("torch")}
        for name, compiles in (("transformers, eager", False), ("transformers, compiled", True)):
            step = None if comm.rank else transformers_step(dtype, compiles, SEQUENCES)
            sides[name] = on_both_cores(step, args.folder, f"{dtype}-{compiles}")
        ddp = transformers_step(dtype, False, SEQUENCES // 2, DistributedDataParallel)
        sides["transformers, DDP, 2 ranks"] = lambda number, ddp=ddp: ddp()
        matrices = 6 * (4 * 768 * 768 + 3 * 768 * 2048) + 768 * VOCAB_SIZE
        sides["products alone"] = products_alone(dtype, 6 * matrices * SEQUENCES * TOKENS / comm.size)
        times, void = time_sides(sides, args.rounds, comm)
        if comm.rank:
            continue
        peers = [times[name] for name in sides if name.startswith("transformers")]
        best, ours = [min(round_s) for round_s in zip(*peers)], "mpilm, 2 ranks"
        goal = ">= 1.5" if dtype == "bfloat16" else ">= 1.1"
        print_report(f"compute, {dtype}", times, {
            "mpilm / best peer": (speed_ratios({"best": best, **times}, "best", ours), goal),
            "share of a large product's rate": (speed_ratios(times, "products alone", ours), ">= 0.45"),
            "best peer's share": (speed_ratios({"best": best, **times}, "products alone", "best"), ""),
            "fused / torch's kernels": (speed_ratios(times, "mpilm, torch's kernels", ours), ""),
        }, void)  # fmt: skip
    dist.destroy_process_group()


def compute(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--rounds", str(args.rounds), "--folder", folder]
        words += ["--dtype", args.dtype] if args.dtype else []
        subprocess.run([*mpirun(2), sys.executable, BENCH, "compute-worker", *words], check=True)
