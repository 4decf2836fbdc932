"""A plain torch loop, against which mpilm is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mpilm.config.schema import Config
from mpilm.engine.step import MicrobatchSource
from mpilm.kernels.base import loss_sum
from mpilm.model.families import build_model, initial_std, initial_value
from mpilm.model.sequence_info import SequenceInfo
from mpilm.optim.optimizer import learning_rate


def shard_fsdp2(model: nn.Module) -> nn.Module:
    """Shard parameters, gradients and moments by FSDP2, which gathers one block at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def skip_fsdp2_sync(model: Any) -> Iterator[None]:
    """Skip the gradient exchange of FSDP2."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def torch_loop(
    config: Config,
    source: MicrobatchSource,
    vocab_size: int,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
    skip_sync: Callable[[Any], AbstractContextManager[object]] = lambda wrapped: wrapped.no_sync(),
    rank: int = 0,
    ranks: int = 1,
    device: str = "cpu",
) -> Callable[[int], None]:
    """Return a training step: the same model and batches, autocast like mpilm's, torch's AdamW and clipping, and with
    train.compile model and loss compiled as one.

    `wrap` may be DistributedDataParallel; each rank then takes its share of the microbatches, and gradients are averaged after
    the last of them. `skip_sync` is the context of the others.
    """
    train, shape = config.train, config.model
    with torch.device(device):
        model = build_model(shape, vocab_size)
    for name, p in model.named_parameters():
        p.data = initial_value(train.seed, name, tuple(p.shape), initial_std(name, shape)).to(device)
    if shape.tie_embeddings:
        model.head.weight = getattr(model.embed, "tokens", model.embed).weight
    wrapped = wrap(model)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)
    own = range(train.global_batch // train.micro_batch)[rank::ranks]

    def compute_loss(tokens: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_sum(wrapped(tokens, SequenceInfo(positions)), targets)

    loss_fn = torch.compile(compute_loss, dynamic=False) if train.compile else compute_loss

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for m in own:
            batch = source.training_batch(number, m).to(torch.device(device))
            skips = m != own[-1] and ranks > 1
            with skip_sync(wrapped) if skips else nullcontext():
                with torch.autocast(device, torch.bfloat16) if train.dtype == "bfloat16" else nullcontext():
                    loss = loss_fn(batch.tokens, batch.positions, batch.targets)
                (loss / source.target_tokens(number) * ranks).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, number)
        optimizer.step()
        float(sum(losses))

    return step
