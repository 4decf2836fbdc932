"""Kernels that pass over memory once where torch's do several times: on CPUs, in float32 and bfloat16.

numba compiles them when they first run (kernel_loops.py), and keeps the result on disk. They compute in float32 and round when
they write, so results in bfloat16 differ from torch's by fewer roundings, those in float32 by the order of additions.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from mpilm.errors import ConfigError
from mpilm.model.kernels import IGNORE_INDEX, TORCH_KERNELS, Kernels

DTYPES = (torch.float32, torch.bfloat16)
BLOCKS = 16  # of rows, whose gradients of a weight are added separately: as many as threads are of use
SHARE = 1 << 15  # elements: less is not worth a thread


class FusedKernels(Kernels):
    """Kernels compiled by numba, run by `threads` threads; torch's for tensors of other types. Raises ImportError if numba is
    not installed."""

    def __init__(self, threads: int):
        from mpilm.model import kernel_loops

        self.loops: ModuleType = kernel_loops
        self.threads, self._pool = threads, ThreadPoolExecutor(threads - 1, "kernels") if threads > 1 else None

    def run(self, loop: Callable[..., None], rows: int, numel: int, *arguments: Any) -> None:
        """Call loop(start, stop, *arguments) for all rows, divided over the threads."""
        shares = max(1, min(self.threads, rows, numel // SHARE))
        bounds = [rows * share // shares for share in range(shares + 1)]
        futures: list[Future[None]] = []
        if self._pool is not None:
            futures = [self._pool.submit(loop, *pair, *arguments) for pair in pairwise(bounds[1:])]
        loop(*bounds[:2], *arguments)
        for future in futures:
            future.result()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the norm in the type in which autocast computes: matrix products alone read it."""
        return FusedRMSNorm.apply(self, x, weight, eps) if is_eligible(x) else super().rms_norm(x, weight, eps)

    def silu_product(self, silu: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        return FusedSiLUProduct.apply(self, gate, up) if is_eligible(gate) else super().silu_product(silu, gate, up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return FusedRotation.apply(self, x, cos, sin) if is_eligible(x) else super().rotate(x, cos, sin)

    def causal_softmax_(self, scores: Tensor, count: int, start: int) -> Tensor:
        return self._softmax_(scores, count, start) if is_eligible(scores) else super().causal_softmax_(scores, count, start)

    def softmax_(self, scores: Tensor) -> Tensor:
        return self._softmax_(scores, 0, 0) if is_eligible(scores) else super().softmax_(scores)

    def softmax_backward_(self, gradient: Tensor, weights: Tensor) -> Tensor:
        if not is_eligible(gradient):
            return super().softmax_backward_(gradient, weights)
        rows = rows_of(gradient)
        self.run(self.loops.softmax_backward, len(rows), rows.size, rows, rows_of(weights))
        return gradient

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return FusedCrossEntropySum.apply(self, logits, targets) if is_eligible(logits) else super().loss_sum(logits, targets)

    def _softmax_(self, scores: Tensor, count: int, start: int) -> Tensor:
        rows = rows_of(scores)
        self.run(self.loops.softmax, len(rows), rows.size, rows, count, start)
        return scores


def choose_kernels(setting: str, device: torch.device, compiles: bool) -> str:
    """Return the kernels that train.kernels means here, "fused" or "torch". `compiles`: torch.compile is used. Raises
    ConfigError if fused kernels are asked for and cannot be used."""
    if setting == "torch" or (setting == "auto" and (compiles or device.type != "cpu")):
        return "torch"
    if device.type != "cpu":
        raise ConfigError(f"--train.kernels fused: they are for CPUs, and the device is {device.type}; write auto")
    try:
        FusedKernels(threads=1)
    except (ImportError, RuntimeError) as error:  # RuntimeError: numba finds no folder for compiled code
        if setting == "auto":
            return "torch"
        advice = "pip install numba, or write --train.kernels torch"
        raise ConfigError(f"--train.kernels fused: numba cannot be used ({error}); {advice}") from error
    return "fused"


def make_kernels(setting: str, device: torch.device, compiles: bool) -> Kernels:
    """Return the kernels that train.kernels means here, for as many threads as torch uses."""
    return FusedKernels(torch.get_num_threads()) if choose_kernels(setting, device, compiles) == "fused" else TORCH_KERNELS


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Make the layers of `model` compute with these kernels."""
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels  # type: ignore[assignment]


def is_eligible(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0


def array_of(x: Tensor) -> np.ndarray:
    """Return the contiguous elements of x: a view of them, if they are contiguous."""
    x = x.detach().contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def rows_of(x: Tensor) -> np.ndarray:
    """Return the same with all dims but the last in one."""
    return array_of(x.flatten(0, -2))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a matrix product of x computes."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class FusedRMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, y = rows_of(x), torch.empty(x.shape, dtype=compute_dtype(x))
        scales = np.empty(len(rows), np.float32)
        parameters = array_of(weight), np.float32(eps)
        kernels.run(kernels.loops.rms_norm, len(rows), rows.size, rows, *parameters, rows_of(y), scales)
        ctx.kernels, ctx.scales = kernels, scales
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), kernels = ctx.saved_tensors, ctx.kernels
        rows, d_x = rows_of(x), torch.empty(x.shape, dtype=x.dtype)
        d_weight = torch.zeros(min(BLOCKS, len(rows)), len(weight))
        inputs, outputs = (rows_of(gradient), rows, array_of(weight), ctx.scales), (rows_of(d_x), d_weight.numpy())
        kernels.run(kernels.loops.rms_norm_backward, len(d_weight), rows.size, *inputs, *outputs)
        return None, d_x, d_weight.sum(0), None


class FusedSiLUProduct(Function):
    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, gate: Tensor, up: Tensor) -> Tensor:
        y, rows = torch.empty(gate.shape, dtype=gate.dtype), rows_of(gate)
        kernels.run(kernels.loops.silu_product, len(rows), rows.size, rows, rows_of(up), rows_of(y))
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), kernels = ctx.saved_tensors, ctx.kernels
        rows, d_gate, d_up = rows_of(gate), *(torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        arrays = rows_of(gradient), rows, rows_of(up), rows_of(d_gate), rows_of(d_up)
        kernels.run(kernels.loops.silu_product_backward, len(rows), rows.size, *arrays)
        return None, d_gate, d_up


class FusedRotation(Function):
    """Reads and writes the layout that projections use, (B, T, H, K), and returns that of attention, (B, H, T, K)."""

    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, tokens_first = torch.empty(x.shape, dtype=x.dtype), array_of(x.transpose(1, 2))
        ctx.kernels, ctx.angles = kernels, (rows_of(cos), rows_of(sin))
        kernels.run(kernels.loops.rotate, x.shape[0] * x.shape[2], x.numel(), tokens_first, *ctx.angles, array_of(y))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_x = torch.empty(gradient.transpose(1, 2).shape, dtype=gradient.dtype)
        run, loop, count = ctx.kernels.run, ctx.kernels.loops.rotate_backward, gradient.shape[0] * gradient.shape[2]
        run(loop, count, d_x.numel(), array_of(gradient), *ctx.angles, array_of(d_x))
        return None, d_x.transpose(1, 2), None, None


class FusedCrossEntropySum(Function):
    """Backward writes the gradient into the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, logits: Tensor, targets: Tensor) -> Tensor:
        rows, targets = rows_of(logits), targets.flatten()
        if int(targets.max()) >= logits.shape[-1]:  # the loop would read other memory
            raise IndexError(f"target {int(targets.max())} with a vocabulary of {logits.shape[-1]}")
        losses, log_sums = torch.empty(len(rows)), np.empty(len(rows), np.float32)
        inputs = rows, targets.numpy(), IGNORE_INDEX
        kernels.run(kernels.loops.cross_entropy, len(rows), rows.size, *inputs, losses.numpy(), log_sums)
        ctx.kernels, ctx.log_sums = kernels, log_sums
        ctx.save_for_backward(logits, targets)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        logits = logits.contiguous()
        rows, factor = rows_of(logits), np.float32(float(gradient))
        run, loop = ctx.kernels.run, ctx.kernels.loops.cross_entropy_backward
        run(loop, len(rows), rows.size, rows, targets.numpy(), IGNORE_INDEX, ctx.log_sums, factor)
        return None, logits.detach(), None
