"""How many blocks each stage gets: by arithmetic, or as these ranks turn out to compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.comm.together import together
from mpilm.config import Config
from mpilm.mesh.mesh import Mesh
from mpilm.model.loss import loss_sum
from mpilm.model.rows import Rows
from mpilm.parallel.cut import keep_stage
from mpilm.parallel.feasible import cut_by_cost
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import of_stage
from mpilm.parallel.partition import partition
from mpilm.trainer.staged import autocast_of, meta_model, resolve_layouts

MEASURE_S = 0.5  # of each part: long against a scheduler's slice, so that a core that is shared is seen to be
PARTS = (0, 1, 0)  # a cut of one block into three stages: embedding, block, and norm with head and loss


def choose_cut(config: Config, mesh: Mesh, vocab_size: int, device: torch.device) -> tuple[int, ...]:
    """Blocks of each stage, the same on all ranks. Collective over the mesh; raises AgreedError.

    With `parallel.balance` measured, each rank times a block, the embedding, and the head, all at the same time as in training;
    a stage is as fast as the slowest of its replicas.
    """
    parallel = config.parallel
    if parallel.balance == "cost" or parallel.cut or parallel.pipeline == 1:
        return together(mesh.world, lambda: cut_by_cost(config, vocab_size))
    mine = [_part_s(config, vocab_size, device, part, mesh.world) for part in range(3)]
    everyone = mesh.world.all_gather_json(mine)
    embed_s, block_s, head_s = (statistics.median(part) for part in zip(*everyone))
    slowest_s = [0.0] * parallel.pipeline
    for rank, (_, theirs_s, _) in enumerate(everyone):
        place = mesh.shape.coordinate(rank)["pipeline"]
        slowest_s[place] = max(slowest_s[place], theirs_s)
    speeds = [block_s / slowest_s[stage % parallel.pipeline] for stage in range(parallel.pipeline * parallel.chunks)]
    cut = partition(config.model.n_layers, len(speeds), embed_s / block_s, head_s / block_s, 1.0, speeds)
    return tuple(mesh.world.broadcast_json(list(cut)))


def _part_s(config: Config, vocab_size: int, device: torch.device, part: int, world: Comm) -> float:
    """Seconds of forward and backward of one microbatch through a part of the model, the mean of many. Collective."""
    shape = replace(config.model, n_layers=1, lora_rank=0)
    model = meta_model(shape, vocab_size)
    keep_stage(model, part, PARTS)
    flat = FlatParameters(of_stage(resolve_layouts(shape, vocab_size, PARTS), part), device)
    flat.values.tensor.fill_(0.01)
    flat.install(model)
    rows, length = config.train.micro_batch, shape.context_length
    tokens = torch.arange(rows * length, device=device).remainder(vocab_size).view(rows, length)
    x = tokens if part == 0 else torch.ones(rows, length, shape.d_model, device=device).requires_grad_()
    compute = _computation(model, x, tokens, part, config, device)
    compute()
    world.barrier()
    return _mean_s(compute, device)


def _computation(
    model: nn.Module, x: Tensor, tokens: Tensor, part: int, config: Config, device: torch.device
) -> Callable[[], None]:
    rows = Rows(torch.arange(tokens.shape[1], device=device), keys=list(range(len(tokens))), share=1 / tokens.numel())
    autocast = autocast_of(config.train.dtype, device)

    def compute() -> None:
        with autocast():
            y = model(x, rows)
        (loss_sum(y, tokens) if part == 2 else y.sum()).backward()

    return compute


def _mean_s(compute: Callable[[], None], device: torch.device) -> float:
    start_s, calls = time.perf_counter(), 0
    while time.perf_counter() < start_s + MEASURE_S:
        compute()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start_s) / calls
