"""One GPU: model FLOPs utilization, against a plain torch loop that is compiled as a whole."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.measure import BENCH, print_report, speed_ratios, time_sides

if TYPE_CHECKING:
    from mpilm.config.schema import Config

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bfloat16, FLOP/s
SIZES = {  # sequences per microbatch and per step
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

    name = torch.cuda.get_device_name()
    compare(args.preset, "cuda", args.rounds, name, torch.cuda.synchronize)


def compare(preset: str, device: str, wanted: int, name: str, finish: Callable[[], object]) -> None:
    """Compare the sides of a preset. `finish` waits until the device has completed its work."""
    from mpilm.comm.base import SelfComm
    from mpilm.model.flops import flops_per_token

    config, vocab_size = make_gpu_config(preset)
    makers, sides = side_makers(config, vocab_size, device), {}
    for side, make in makers.items():
        began = time.monotonic()
        sides[side] = with_finish(make(), finish)
        sides[side](0)
        print(f"{preset}: {side}: first step after {time.monotonic() - began:.0f} s", flush=True)
    times, void = time_sides(sides, wanted, SelfComm("world"))
    tokens = config.train.global_batch * config.model.context_length
    title = f"{preset} on {name}, {tokens:,} tokens per step, {config.train.micro_batch} sequences per microbatch"
    print_report(title, times, {"mpilm / plain torch": (speed_ratios(times, "plain torch loop", "mpilm"), ">= 0.98")}, void)
    work = tokens * flops_per_token(config.model, vocab_size)
    peak = next((rate for key, rate in PEAKS.items() if key in name), float("nan"))
    found = {side: work / statistics.median(seconds) / peak for side, seconds in times.items()}
    print("  " + ", ".join(f"{side}: MFU {value:.1%}" for side, value in found.items()))
    print("JSON " + json.dumps({"what": f"mfu {preset}", "device": name, "peak": peak, "mfu": found}), flush=True)


def make_gpu_config(preset: str) -> tuple[Config, int]:
    """Return the config to train and its vocabulary size."""
    from mpilm.config.presets import PRESETS
    from mpilm.config.schema import resolve_config
    from mpilm.config.settings import override

    micro, batch = SIZES[preset]
    changes = {"micro_batch": micro, "global_batch": batch, "dtype": "bfloat16", "compile": True, "lr": 1e-4}
    return resolve_config(
        override(PRESETS[preset](), **{f"train__{key}": value for key, value in changes.items()})
    ), VOCABULARIES[preset]


def side_makers(config: Config, vocab_size: int, device: str) -> dict[str, Callable[[], Callable[[int], object]]]:
    """Return, for each side, the function that makes its step."""
    import torch

    from benchmarks.plain import torch_loop
    from mpilm.comm.base import SelfComm
    from mpilm.engine.step import train_step
    from mpilm.engine.train_model import TrainModel
    from mpilm.mesh.mesh import Mesh
    from mpilm.mesh.shape import MeshShape
    from mpilm.parallel.layout_check import partition_by_cost
    from mpilm.verification.layouts import RandomTokens

    source = RandomTokens(config, vocab_size)

    def mpilm_loop() -> Callable[[int], object]:
        mesh = Mesh(MeshShape(), SelfComm("world"))
        model = TrainModel(config, mesh, partition_by_cost(config, vocab_size), vocab_size, torch.device(device), 16)
        model.init_parameters()
        return lambda number: train_step(model, source, number)

    return {"mpilm": mpilm_loop, "plain torch loop": lambda: torch_loop(config, source, vocab_size, device=device)}


def with_finish(step: Callable[[int], object], finish: Callable[[], object]) -> Callable[[int], None]:
    """Return a step that ends when the device has completed its work."""

    def body(number: int) -> None:
        step(number)
        finish()

    return body
