"""One GPU: model FLOPs utilisation, against a plain torch loop that is compiled as a whole."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.measure import BENCH, STEPS, pairwise, report

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bfloat16, FLOP/s
SIZES = {  # sequences at once, and a step
    "gpt2-350m": (32, 64),
    "llama-1b": (8, 32),
    "gpt2-124m": (32, 128),
}
VOCABULARIES = {"gpt2-350m": 50304, "gpt2-124m": 50304, "llama-1b": 32000}


def gpu(args: argparse.Namespace) -> None:
    for preset in SIZES if args.preset == "tiny" else [args.preset]:
        subprocess.run([sys.executable, BENCH, "gpu-worker", "--preset", preset, "--rounds", str(args.rounds)], check=True)


def gpu_worker(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.plain import torch_loop
    from mpilm.comm.base import SelfComm
    from mpilm.config import resolve
    from mpilm.mesh.mesh import Mesh
    from mpilm.mesh.shape import MeshShape
    from mpilm.model.size import flops_per_token
    from mpilm.parallel.feasible import cut_by_cost
    from mpilm.presets import PRESETS
    from mpilm.trainer.prove import RandomTokens
    from mpilm.trainer.sharded import ShardedModel
    from mpilm.trainer.step import train_step

    device = torch.device("cuda", 0)
    vocab_size, (micro, batch) = VOCABULARIES[args.preset], SIZES[args.preset]
    config = PRESETS[args.preset]()
    train = dataclasses.replace(
        config.train, micro_batch=micro, global_batch=batch, dtype="bfloat16", compile=True, device="cuda", lr=1e-4
    )
    config = resolve(dataclasses.replace(config, train=train))
    source = RandomTokens(config, vocab_size)
    mesh = Mesh.build(MeshShape(), SelfComm("world"))

    def mpilm_loop() -> Callable[[int], None]:
        model = ShardedModel(config, mesh, cut_by_cost(config, vocab_size), vocab_size, device, 16)
        model.initialise()
        return lambda number: train_step(model, source, number) and None

    sides = {}
    for name, make in (
        ("mpilm", mpilm_loop),
        ("plain torch loop", lambda: torch_loop(config, source, vocab_size, device="cuda")),
    ):
        began = time.monotonic()
        sides[name] = make()
        sides[name](0)
        torch.cuda.synchronize()
        print(f"{args.preset}: {name}: first step after {time.monotonic() - began:.0f} s, "
              f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB so far", flush=True)  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, step in sides.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for each in range(STEPS):
                step(1 + number * STEPS + each)
            torch.cuda.synchronize()
            if number:  # the first warms up
                times[name].append((time.perf_counter() - began) / STEPS)
    name = torch.cuda.get_device_name()
    tokens = batch * config.model.context_length
    work = tokens * flops_per_token(config.model, vocab_size)
    peak = next((rate for key, rate in PEAKS.items() if key in name), float("nan"))
    report(
        f"{args.preset} on {name}, {tokens:,} tokens a step, {micro} sequences at once",
        times,
        {
            "mpilm / plain torch": (pairwise(times, "plain torch loop", "mpilm"), ">= 0.98"),
        },
        0,
    )
    found = {side: work / statistics.median(seconds) / peak for side, seconds in times.items()}
    print("  " + ", ".join(f"{side}: MFU {value:.1%}" for side, value in found.items()))
    print("JSON " + json.dumps({"what": f"mfu {args.preset}", "device": name, "peak": peak, "mfu": found}), flush=True)
