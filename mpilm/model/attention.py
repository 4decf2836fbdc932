"""Self-attention with grouped queries. The core, which mixes positions, is an attribute and can be exchanged."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.config.schema import ModelConfig
from mpilm.model.blockwise_attention import BlockwiseAttention
from mpilm.model.kernels import TORCH_KERNELS
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
            return self._explicit_attention(q, k, v, self._mask(q, k, info), info.dropout_keys)
        queries, keys = q.shape[-2], k.shape[-2]
        needs_mask = info.documents is not None or (self.causal and 1 < queries < keys)
        mask = self._mask(q, k, info) if needs_mask else None
        is_blockwise = q.dtype == torch.bfloat16 and q.device.type == "cpu" and 1 < queries == keys
        if is_blockwise and not torch.compiler.is_compiling():
            return BlockwiseAttention.apply(q, k, v, self.causal, mask, self.kernels)
        causal = self.causal and mask is None and queries > 1  # a single query is the last token: it sees every key
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    def _mask(self, q: Tensor, k: Tensor, info: SequenceInfo) -> Tensor:
        keys = torch.arange(k.shape[-2], device=k.device)
        return attention_mask(keys[len(keys) - q.shape[-2] :], keys, self.causal, info.documents)

    def _explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_keys: list[int]) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return self.dropout(weights, dropout_keys) @ v


def attention_mask(queries: Tensor, keys: Tensor, causal: bool, documents: Tensor | None) -> Tensor:
    """Return whether each query may see each key: (Tq, Tk), or (B, 1, Tq, Tk) if there are `documents`, (B, T). `queries` and
    `keys` are places in the sequence, any (Tq,) and (Tk,) of its T."""
    visible = queries[:, None] >= keys
    visible = visible if causal else torch.ones_like(visible)
    if documents is None:
        return visible
    return visible & (documents[:, None, queries, None] == documents[:, None, None, keys])


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
