"""Attention and linear layers over the parts of a sequence, which the ranks of the context axis share out.

Each query part attends to one key part after the other; the results are merged by their log-sum-exps. Two methods compute the
same products and sums, hence the same bits: "ring" sends keys and values to the ranks with the queries (Liu et al.,
arXiv 2310.01889); "ulysses" exchanges tokens for heads first, so that each rank has all tokens of some heads (Jacobs et al.,
arXiv 2309.14509).

Letters in shapes: B sequences, H query heads, G key heads, n tokens of this rank, t tokens of a part, K head width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mpilm.comm.base import SelfComm
from mpilm.model.attention import AttentionCore
from mpilm.model.layers import Conv1D
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.sequence_axis import HeadsForTokens, KeyValueRing, SequenceAxis
from mpilm.ops.tree_reduce import fold_in_tree_order

FUSED_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"

Attend = Callable[[Tensor, Tensor, Tensor, SequenceInfo], Tensor]


def attend_by_part(
    core: AttentionCore,
    attend_all: Attend,
    axis: SequenceAxis,
    exchanges_heads: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    info: SequenceInfo,
) -> Tensor:  # (B, H, n, K), 2 x (B, G, n, K) -> (B, H, n, K)
    """Attend over all parts; over tokens that are not divided with `attend_all`. Collective over the context axis."""
    if not axis.sliced:
        return attend_all(q, k, v, info)
    documents = None if info.documents is None else info.documents.unflatten(1, (axis.parts, -1))
    masks = PartMasks(core, documents, info.dropout_keys)
    if not exchanges_heads:
        return PartAttention.apply(masks, axis, q, k, v)
    q, k, v = (HeadsForTokens.apply(axis, x, False) for x in (q, k, v))
    return HeadsForTokens.apply(axis, PartAttention.apply(masks, SequenceAxis(SelfComm(), axis.parts), q, k, v), True)


@dataclass(frozen=True)
class PartMasks:
    """The masks of the attention weights between two parts."""

    core: AttentionCore
    documents: Tensor | None  # (B, S, t)
    dropout_keys: list[int] | None  # of each sequence

    def visible(self, query: int, key: int, tokens: int) -> Tensor | None:
        """Return what the queries of one part may see of the keys of another, (B or 1, 1, t, t); None: everything."""
        mask = None
        if self.core.causal and query == key:
            mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        if self.documents is not None:
            same = (self.documents[:, query, :, None] == self.documents[:, key, None, :])[:, None]
            mask = same if mask is None else same & mask.to(same.device)
        return mask

    def drop(self, x: Tensor, query: int, key: int) -> Tensor:  # (B, H, t, t) -> (B, H, t, t)
        """Apply the dropout mask of a pair of parts, the same in every call, to weights or to their gradients."""
        dropout = self.core.dropout
        if self.dropout_keys is None or not dropout.probability:
            return x
        masks = torch.empty_like(x)
        for mask, sample in zip(masks, self.dropout_keys):
            dropout.draw(mask, sample, f"{dropout.path}.{query}.{key}")
        return x * masks.div_(1.0 - dropout.probability)


class PartAttention(Function):
    """Attention of this rank's query parts to all key parts: (B, H, n, K), 2 x (B, G, n, K) -> (B, H, n, K). Forward and
    backward are collective over the context axis."""

    @staticmethod
    def forward(ctx: Any, masks: PartMasks, axis: SequenceAxis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, own = dict(zip(axis.local_parts, axis.split(q, 2))), _stack_pairs(axis, k, v)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.autocast(q.device.type, enabled=False):
            for step, blocks in enumerate(KeyValueRing(axis, own, masks.core.causal).steps()):
                for part, block in blocks.items():
                    result = attend(queries[part], block, masks, part, (part - step) % axis.parts)
                    merged[part] = merge(*merged[part], *result) if part in merged else result
        outputs, sums = zip(*(merged[part] for part in axis.local_parts))
        # In memory (B, n, H, K), so that the heads are merged without a copy.
        y = torch.cat([x.to(q.dtype).transpose(1, 2) for x in outputs], dim=1).transpose(1, 2)
        ctx.masks, ctx.axis = masks, axis
        ctx.save_for_backward(q, k, v, y, torch.cat(sums, dim=2))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        axis, masks, (q, k, v, y, log_sums) = ctx.axis, ctx.masks, ctx.saved_tensors
        forward = dict(zip(axis.local_parts, zip(*(axis.split(x, 2) for x in (gradient, q, y, log_sums)))))
        ring, queries = KeyValueRing(axis, _stack_pairs(axis, k, v), masks.core.causal), dict[int, Tensor]()
        with torch.autocast(q.device.type, enabled=False):
            for step, blocks in enumerate(ring.steps()):
                contributions = {}
                for part, block in blocks.items():
                    own, *others = attend_backward(forward[part], block, masks, part, (part - step) % axis.parts)
                    wide = own if own.dtype == torch.float64 else own.float()
                    queries[part] = queries[part].add_(wide) if part in queries else wide
                    contributions[part] = torch.stack(others)
                ring.add_gradients(step, contributions)
        pairs = ring.finish_gradients()
        dq = torch.cat([queries[part] for part in axis.local_parts], dim=2)
        dk, dv = torch.cat([pairs[part] for part in axis.local_parts], dim=3)
        return None, None, *(x.to(q.dtype) for x in (dq, dk, dv))


def _stack_pairs(axis: SequenceAxis, k: Tensor, v: Tensor) -> dict[int, Tensor]:
    """Return keys and values of this rank's parts, (2, B, G, t, K) each."""
    pairs = zip(axis.split(k, 2), axis.split(v, 2))
    return {part: torch.stack(pair) for part, pair in zip(axis.local_parts, pairs)}


