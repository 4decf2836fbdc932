"""The operations of a model between its matrix products. Layers call them through an attribute, `kernels`, so that others can
take the place of torch's: those of fused_kernels.py, which pass over memory less often."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpilm.model.flops import LOSS_BLOCK

IGNORE_INDEX = -100  # the target of a token that has no loss
GPU_LOSS_BLOCK = 1 << 26  # fewer would leave a GPU idle between kernels


class Kernels:
    """torch's own operations."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., D) -> (..., D)
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # (..., D) -> (..., D)
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)

    def silu_product(self, silu: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:  # 2 x (..., F) -> (..., F)
        """Return silu(gate) * up."""
        return silu(gate) * up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, H, T, K) -> (B, H, T, K)
        """Turn dims i and i + K/2 of x by the angle of their position. `cos` and `sin`: (T, K) or (B, 1, T, K)."""
        low, high = x.chunk(2, dim=-1)
        return x * cos.to(x.dtype) + torch.cat((-high, low), dim=-1) * sin.to(x.dtype)

    def causal_softmax_(self, scores: Tensor, count: int, start: int) -> Tensor:  # (..., R, keys) -> (..., R, keys)
        """Overwrite scores with their softmax. Row r is query `start` + r % `count`, which sees no later keys."""
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores.unflatten(-2, (-1, count))[..., start : start + count].masked_fill_(later, float("-inf"))
        return self.softmax_(scores)

    def softmax_(self, scores: Tensor) -> Tensor:  # (..., keys) -> (..., keys)
        """Return the softmax of scores, which may be overwritten."""
        return scores.softmax(dim=-1)

    def softmax_backward_(self, gradient: Tensor, weights: Tensor) -> Tensor:  # 2 x (..., keys) -> (..., keys)
        """Return the gradient of the scores of a softmax from that of its result, which may be overwritten."""
        return torch._softmax_backward_data(gradient, weights, -1, weights.dtype)

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
        """Return the sum of the cross-entropies of all targets, in nats, float32: never a mean, so that sums of parts are
        exact. Backward overwrites large logits with their gradient."""
        return loss_sum(logits, targets)


TORCH_KERNELS = Kernels()


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
    """`Kernels.loss_sum` as torch computes it."""
    logits, targets = logits.flatten(0, 1), targets.flatten()
    return (BlockwiseCrossEntropySum.apply if logits.numel() > LOSS_BLOCK else cross_entropy_sum)(logits, targets)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:  # (N, V), (N,) -> ()
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


class BlockwiseCrossEntropySum(torch.autograd.Function):
    """`cross_entropy_sum` with the same bits, in blocks of rows that stay in the cache. It saves no float32 copy of the logits
    and no probabilities: backward computes them again and writes the gradient into the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        scores = [
            x.float().log_softmax(-1).gather(-1, places.clamp(min=0)[:, None]) for x, places in _row_blocks(logits, targets)
        ]
        return F.nll_loss(torch.cat(scores), targets.clamp(max=0), ignore_index=IGNORE_INDEX, reduction="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        for x, places in _row_blocks(logits.detach(), targets):
            wide = x.float() if x.dtype != torch.float32 else x.clone()
            with torch.enable_grad():
                loss = cross_entropy_sum(wide.requires_grad_(), places) * gradient
            x.copy_(torch.autograd.grad(loss, wide)[0])
        return logits, None


def _row_blocks(logits: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    block = LOSS_BLOCK if logits.device.type == "cpu" else GPU_LOSS_BLOCK
    rows = max(1, block // logits.shape[-1])
    return zip(logits.split(rows), targets.split(rows))
