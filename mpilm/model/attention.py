"""Self-attention with grouped queries. The core that mixes positions is an attribute, so it can be exchanged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.model.layers import Conv1D, Dropout, Linear, RMSNorm, rotate
from mpilm.model.rows import Rows

Mixer = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]


class Core(nn.Module):
    """Mixes values by the likeness of queries and keys: (B, H, T, K), 2 x (B, G, T, K) -> (B, H, T, K).

    `causal`: from the present and the past only. With dropout of attention weights it is written out: torch's own takes no
    generator.
    """

    def __init__(self, causal: bool, probability: float, place: str):
        super().__init__()
        self.causal, self.place = causal, place
        self.dropout = Dropout(probability, place)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        if rows.cache is not None:
            k, v = rows.cache.extend(self.place, k, v)
        seen = None if rows.documents is None else self._seen(q, rows.documents)
        if rows.keys is not None and self.dropout.probability:
            return self._written_out(q, k, v, seen, rows.keys)
        causal = self.causal and seen is None and q.shape[-2] > 1  # a single token is the last: it may see all there is
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    def _seen(self, q: Tensor, documents: Tensor | None) -> Tensor:
        """What each position looks at: (T, T), or (B, 1, T, T) where rows hold several documents."""
        seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device)
        seen = seen.tril_() if self.causal else seen
        return seen if documents is None else seen & (documents[:, None, :, None] == documents[:, None, None, :])

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, keys: list[int]) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        unseen = ~(self._seen(q, None) if seen is None else seen)
        weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return self.dropout(weights, keys) @ v


class Attention(nn.Module):
    """Queries, keys and values, rotated by position where the rows say how, mixed by `core`, projected back.

    `qk_norm`: the epsilon of an RMSNorm of each head's queries and keys (Dehghani et al., arXiv 2302.05442); None: none.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, head_width: int, core: Mixer,
        qkv_bias: bool = False, o_bias: bool = False, qk_norm: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.head_width = head_width
        self.q = Linear(d_model, n_heads * head_width, qkv_bias)
        self.k = Linear(d_model, n_kv_heads * head_width, qkv_bias)
        self.v = Linear(d_model, n_kv_heads * head_width, qkv_bias)
        self.q_norm = RMSNorm(head_width, qk_norm) if qk_norm is not None else None
        self.k_norm = RMSNorm(head_width, qk_norm) if qk_norm is not None else None
        self.o = Linear(n_heads * head_width, d_model, o_bias)
        self.core = core

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T, D) -> (B, T, D)
        q = heads(self.q(x), self.head_width, self.q_norm)
        k = heads(self.k(x), self.head_width, self.k_norm)
        v = heads(self.v(x), self.head_width)
        if rows.rotation is not None:
            q, k = rotate(q, *rows.rotation), rotate(k, *rows.rotation)
        return self.o(joined(self.core(q, k, v, rows)))


class FusedAttention(nn.Module):
    """Attention of GPT-2, whose queries, keys and values come from one matrix."""

    def __init__(self, d_model: int, n_heads: int, core: Mixer):
        super().__init__()
        self.head_width = d_model // n_heads
        self.qkv = Conv1D(d_model, 3 * d_model)
        self.o = Conv1D(d_model, d_model)
        self.core = core

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = (heads(part, self.head_width) for part in self.qkv(x).chunk(3, dim=-1))
        return self.o(joined(self.core(q, k, v, rows)))


def heads(x: Tensor, head_width: int, norm: nn.Module | None = None) -> Tensor:  # (B, T, H K) -> (B, H, T, K)
    """The heads apart, as many as the width holds; normalised where there is a norm."""
    x = x.unflatten(-1, (-1, head_width))
    return (x if norm is None else norm(x)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:  # (B, H, T, K) -> (B, T, H K)
    return x.transpose(1, 2).flatten(2)