def merge(y: Tensor, log_sum: Tensor, other: Tensor, other_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention to the keys of two blocks together: (B, H, t, K), (B, H, t) of each."""
    largest = torch.maximum(log_sum, other_sum)
    largest = largest.where(largest > -math.inf, 0.0)
    weight, other_weight = (_by_head(torch.exp, x - largest) for x in (log_sum, other_sum))
    total = weight + other_weight
    divisor = total.where(total > 0, 1.0)
    y = y * (weight / divisor)[..., None] + other * (other_weight / divisor)[..., None]
    return y, largest + _by_head(torch.log, total)


def _by_head(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # (B, H, t) -> (B, H, t)
    """Return function(x), computed for each head by itself: torch's vectors leave the last elements of a tensor to other code
    with other bits, and the number of heads depends on the layout."""
    return torch.stack([function(head.contiguous()) for head in x.unbind(1)], dim=1)


def attend(q: Tensor, block: Tensor, masks: PartMasks, query: int, key: int) -> tuple[Tensor, Tensor]:
    """Return the attention of a query part (B, H, t, K) to the keys and values of a part, (2, B, G, t, K), in float32 or wider,
    and the logarithms of the sums of exponentials, (B, H, t): -inf for a query that sees none of the keys."""
    k, v = block
    if is_fused(q, masks):
        mask, is_causal = fused_mask(q, masks, query, key)
        y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
        if mask is not None:  # the kernel returns 0 for a query that sees no key
            log_sum = log_sum.masked_fill((mask == -math.inf).all(dim=-1), -math.inf)
        return y if y.dtype == torch.float64 else y.float(), log_sum
    scores = visible_scores(q, k, masks, query, key)
    log_sum = scores.logsumexp(dim=-1)
    weights = (scores - log_sum.where(log_sum > -math.inf, 0.0)[..., None]).exp()
    weights = masks.drop(weights, query, key)
    return (weights.to(q.dtype) @ repeat_groups(v, q)).to(scores.dtype), log_sum


def attend_backward(
    forward: tuple[Tensor, ...], block: Tensor, masks: PartMasks, query: int, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the contributions of a pair of parts to the gradients of q, k and v. `forward`: of the query part, the gradient
    of its attention to all keys, its queries, that attention, and its log-sum-exps."""
    (gradient, q, y, log_sum), (k, v) = forward, block
    if is_fused(q, masks):
        mask, is_causal = fused_mask(q, masks, query, key)
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash_backward(gradient, q, k, v, y, log_sum, 0.0, is_causal, attn_mask=mask)
    scores = visible_scores(q, k, masks, query, key)
    weights = (scores - log_sum.where(log_sum > -math.inf, 0.0)[..., None]).exp()
    dv = masks.drop(weights, query, key).to(q.dtype).transpose(-1, -2) @ gradient
    d_weights = masks.drop((gradient @ repeat_groups(v, q).transpose(-1, -2)).to(scores.dtype), query, key)
    delta = (gradient.to(scores.dtype) * y.to(scores.dtype)).sum(dim=-1, keepdim=True)
    d_scores = (weights * (d_weights - delta) / math.sqrt(q.shape[-1])).to(q.dtype)
    dq, dk = d_scores @ repeat_groups(k, q), d_scores.transpose(-1, -2) @ q
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(dim=2) for x in (dk, dv))


