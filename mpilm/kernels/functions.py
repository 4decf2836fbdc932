"""Autograd functions over the loops of loops.py: each reads its inputs once, or as often as it must."""

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from mpilm.kernels.base import IGNORE_INDEX

BLOCKS = 16  # of rows, whose gradients of a weight are added separately: as many as threads are of use
SHARE = 1 << 15  # elements: less is not worth a thread


class LoopRunner:
    """Runs compiled loops in `threads` threads. Raises ImportError if numba is not installed."""

    def __init__(self, threads: int):
        from mpilm.kernels import loops

        self.loops: ModuleType = loops
        self._workspaces: dict[tuple[int, ...], Tensor] = {}
        self.threads, self._pool = threads, ThreadPoolExecutor(threads - 1, "kernels") if threads > 1 else None

    def workspace(self, *shape: int) -> Tensor:
        """Return float32 memory of this shape that lasts until the next call: fresh memory costs a page fault every 4 KiB."""
        if shape not in self._workspaces:
            self._workspaces = {shape: torch.empty(shape)}  # that of another length of sequences is not needed any more
        return self._workspaces[shape]

    def transposed(self, x: Tensor) -> Tensor:  # (N, R, C) -> (N, C, R)
        """Return the contiguous transpose of matrices in bfloat16."""
        out = torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype)
        self.run("transpose", x.shape[0] * -(-x.shape[2] // self.loops.TILE), x.numel(), array_of(x), array_of(out))
        return out

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """`Kernels.log_sum_exp` by a loop."""
        log_sums = torch.empty(len(logits))
        self.run("log_sum_exp", len(logits), logits.numel(), array_of(logits), log_sums.numpy())
        return log_sums

    def softmax_gradient_(self, logits: Tensor, targets: Tensor, log_sums: Tensor, factors: Tensor) -> Tensor:
        """`Kernels.softmax_gradient_` by a loop; the logits are contiguous."""
        arguments = array_of(logits), targets.numpy(), log_sums.numpy(), array_of(factors)
        self.run("softmax_gradient", len(logits), logits.numel(), *arguments)
        return logits

    def run(self, name: str, rows: int, numel: int, *arguments: Any) -> None:
        """Run a loop of loops.py over all rows, divided over the threads."""
        loop = getattr(self.loops, name)
        shares = max(1, min(self.threads, rows, numel // SHARE))
        bounds = [rows * share // shares for share in range(shares + 1)]
        futures: list[Future[None]] = []
        if self._pool is not None:
            futures = [self._pool.submit(loop, *pair, *arguments) for pair in pairwise(bounds[1:])]
        loop(*bounds[:2], *arguments)
        for future in futures:
            future.result()


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
    def forward(ctx: Any, loops: LoopRunner, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, y = rows_of(x), torch.empty(x.shape, dtype=compute_dtype(x))
        scales = np.empty(len(rows), np.float32)
        parameters = array_of(weight), np.float32(eps)
        loops.run("rms_norm", len(rows), rows.size, rows, *parameters, rows_of(y), scales)
        ctx.loops, ctx.scales = loops, scales
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), loops = ctx.saved_tensors, ctx.loops
        rows, d_x = rows_of(x), torch.empty(x.shape, dtype=x.dtype)
        d_weight = torch.zeros(min(BLOCKS, len(rows)), len(weight))
        inputs, outputs = (rows_of(gradient), rows, array_of(weight), ctx.scales), (rows_of(d_x), d_weight.numpy())
        loops.run("rms_norm_backward", len(d_weight), rows.size, *inputs, *outputs)
        return None, d_x, d_weight.sum(0), None


class FusedSiLUProduct(Function):
    @staticmethod
    def forward(ctx: Any, loops: LoopRunner, gate: Tensor, up: Tensor) -> Tensor:
        y, rows = torch.empty(gate.shape, dtype=gate.dtype), rows_of(gate)
        loops.run("silu_product", len(rows), rows.size, rows, rows_of(up), rows_of(y))
        ctx.loops = loops
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), loops = ctx.saved_tensors, ctx.loops
        rows, d_gate, d_up = rows_of(gate), *(torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        arrays = rows_of(gradient), rows, rows_of(up), rows_of(d_gate), rows_of(d_up)
        loops.run("silu_product_backward", len(rows), rows.size, *arrays)
        return None, d_gate, d_up


class FusedRotation(Function):
    """Reads and writes the layout that projections use, (B, T, H, K), and returns that of attention, (B, H, T, K)."""

    @staticmethod
    def forward(ctx: Any, loops: LoopRunner, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, tokens_first = torch.empty(x.shape, dtype=x.dtype), array_of(x.transpose(1, 2))
        ctx.loops, ctx.angles = loops, (rows_of(cos), rows_of(sin))
        loops.run("rotate", x.shape[0] * x.shape[2], x.numel(), tokens_first, *ctx.angles, False, array_of(y))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_x = torch.empty(gradient.transpose(1, 2).shape, dtype=gradient.dtype)
        count = gradient.shape[0] * gradient.shape[1]
        ctx.loops.run("rotate", count, d_x.numel(), array_of(gradient), *ctx.angles, True, array_of(d_x))
        return None, d_x.transpose(1, 2), None, None


class FusedCrossEntropySum(Function):
    """Backward writes the gradient into the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, loops: LoopRunner, logits: Tensor, targets: Tensor) -> Tensor:
        rows, targets = logits.flatten(0, -2), targets.flatten()
        if int(targets.max()) >= logits.shape[-1]:  # the loop would read other memory
            raise IndexError(f"target {int(targets.max())} with a vocabulary of {logits.shape[-1]}")
        log_sums, ignored = loops.log_sum_exp(rows), targets == IGNORE_INDEX
        own = rows.gather(-1, targets.clamp(min=0)[:, None])[:, 0].float()
        ctx.loops = loops
        ctx.save_for_backward(logits, targets, log_sums)
        return (log_sums - own).masked_fill_(ignored, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sums = ctx.saved_tensors
        factors = gradient.where(targets != IGNORE_INDEX, 0.0)
        logits = logits.detach().contiguous()
        ctx.loops.softmax_gradient_(logits.flatten(0, -2), targets, log_sums, factors)
        return None, logits, None
