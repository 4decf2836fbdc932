"""Self-attention with grouped queries. The core, which mixes positions, is an attribute and can be exchanged."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpilm.config.schema import ModelConfig
from mpilm.kernels.base import TORCH_KERNELS, mask_between
from mpilm.model.layers import Conv1D, Dropout, Linear, RMSNorm
from mpilm.model.sequence_info import SequenceInfo

AttentionFn = Callable[[Tensor, Tensor, Tensor, SequenceInfo], Tensor]


class AttentionCore(nn.Module):
    """Scaled dot-product attention: (B, H, Tq, K), 2 x (B, G, Tk, K) -> (B, H, Tq, K). The queries are the last of the keys.
    Dropout of attention weights takes the explicit formula, because torch's fused kernels accept no generator."""

    kernels = TORCH_KERNELS

    def __init__(self, causal: bool, dropout: float, path: str):
        super().__init__()
        self.causal, self.path = causal, path
        self.dropout = Dropout(dropout, path)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo) -> Tensor:
        if info.cache is not None:
            k, v = info.cache.append(self.path, k, v)
        if info.dropout_keys is not None and self.dropout.probability:
            mask = mask_between(q, k, self.causal, info.documents)
            return self._explicit_attention(q, k, v, mask, info.dropout_keys)
        return self.kernels.attend(q, k, v, self.causal, info.documents)

    def _explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_keys: list[int]) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return self.dropout(weights, dropout_keys) @ v


class Attention(nn.Module):
    """Queries, keys and values, rotated if `info` has a rotation, mixed by `core` and projected back. `qk_norm` normalises the
    queries and keys of each head (Dehghani et al., arXiv 2302.05442)."""

    kernels = TORCH_KERNELS

    def __init__(self, model: ModelConfig, core: AttentionFn, qkv_bias: bool, o_bias: bool = False, qk_norm: bool = False):
        super().__init__()
        self.head_width = model.head_width
        self.q = Linear(model.d_model, model.n_heads * model.head_width, qkv_bias)
        self.k = Linear(model.d_model, model.n_kv_heads * model.head_width, qkv_bias)
        self.v = Linear(model.d_model, model.n_kv_heads * model.head_width, qkv_bias)
        self.q_norm = RMSNorm(model.head_width, model.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(model.head_width, model.norm_eps) if qk_norm else None
        self.o = Linear(model.n_heads * model.head_width, model.d_model, o_bias)
        self.core = core

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T, D) -> (B, T, D)
        q = split_heads(self.q(x), self.head_width, self.q_norm)
        k = split_heads(self.k(x), self.head_width, self.k_norm)
        v = split_heads(self.v(x), self.head_width)
        if info.rotation is not None:
            q, k = (self.kernels.rotate(x, *info.rotation) for x in (q, k))
        return self.o(merge_heads(self.core(q, k, v, info)))


class FusedQKVAttention(nn.Module):
    """GPT-2's attention: one matrix makes queries, keys and values."""

    def __init__(self, model: ModelConfig, core: AttentionFn):
        super().__init__()
        self.head_width = model.head_width
        self.qkv = Conv1D(model.d_model, 3 * model.d_model)
        self.o = Conv1D(model.d_model, model.d_model)
        self.core = core

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = (split_heads(part, self.head_width) for part in self.qkv(x).chunk(3, dim=-1))
        return self.o(merge_heads(self.core(q, k, v, info)))


def split_heads(x: Tensor, head_width: int, norm: nn.Module | None = None) -> Tensor:  # (B, T, H K) -> (B, H, T, K)
    """Return the heads, as many as the width holds, each normalised if there is a `norm`."""
    x = x.unflatten(-1, (-1, head_width))
    return (x if norm is None else norm(x)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:  # (B, H, T, K) -> (B, T, H K)
    return x.transpose(1, 2).flatten(2)
