"""Causal self-attention with grouped queries. The core that mixes positions is an attribute, so it can be exchanged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.model.layers import Dropout, Linear, rotate

Core = Callable[[Tensor, Tensor, Tensor, list[int] | None], Tensor]
Rotation = tuple[Tensor, Tensor]


def fused_core(q: Tensor, k: Tensor, v: Tensor, keys: list[int] | None) -> Tensor:
    """torch's scaled_dot_product_attention: (B, H, T, K), 2 x (B, G, T, K) -> (B, H, T, K)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class ExplicitCore(nn.Module):
    """Attention written out, for dropout of attention weights: torch's own takes no generator."""

    def __init__(self, probability: float, place: str):
        super().__init__()
        self.dropout = Dropout(probability, place)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: list[int] | None) -> Tensor:
        if keys is None:
            return fused_core(q, k, v, keys)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return self.dropout(weights, keys) @ v


class Attention(nn.Module):
    """Queries, keys and values, rotated by position, mixed by `core`, projected back."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, core: Core):
        super().__init__()
        self.head_width = d_model // n_heads
        self.q = Linear(d_model, n_heads * self.head_width)
        self.k = Linear(d_model, n_kv_heads * self.head_width)
        self.v = Linear(d_model, n_kv_heads * self.head_width)
        self.o = Linear(n_heads * self.head_width, d_model)
        self.core = core

    def forward(self, x: Tensor, rotation: Rotation, keys: list[int] | None) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        mixed = self.core(rotate(q, *rotation), rotate(k, *rotation), v, keys)  # (B, H, T, K)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # (B, T, H K) -> (B, H, T, K), the number of heads taken from the width
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
