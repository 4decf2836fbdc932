"""Attention in blocks of queries whose scores stay in the cache, in bfloat16 on a CPU (Dao et al., arXiv 2205.14135).

Matrix products are torch's. Between them, one pass over the scores of a block makes weights in forward, and another one weights
and gradients in backward, which computes the scores again. Scores are rounded to bfloat16, as in attention written as two
products. Letters in shapes: N = B G groups of heads that share keys, n = H / G heads in each, t queries of a block.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from mpilm.kernels.functions import LoopRunner, array_of, rows_of

MAX_BLOCK = 256  # queries


class QueryBlock(NamedTuple):
    """Some queries, and what they see."""

    queries: slice
    keys: slice  # that any of them sees
    spans: np.ndarray[Any, Any]  # (2, B H t): of each, the first key that it sees and the one after the last


def plan_query_blocks(q: Tensor, causal: bool, documents: Tensor | None) -> list[QueryBlock] | None:
    """Return the blocks of the queries q (B, H, T, K), or None if some query sees keys that are not neighbours: documents,
    (B, T) numbers, may come in pieces. Short sequences have smaller blocks, and skip more keys."""
    batch, heads, length, _ = q.shape
    spans = find_spans(length, causal, None if documents is None else documents.numpy())
    if spans is None:
        return None
    size, blocks = min(MAX_BLOCK, max(64, length // 4)), []
    for start in range(0, length, size):
        own = spans[:, :, start : start + size]
        everyone = np.broadcast_to(own[:, :, None], (2, batch, heads, own.shape[2])).reshape(2, -1)
        blocks.append(QueryBlock(slice(start, start + own.shape[2]), slice(int(own[0].min()), int(own[1].max())), everyone))
    return blocks


def find_spans(length: int, causal: bool, documents: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
    """Return the first key that each query sees and the one after the last, (2, B or 1, T); None if there are gaps."""
    places = np.arange(length)
    first, last = np.zeros((1, length), int), np.full((1, length), length)
    if documents is not None:
        begins = np.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        if any(len(np.unique(row)) < count for row, count in zip(documents, begins.sum(axis=1))):
            return None
        first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        ends = np.roll(np.where(begins, places, length), -1, axis=1)
        ends[:, -1] = length
        last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return np.stack((first, np.broadcast_to(places + 1, first.shape) if causal else last)).astype(np.uint64)


class FusedAttention(Function):
    """Scaled dot-product attention of as many queries as keys: (B, H, T, K), 2 x (B, G, T, K) -> (B, H, T, K)."""

    @staticmethod
    def forward(ctx: Any, loops: LoopRunner, q: Tensor, k: Tensor, v: Tensor, blocks: list[QueryBlock]) -> Tensor:
        ctx.loops, ctx.blocks, ctx.scale = loops, blocks, np.float32(1 / math.sqrt(q.shape[-1]))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)  # (B, T, H, K)
        keys, values, out, ctx.log_sums = loops.transposed(k.flatten(0, 1)), v.flatten(0, 1), array_of(y), []
        for block in blocks:
            scores = torch.bmm(_rows(q, k, block), keys[:, :, block.keys])  # (N, n t, keys)
            rows, sums = rows_of(scores), np.empty((2, block.spans.shape[1]), np.float32)
            arguments = rows, ctx.scale, block.spans, np.uint64(block.keys.start), *sums
            loops.run("attend_rows", len(rows), rows.size, *arguments)
            mixed = rows_of(torch.bmm(scores, values[:, block.keys]))
            loops.run("scale_into", len(mixed), mixed.size, mixed, sums[0], block.queries.start, out)
            ctx.log_sums.append(sums[1])
        ctx.save_for_backward(q, k, v, y)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        loops, (q, k, v, y) = ctx.loops, ctx.saved_tensors
        keys = k.flatten(0, 1)
        keys_t, values_t = loops.transposed(keys), loops.transposed(v.flatten(0, 1))  # as products of batches are fast
        deltas = torch.empty(y.shape[:3])  # (B, T, H)
        pair = rows_of(gradient.transpose(1, 2)), rows_of(y)
        loops.run("dot_rows", len(pair[0]), pair[0].size, *pair, deltas.view(-1).numpy())
        gradient, deltas, dq = gradient.contiguous(), deltas.transpose(1, 2), torch.empty_like(q)
        d_keys, d_values = loops.workspace(2, *keys.shape).zero_()
        for block, log_sums in zip(ctx.blocks, ctx.log_sums):
            queries, outputs = _rows(q, k, block), _rows(gradient, k, block)
            weights = torch.bmm(queries, keys_t[:, :, block.keys])  # of scores first
            d_scores = torch.bmm(outputs, values_t[:, :, block.keys])  # of weights first
            rows, d_rows = rows_of(weights), rows_of(d_scores)
            sums = log_sums, deltas[:, :, block.queries].reshape(-1).numpy()
            arguments = rows, d_rows, ctx.scale, block.spans, np.uint64(block.keys.start), *sums
            loops.run("attend_rows_backward", len(rows), rows.size, *arguments)
            _accumulate(loops, d_values, torch.bmm(weights.transpose(1, 2), outputs), block)
            _accumulate(loops, d_keys, torch.bmm(d_scores.transpose(1, 2), queries), block)
            own = torch.bmm(d_scores, keys[:, block.keys])
            dq[:, :, block.queries] = own.view(*q.shape[:2], -1, q.shape[-1])
        dk, dv = (x.view(k.shape).transpose(1, 2).to(k.dtype).transpose(1, 2) for x in (d_keys, d_values))
        return None, dq, dk, dv, None


def _rows(x: Tensor, k: Tensor, block: QueryBlock) -> Tensor:  # (B, H, T, K) -> (N, n t, K)
    """Return the block's queries, those of heads that share keys one below the other."""
    return x.view(k.shape[0] * k.shape[1], -1, *x.shape[2:])[:, :, block.queries].flatten(1, 2)


def _accumulate(loops: LoopRunner, total: Tensor, x: Tensor, block: QueryBlock) -> None:
    array = array_of(x)
    loops.run("accumulate_keys", len(array), array.size, total.numpy(), array, block.keys.start)
