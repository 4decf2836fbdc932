"""Kernels that pass over memory once where torch's do several times: on CPUs, in float32 and bfloat16.

numba compiles them when they first run (loops.py), and keeps the result on disk. They compute in float32 and round when
they write, so results in bfloat16 differ from torch's by fewer roundings, those in float32 by the order of additions.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mpilm.config.schema import TrainConfig
from mpilm.errors import ConfigError
from mpilm.kernels.attention import FusedAttention, plan_query_blocks
from mpilm.kernels.base import TORCH_KERNELS, Kernels, RowSum
from mpilm.kernels.functions import FusedCrossEntropySum, FusedRMSNorm, FusedRotation, FusedSiLUProduct, LoopRunner, array_of

DTYPES = (torch.float32, torch.bfloat16)


class FusedKernels(Kernels):
    """Kernels compiled by numba, run by `threads` threads; torch's for tensors of other types. Raises ImportError if numba is
    not installed."""

    def __init__(self, threads: int):
        self.loops = LoopRunner(threads)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the norm in the type in which autocast computes: matrix products alone read it."""
        return FusedRMSNorm.apply(self.loops, x, weight, eps) if is_eligible(x) else super().rms_norm(x, weight, eps)

    def silu_product(self, silu: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        return FusedSiLUProduct.apply(self.loops, gate, up) if is_eligible(gate) else super().silu_product(silu, gate, up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return FusedRotation.apply(self.loops, x, cos, sin) if is_eligible(x) else super().rotate(x, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Tensor | None) -> Tensor:
        is_square = 1 < q.shape[-2] == k.shape[-2]  # else a text is generated
        if is_square and q.dtype == torch.bfloat16 and is_eligible(q) and q.numel():
            blocks = plan_query_blocks(q, causal, documents)
            if blocks is not None:
                return FusedAttention.apply(self.loops, q, k, v, blocks)
        return super().attend(q, k, v, causal, documents)

    def row_sum(self) -> RowSum | None:
        return self._sum_rows

    def _sum_rows(self, rows: Tensor, shift: Tensor, shift_sum: Tensor) -> Tensor:  # (R, C), (), () -> (2,)
        words = torch.empty(len(rows), 2, dtype=torch.int64)
        self.loops.run("sum_squares", len(rows), rows.numel(), rows.numpy(), float(shift), words.numpy())
        return words.sum(0)

    def store_(self, place: Tensor, x: Tensor) -> None:
        if x.dtype != torch.bfloat16 or not is_eligible(place):  # torch does well if the types are equal
            return super().store_(place, x)
        self.loops.run("widen", place.numel(), place.numel(), array_of(x).reshape(-1), place.view(-1).numpy())

    def accumulate_(self, total: Tensor, x: Tensor) -> None:
        if x.dtype != torch.bfloat16 or not is_eligible(total):
            return super().accumulate_(total, x)
        self.loops.run("accumulate", total.numel(), total.numel(), total.view(-1).numpy(), array_of(x).reshape(-1))

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        return self.loops.log_sum_exp(logits) if is_eligible(logits) else super().log_sum_exp(logits)

    def softmax_gradient_(self, logits: Tensor, targets: Tensor, log_sums: Tensor, factors: Tensor) -> Tensor:
        arguments = logits, targets, log_sums, factors
        return self.loops.softmax_gradient_(*arguments) if is_eligible(logits) else super().softmax_gradient_(*arguments)

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not is_eligible(logits) or not logits.numel():
            return super().loss_sum(logits, targets)
        return FusedCrossEntropySum.apply(self.loops, logits, targets)


def choose_kernels(train: TrainConfig, device: torch.device) -> Literal["fused", "torch"]:
    """Return the kernels that train.kernels means here. Raises ConfigError if fused ones are asked for and cannot be used."""
    wanted = train.dtype == "bfloat16" and device.type == "cpu" and not train.compile
    if train.kernels == "torch" or (train.kernels == "auto" and not wanted):
        return "torch"
    if device.type != "cpu":
        raise ConfigError(f"--train.kernels fused: they are for CPUs, and the device is {device.type}; write auto")
    try:
        LoopRunner(threads=1)
    except (ImportError, RuntimeError) as error:  # RuntimeError: numba finds no folder for compiled code
        if train.kernels == "auto":
            return "torch"
        advice = "pip install numba, or write --train.kernels torch"
        raise ConfigError(f"--train.kernels fused: numba cannot be used ({error}); {advice}") from error
    return "fused"


def make_kernels(train: TrainConfig, device: torch.device) -> Kernels:
    """Return the kernels that train.kernels means here, for as many threads as torch uses."""
    return FusedKernels(torch.get_num_threads()) if choose_kernels(train, device) == "fused" else TORCH_KERNELS


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Make the layers of `model` compute with these kernels."""
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels  # type: ignore[assignment]


def is_eligible(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES
