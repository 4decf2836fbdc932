"""BERT (Devlin et al., arXiv 1810.04805): an encoder that sees both sides and predicts the tokens that were masked."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.config import Model
from mpilm.model.attention import Attention, Core
from mpilm.model.layers import Dropout, Embedding, FeedForward, LayerNorm, Linear
from mpilm.model.rows import Rows
from mpilm.model.transformer import PostNormBlock, Transformer

SEGMENTS = 2  # sentence A and sentence B; everything here is A


class SegmentedEmbedding(nn.Module):
    """Learned vectors for the token, its position and its segment, normalised."""

    def __init__(self, vocab_size: int, context_length: int, d_model: int, eps: float, dropout: float):
        super().__init__()
        self.tokens = Embedding(vocab_size, d_model)
        self.positions = Embedding(context_length, d_model)
        self.segments = Embedding(SEGMENTS, d_model)
        self.norm = LayerNorm(d_model, eps)
        self.dropout = Dropout(dropout, "embed")

    def forward(self, tokens: Tensor, rows: Rows) -> Tensor:  # (B, T) -> (B, T, D)
        x = self.tokens(tokens) + self.positions(rows.positions) + self.segments.weight[0]
        return self.dropout(self.norm(x), rows.keys)


class Transform(nn.Module):
    """What stands between the blocks and the output matrix."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.project = Linear(d_model, d_model, bias=True)
        self.norm = LayerNorm(d_model, eps)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.norm(F.gelu(self.project(x)))


def bert(model: Model, vocab_size: int) -> Transformer:
    """The encoder of that shape, with the head that predicts masked tokens."""
    return Transformer(
        SegmentedEmbedding(vocab_size, model.context_length, model.d_model, model.norm_eps, model.dropout),
        [_block(model, f"blocks.{i}") for i in range(model.n_layers)],
        Transform(model.d_model, model.norm_eps),
        Linear(model.d_model, vocab_size, bias=True),
    )


def _block(model: Model, place: str) -> nn.Module:
    width, eps = model.d_model, model.norm_eps
    attention = Attention(
        width, model.n_heads, model.n_heads, model.head_width, Core(False, model.dropout, f"{place}.core"),
        qkv_bias=True, o_bias=True,
    )  # fmt: skip
    mlp = FeedForward(Linear(width, model.d_ff, bias=True), F.gelu, Linear(model.d_ff, width, bias=True))
    return PostNormBlock(place, model.dropout, LayerNorm(width, eps), attention, LayerNorm(width, eps), mlp)
