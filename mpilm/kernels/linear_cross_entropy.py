"""Head and loss in blocks of the vocabulary, so that no tensor of tokens x vocabulary lives (Wijmans et al., arXiv 2411.09009).

Backward multiplies each block by the head a second time: a third more work for the head, in exchange for the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mpilm.kernels import LOGITS_BLOCK, MAX_LOGITS
from mpilm.kernels.base import IGNORE_INDEX, Kernels


@dataclass(frozen=True)
class DeferredLogits:
    """Logits that the loss computes block by block: of tokens x (B, T, D), a weight (V, D), and a bias (V,) or None. `leave` is
    called with the loss, when the weight is not needed any more before backward."""

    kernels: Kernels
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    leave: Callable[[Tensor], object] = lambda loss: None

    def loss_sum(self, targets: Tensor) -> Tensor:  # (B, T) -> ()
        """Return the sum of the cross-entropies of all targets, as `Kernels.loss_sum` does."""
        loss: Tensor = LinearCrossEntropySum.apply(self.kernels, self.x, self.weight, self.bias, targets)
        self.leave(loss)
        return loss


def defer_logits(model: nn.Module, kernels: Kernels) -> None:
    """Let the head of `model`, if it has one, return DeferredLogits in training where the logits are more than MAX_LOGITS."""
    head: Any = getattr(model, "head", None)
    if head is not None:
        head.forward = partial(_forward, head, head.forward, kernels)


def _forward(head: Any, multiply: Callable[[Tensor], Tensor], kernels: Kernels, x: Tensor) -> Tensor | DeferredLogits:
    weight: Tensor = head.weight
    if not torch.is_grad_enabled() or x.numel() // x.shape[-1] * len(weight) <= MAX_LOGITS:
        return multiply(x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return DeferredLogits(kernels, x.to(dtype), weight.to(dtype), None if head.bias is None else head.bias.to(dtype))


class LinearCrossEntropySum(Function):
    """The sum of the cross-entropies of targets (B, T), whose logits are x W^T + b."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows, targets = x.flatten(0, -2), targets.flatten()
        own = rows.new_zeros(len(rows), dtype=torch.float32)
        log_sums = own - torch.inf
        for words in _blocks(rows, weight):
            logits, places = _logits(rows, weight, bias, words), _places(targets, words)
            log_sums = torch.logaddexp(log_sums, kernels.log_sum_exp(logits))
            found = logits.gather(-1, places.clamp(min=0)[:, None])[:, 0].float()
            own = own + found.where(places >= 0, 0.0)
        ctx.kernels = kernels
        ctx.save_for_backward(rows, weight, bias, targets, log_sums)
        ctx.shape = x.shape
        return (log_sums - own).where(targets != IGNORE_INDEX, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, targets, log_sums = ctx.saved_tensors
        factors = gradient.float().where(targets != IGNORE_INDEX, 0.0)
        d_rows, d_weight = torch.zeros_like(rows, dtype=torch.float32), torch.empty_like(weight)
        d_bias = None if bias is None else torch.empty_like(bias)
        for words in _blocks(rows, weight):
            logits = _logits(rows, weight, bias, words)
            own = ctx.kernels.softmax_gradient_(logits, _places(targets, words), log_sums, factors)
            if ctx.needs_input_grad[2]:  # not if adapters are trained
                torch.mm(own.t(), rows, out=d_weight[words])
            ctx.kernels.accumulate_(d_rows, own @ weight[words])
            if d_bias is not None:
                d_bias[words] = own.sum(0)
        return None, d_rows.to(rows.dtype).view(ctx.shape), d_weight if ctx.needs_input_grad[2] else None, d_bias, None


def _blocks(rows: Tensor, weight: Tensor) -> list[slice]:
    """Return the blocks of the vocabulary."""
    width = max(1, LOGITS_BLOCK // len(rows))
    return [slice(start, min(start + width, len(weight))) for start in range(0, len(weight), width)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    return F.linear(rows, weight[words], None if bias is None else bias[words])


def _places(targets: Tensor, words: slice) -> Tensor:
    """Return the place of each target within a block, or -1 if it is in another one."""
    inside = (targets >= words.start) & (targets < words.stop)
    return (targets - words.start).where(inside, -1)
