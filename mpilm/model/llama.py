"""Llama-style decoders (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Qwen adds biases to queries, keys and values (version 2), or normalises queries and keys (version 3); Mixtral has several
feed-forward layers, of which each token uses some.
"""

from __future__ import annotations

from torch import Tensor, nn

from mpilm.config import Model
from mpilm.model.attention import Attention, Core
from mpilm.model.experts import Experts
from mpilm.model.layers import Dropout, Embedding, Linear, RMSNorm, Rotary, SwiGLU
from mpilm.model.rows import Rows
from mpilm.model.transformer import Block, Transformer


class TokenEmbedding(Embedding):
    """A learned vector for each token."""

    def __init__(self, vocab_size: int, d_model: int, dropout: float):
        super().__init__(vocab_size, d_model)
        self.dropout = Dropout(dropout, "embed")

    def forward(self, tokens: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]  # (B, T) -> (B, T, D)
        return self.dropout(nn.functional.embedding(tokens, self.weight), rows.keys)


def llama(model: Model, vocab_size: int) -> Transformer:
    """Llama, Qwen or Mixtral, as `model.arch` says."""
    return Transformer(
        TokenEmbedding(vocab_size, model.d_model, model.dropout),
        [_block(model, f"blocks.{i}") for i in range(model.n_layers)],
        RMSNorm(model.d_model, model.norm_eps),
        Linear(model.d_model, vocab_size),
        Rotary(model.head_width, model.rope_theta, model.rope_scaling),
    )


def _block(model: Model, place: str) -> nn.Module:
    qwen = model.arch == "qwen"
    attention = Attention(
        model.d_model, model.n_heads, model.n_kv_heads, model.head_width, Core(True, model.dropout, f"{place}.core"),
        qkv_bias=qwen and not model.qk_norm, qk_norm=model.norm_eps if qwen and model.qk_norm else None,
    )  # fmt: skip
    mlp = SwiGLU(model.d_model, model.d_ff) if model.arch != "mixtral" else Experts(model)
    norms = RMSNorm(model.d_model, model.norm_eps), RMSNorm(model.d_model, model.norm_eps)
    return Block(place, model.dropout, norms[0], attention, norms[1], mlp)