def is_fused(q: Tensor, masks: PartMasks) -> bool:
    """Return whether torch's fused kernel, if there is one, can compute the attention: on a CPU, without dropout."""
    return (
        q.device.type == "cpu"
        and hasattr(torch.ops.aten, FUSED_KERNEL)
        and not (masks.dropout_keys is not None and masks.core.dropout.probability)
    )


def fused_mask(q: Tensor, masks: PartMasks, query: int, key: int) -> tuple[Tensor | None, bool]:
    """Return the mask to be added to scores, and whether attention is causal beside it."""
    if masks.documents is None:
        return None, masks.core.causal and query == key
    visible = masks.visible(query, key, q.shape[2])
    assert visible is not None
    return q.new_zeros(visible.shape).masked_fill_(~visible, -math.inf), False


def visible_scores(q: Tensor, k: Tensor, masks: PartMasks, query: int, key: int) -> Tensor:  # (B, H, t, t)
    scores = q @ repeat_groups(k, q).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    visible = masks.visible(query, key, q.shape[2])
    return scores if visible is None else scores.masked_fill(~visible.to(q.device), -math.inf)


def repeat_groups(x: Tensor, q: Tensor) -> Tensor:  # (B, G, t, K) -> (B, H, t, K)
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def linear_by_part(
    module: nn.Linear | Conv1D, multiply_all: Callable[[Tensor], Tensor], axis: SequenceAxis, x: Tensor
) -> Tensor:
    """Return module(x), computed for each sequence part by itself; for tokens that are not divided with `multiply_all`."""
    weight, is_transposed = module.weight, isinstance(module, Conv1D)
    if not axis.sliced:
        return multiply_all(x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return LinearByPart.apply(x, weight, module.bias, len(axis.local_parts), is_transposed)


class LinearByPart(Function):
    """x W^T + b, with one product for each of `parts` parts of the tokens: (B, n, in) -> (B, n, out). The gradients of W and b
    are the sums over the parts in tree order. Unlike modules that are called for each part it keeps x and W only once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, is_transposed: bool) -> Tensor:
        w = weight.to(x.dtype) if is_transposed else weight.to(x.dtype).t()  # (in, out)
        b = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.parts, ctx.is_transposed, ctx.dtype = parts, is_transposed, weight.dtype
        pieces = _rows_of_parts(x, parts)
        y = x.new_empty(parts, pieces.shape[1], w.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            for piece, out in zip(pieces, y):
                torch.mm(piece, w, out=out) if b is None else torch.addmm(b, piece, w, out=out)
        return _tokens_of_parts(y, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        rows, dx, dw, db = _rows_of_parts(gradient, ctx.parts), None, None, None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = x.new_empty(ctx.parts, rows.shape[1], w.shape[0])
                for row, out in zip(rows, dx):
                    torch.mm(row, w.t(), out=out)
                dx = _tokens_of_parts(dx, x)
            if ctx.needs_input_grad[1]:
                pairs = zip(_rows_of_parts(x, ctx.parts), rows)
                products = ((a.t() @ b if ctx.is_transposed else b.t() @ a).to(ctx.dtype) for a, b in pairs)
                dw = fold_in_tree_order(products, ctx.parts)
            if ctx.needs_input_grad[2]:
                db = fold_in_tree_order((row.sum(dim=0).to(ctx.dtype) for row in rows), ctx.parts)
        return dx, dw, db, None, None


def _rows_of_parts(x: Tensor, parts: int) -> Tensor:  # (B, n, D) -> (parts, B n / parts, D)
    return x.unflatten(1, (parts, -1)).transpose(0, 1).contiguous().flatten(1, 2)


def _tokens_of_parts(y: Tensor, x: Tensor) -> Tensor:  # (parts, B n / parts, D), of (B, n, ...) -> (B, n, D)
    return y.view(len(y), len(x), x.shape[1] // len(y), y.shape[-1]).transpose(0, 1).contiguous().flatten(1, 2)
