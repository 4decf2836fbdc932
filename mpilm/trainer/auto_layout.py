"""The layout chosen at the start: by the planner (parallel.auto), and the number of blocks in each stage."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks, run_on_root
from mpilm.config.schema import Config, state_parts
from mpilm.config.settings import override
from mpilm.engine.hardware import Hardware, software_versions
from mpilm.engine.pipelined import meta_model, resolve_model_layouts
from mpilm.errors import ConfigError
from mpilm.kernels.base import loss_sum
from mpilm.mesh.mesh import Mesh
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.apply import make_autocast, prune_to_stage
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import select_stage
from mpilm.parallel.layout_check import partition_by_cost
from mpilm.parallel.pipeline.partition import partition_layers
from mpilm.planner.profile import MachineProfile, read_profile
from mpilm.planner.search import PlannedJob, search

CHOSEN_SETTINGS = ("pipeline", "tensor", "context", "expert", "schedule", "chunks", "zero")
MEASURE_S = 0.5  # for each part: long compared with a scheduler's time slice, so that sharing a core shows
PARTS = (0, 1, 0)  # one block divided into three stages: the embedding; the block; norm, head and loss


def choose_layout(config: Config, vocab_size: int, hardware: Hardware, world: Comm) -> tuple[Config, str]:
    """Return the config with the layout that the planner predicts to be fastest, and a note; unchanged without parallel.auto.
    Collective; raises CollectiveError if machine.json describes another machine, or no layout works."""
    if not config.parallel.auto:
        return config, ""
    ranks_per_node = max(world.all_gather_json(world.split_node().size))
    base = override(config, parallel__auto="")

    def plan() -> list[Any]:
        """Return the settings to change, and a note."""
        if config.model.lora_rank:
            raise ConfigError("--parallel.auto plans for training full models: remove it or --model.lora-rank")
        profile = read_profile(config.parallel.auto, "--parallel.auto")
        _check_same_machine(profile, hardware, world)
        planned = state_parts(base)  # no layout decides what the run computes
        try:
            found, _ = search(PlannedJob(planned, vocab_size, profile, ranks_per_node), world.size)
        except ConfigError as error:
            raise ConfigError(f"--parallel.auto: {error}") from None
        best = found[0].config
        changes = {f"parallel__{name}": getattr(best.parallel, name) for name in CHOSEN_SETTINGS}
        chosen = f"chosen among {len(found)} by {config.parallel.auto} (--parallel.auto): {found[0].label}"
        note = f"{chosen}; predicted step time {found[0].time.total_s:.3g} s"
        return [changes | {"train__recompute": best.train.recompute}, note]

    changes, note = world.broadcast_json(run_on_root(world, plan))
    return override(base, **changes), note


def _check_same_machine(profile: MachineProfile, hardware: Hardware, world: Comm) -> None:
    here = {**software_versions(world), "device": hardware.device.type}
    for name in ("processor", "device", "torch"):
        if getattr(profile, name) != here[name]:
            problem = f"{profile.source} was measured with {name} {getattr(profile, name)}, but this machine has {here[name]}"
            advice = f"calibrate here (mpirun -n {world.size} python -m mpilm.doctor --calibrate)"
            raise ConfigError(f"--parallel.auto {problem}: {advice}")


def partition_model(config: Config, mesh: Mesh, vocab_size: int, device: torch.device) -> tuple[int, ...]:
    """Return the number of blocks in each stage. Collective over the mesh; raises CollectiveError. To measure their cost, ranks
    time a block, the embedding and the head at once, as in training; a stage is as fast as the slowest of its replicas."""
    parallel = config.parallel
    if parallel.balance == "cost" or parallel.cut or parallel.pipeline == 1:
        return run_on_all_ranks(mesh.world, lambda: partition_by_cost(config, vocab_size))
    everyone_s = mesh.world.all_gather_json([_time_part(config, vocab_size, device, part, mesh.world) for part in range(3)])
    embed_s, block_s, head_s = (statistics.median(part) for part in zip(*everyone_s))
    slowest_s = [0.0] * parallel.pipeline
    for rank, (_, rank_block_s, _) in enumerate(everyone_s):
        index = mesh.shape.coordinate(rank)["pipeline"]
        slowest_s[index] = max(slowest_s[index], rank_block_s)
    speeds = [block_s / slowest_s[stage % parallel.pipeline] for stage in range(parallel.pipeline * parallel.chunks)]
    return partition_layers(config.model.n_layers, len(speeds), embed_s / block_s, head_s / block_s, 1.0, speeds)


def _time_part(config: Config, vocab_size: int, device: torch.device, part: int, world: Comm) -> float:
    """Return the mean seconds of forward and backward of one microbatch through a part of the model. Collective."""
    shape = replace(config.model, n_layers=1, lora_rank=0)
    model = meta_model(shape, vocab_size)
    prune_to_stage(model, part, PARTS)
    flat = FlatParameters(select_stage(resolve_model_layouts(shape, vocab_size, PARTS), part), device)
    flat.values.tensor.fill_(0.01)
    flat.install(model)
    rows, length = config.train.micro_batch, shape.context_length
    tokens = torch.arange(rows * length, device=device).remainder(vocab_size).view(rows, length)
    x = tokens if part == 0 else torch.ones(rows, length, shape.d_model, device=device).requires_grad_()
    info = SequenceInfo(torch.arange(length, device=device), dropout_keys=list(range(rows)), loss_weight=1 / tokens.numel())
    autocast = make_autocast(config.train.dtype, device)

    def forward_backward() -> None:
        with autocast():
            y = model(x, info)
        (loss_sum(y, tokens) if part == 2 else y.sum()).backward()

    forward_backward()
    world.barrier()
    start_s, calls = time.perf_counter(), 0
    while time.perf_counter() < start_s + MEASURE_S:
        forward_backward()
        calls += 1
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
    return (time.perf_counter() - start_s) / calls
