"""A Llama-style decoder (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mpilm.config import Model
from mpilm.model.attention import Attention, Core, ExplicitCore, fused_core
from mpilm.model.layers import Dropout, Embedding, Linear, RMSNorm, SwiGLU, rotation

TIED = {"head.weight": "embed.weight"}  # with tie-embeddings: one matrix, two uses
STD = 0.02


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, model: Model, place: str):
        super().__init__()
        core: Core = ExplicitCore(model.dropout, f"{place}.core") if model.dropout else fused_core
        self.attn_norm = RMSNorm(model.d_model, model.norm_eps)
        self.attn = Attention(model.d_model, model.n_heads, model.n_kv_heads, core)
        self.attn_dropout = Dropout(model.dropout, f"{place}.attn")
        self.mlp_norm = RMSNorm(model.d_model, model.norm_eps)
        self.mlp = SwiGLU(model.d_model, model.d_ff)
        self.mlp_dropout = Dropout(model.dropout, f"{place}.mlp")

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], keys: list[int] | None) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.attn_dropout(self.attn(self.attn_norm(x), turn, keys), keys)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), keys)


class Llama(nn.Module):
    """Token ids to logits. Parts that are None, and blocks that are missing, are skipped.

    `embed.weight` and `head.weight` are two parameters even where they are tied: each use has a gradient of its own.
    """

    def __init__(self, model: Model, vocab_size: int):
        super().__init__()
        self.rope = (model.d_model // model.n_heads, model.rope_theta)
        self.embed: nn.Module | None = Embedding(vocab_size, model.d_model)
        self.dropout = Dropout(model.dropout, "embed")
        self.blocks = nn.ModuleDict({str(i): Block(model, f"blocks.{i}") for i in range(model.n_layers)})
        self.norm: nn.Module | None = RMSNorm(model.d_model, model.norm_eps)
        self.head: nn.Module | None = Linear(model.d_model, vocab_size)

    def forward(self, x: Tensor, positions: Tensor, keys: list[int] | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        if self.embed is not None:
            x = self.dropout(self.embed(x), keys)  # (B, T, D)
        turn = rotation(positions, *self.rope)
        for block in self.blocks.values():
            x = block(x, turn, keys)
        x = self.norm(x) if self.norm is not None else x
        return self.head(x) if self.head is not None else x


def initial_std(name: str, model: Model) -> float | None:
    """Deviation of a parameter's initial values; None for ones. What adds to the residual stream starts smaller."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith(("attn.o.weight", "mlp.down.weight")):
        return STD / math.sqrt(2 * model.n_layers)
    return STD
