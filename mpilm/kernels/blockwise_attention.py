"""Attention in bfloat16 on a CPU, in blocks of queries: large products, and no work for keys that a block cannot see.

torch's fused kernel multiplies small tiles there; this is 1.1 to 1.8 times as fast (docs/log.md). Scores are rounded to
bfloat16, as in attention written as two products; the fused kernel keeps them in float32.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MAX_BLOCK = 256  # queries


class BlockwiseAttention(torch.autograd.Function):
    """Scaled dot-product attention of as many queries as keys: (B, H, T, K), 2 x (B, G, T, K) -> (B, H, T, K). `mask`: None, or
    which keys each query sees, (T, T) or (B, 1, T, T). Backward computes the weights again, so no (T, T) tensor lives."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        ctx.scale, ctx.causal, ctx.mask = 1 / math.sqrt(q.shape[-1]), causal, mask
        ctx.save_for_backward(q, k, v)
        q, out = q * ctx.scale, torch.empty_like(q)
        for rows, keys in _blocks(q.shape[-2], causal):
            weights = _attention_weights(_grouped(q, k, rows), k[:, :, keys], rows, causal, mask)
            out[:, :, rows] = _ungrouped(weights @ v[:, :, keys], q, rows)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        q = q * ctx.scale
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for rows, keys in _blocks(q.shape[-2], ctx.causal):
            queries, outputs = _grouped(q, k, rows), _grouped(gradient, k, rows)
            weights = _attention_weights(queries, k[:, :, keys], rows, ctx.causal, ctx.mask)
            dv[:, :, keys] += weights.transpose(-1, -2) @ outputs
            d_weights = outputs @ v[:, :, keys].transpose(-1, -2)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dq[:, :, rows] = _ungrouped(d_scores @ k[:, :, keys], q, rows)
            dk[:, :, keys] += d_scores.transpose(-1, -2) @ queries
        return dq * ctx.scale, dk.to(k.dtype), dv.to(v.dtype), None, None


def _blocks(length: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block and the keys that they may see. Short sequences have smaller blocks, and skip more."""
    size = min(MAX_BLOCK, max(64, length // 4))
    for start in range(0, length, size):
        stop = min(length, start + size)
        yield slice(start, stop), slice(0, stop if causal else length)


def _grouped(x: Tensor, k: Tensor, rows: slice) -> Tensor:  # (B, H, T, K) -> (B, G, H/G x rows, K)
    """Return the block with the queries that share keys one below the other."""
    return x.unflatten(1, (k.shape[1], -1))[:, :, :, rows].flatten(2, 3)


def _ungrouped(x: Tensor, q: Tensor, rows: slice) -> Tensor:  # (B, G, H/G x rows, K) -> (B, H, rows, K)
    return x.unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)


def _attention_weights(q: Tensor, k: Tensor, rows: slice, causal: bool, mask: Tensor | None) -> Tensor:
    count = rows.stop - rows.start
    scores = q @ k.transpose(-1, -2)  # (B, G, H/G x rows, keys)
    by_head = scores.unflatten(2, (-1, count))  # (B, G, H/G, rows, keys)
    if mask is not None:
        hidden = ~mask[..., rows, : k.shape[-2]]
        by_head.masked_fill_(hidden if hidden.dim() == 2 else hidden[:, :, None], float("-inf"))
    elif causal:
        later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
        by_head[..., rows].masked_fill_(later, float("-inf"))
    return scores.softmax(dim=-1)
