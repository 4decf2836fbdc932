"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before each part, GELU, biases everywhere."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.config import Model
from mpilm.model.attention import Core, FusedAttention
from mpilm.model.layers import Conv1D, Dropout, Embedding, FeedForward, LayerNorm, Linear
from mpilm.model.rows import Rows
from mpilm.model.transformer import Block, Transformer


class PositionedEmbedding(nn.Module):
    """A learned vector for each token, plus one for its position."""

    def __init__(self, vocab_size: int, context_length: int, d_model: int, dropout: float):
        super().__init__()
        self.tokens = Embedding(vocab_size, d_model)
        self.positions = Embedding(context_length, d_model)
        self.dropout = Dropout(dropout, "embed")

    def forward(self, tokens: Tensor, rows: Rows) -> Tensor:  # (B, T) -> (B, T, D)
        return self.dropout(self.tokens(tokens) + self.positions(rows.positions), rows.keys)


def gpt2(model: Model, vocab_size: int) -> Transformer:
    """The decoder of that shape."""
    return Transformer(
        PositionedEmbedding(vocab_size, model.context_length, model.d_model, model.dropout),
        [_block(model, f"blocks.{i}") for i in range(model.n_layers)],
        LayerNorm(model.d_model, model.norm_eps),
        Linear(model.d_model, vocab_size),
    )


def _block(model: Model, place: str) -> nn.Module:
    width, eps = model.d_model, model.norm_eps
    attention = FusedAttention(width, model.n_heads, Core(True, model.dropout, f"{place}.core"))
    mlp = FeedForward(Conv1D(width, model.d_ff), partial(F.gelu, approximate="tanh"), Conv1D(model.d_ff, width))
    return Block(place, model.dropout, LayerNorm(width, eps), attention, LayerNorm(width, eps), mlp)
