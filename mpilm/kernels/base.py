"""The operations of a model between its matrix products. Layers call them through an attribute, `kernels`, so that others can
take the place of torch's: those of fused.py, which pass over memory less often."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpilm.kernels import LOSS_BLOCK
from mpilm.kernels.blockwise_attention import BlockwiseAttention

IGNORE_INDEX = -100  # the target of a token that has no loss
RowSum = Callable[[Tensor, Tensor, Tensor], Tensor]
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Tensor | None) -> Tensor:
        """Return scaled dot-product attention: (B, H, Tq, K), 2 x (B, G, Tk, K) -> (B, H, Tq, K). The queries are the last of
        the keys. `documents`: (B, T) numbers; attention stays within a document."""
        queries, keys = q.shape[-2], k.shape[-2]
        needs_mask = documents is not None or (causal and 1 < queries < keys)
        mask = mask_between(q, k, causal, documents) if needs_mask else None
        is_blockwise = q.dtype == torch.bfloat16 and q.device.type == "cpu" and 1 < queries == keys
        if is_blockwise and not torch.compiler.is_compiling():
            return BlockwiseAttention.apply(q, k, v, causal, mask)
        causal = causal and mask is None and queries > 1  # a single query is the last token: it sees every key
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    def row_sum(self) -> RowSum | None:
        """Return a faster function for the norm of gradients (optim/norm.py), if there is one."""
        return None

    def store_(self, place: Tensor, x: Tensor) -> None:
        """Write x, in float32 or bfloat16, to a contiguous float32 tensor of the same shape; -0 becomes 0, as when it is added
        to something."""
        torch.add(x, 0.0, out=place)

    def accumulate_(self, total: Tensor, x: Tensor) -> None:
        """Add x, in float32 or bfloat16, to a contiguous float32 tensor of the same shape."""
        total.add_(x)

    def log_sum_exp(self, logits: Tensor) -> Tensor:  # (N, V) -> (N,)
        """Return the logarithms of the sums of exponentials, float32."""
        return torch.cat([x.float().logsumexp(-1) for x in logits.split(_count_rows(logits))])

    def softmax_gradient_(self, logits: Tensor, targets: Tensor, log_sums: Tensor, factors: Tensor) -> Tensor:
        """Return the gradient of factors (N,) times the cross-entropies of logits (N, V), which may be overwritten. `targets`:
        (N,), -1 for one that is not among the logits; `log_sums`: of all logits of a row, float32."""
        for x, places, log_sum, factor in zip(
            *(each.split(_count_rows(logits)) for each in (logits, targets, log_sums, factors))
        ):
            own = (x.float() - log_sum[:, None]).exp_()
            own.scatter_add_(-1, places.clamp(min=0)[:, None], (places >= 0).float().neg()[:, None])
            x.copy_(own.mul_(factor[:, None]))
        return logits

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
        """Return the sum of the cross-entropies of all targets, in nats, float32: never a mean, so that sums of parts are
        exact. Backward overwrites large logits with their gradient."""
        return loss_sum(logits, targets)


TORCH_KERNELS = Kernels()


def mask_between(q: Tensor, k: Tensor, causal: bool, documents: Tensor | None) -> Tensor:
    """Return the attention mask of queries that are the last of the keys: (Tq, Tk) or (B, 1, Tq, Tk)."""
    keys = torch.arange(k.shape[-2], device=k.device)
    return attention_mask(keys[len(keys) - q.shape[-2] :], keys, causal, documents)


def attention_mask(queries: Tensor, keys: Tensor, causal: bool, documents: Tensor | None) -> Tensor:
    """Return whether each query may see each key: (Tq, Tk), or (B, 1, Tq, Tk) if there are `documents`, (B, T). `queries` and
    `keys` are places in the sequence, any (Tq,) and (Tk,) of its T."""
    visible = queries[:, None] >= keys
    visible = visible if causal else torch.ones_like(visible)
    if documents is None:
        return visible
    return visible & (documents[:, None, queries, None] == documents[:, None, None, keys])


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
        # Without a version: logits of several sequence parts share memory, and torch would find those of the others changed.
        for x, places in _row_blocks(logits.data, targets):
            wide = x.float() if x.dtype != torch.float32 else x.clone()
            with torch.enable_grad():
                loss = cross_entropy_sum(wide.requires_grad_(), places) * gradient
            x.copy_(torch.autograd.grad(loss, wide)[0])
        return logits, None


def _row_blocks(logits: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(logits.split(_count_rows(logits)), targets.split(_count_rows(logits)))


def _count_rows(logits: Tensor) -> int:
    """Return the number of rows of logits that are treated together."""
    block = LOSS_BLOCK if logits.device.type == "cpu" else GPU_LOSS_BLOCK
    return max(1, block // logits.shape[-1])
