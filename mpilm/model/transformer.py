"""The frame that all families share: embedding, blocks, normalisation, head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from mpilm.model.layers import Dropout, Rotary
from mpilm.model.rows import Rows


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, place: str, dropout: float, attn_norm: nn.Module, attn: nn.Module, mlp_norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.attn_norm, self.attn, self.attn_dropout = attn_norm, attn, Dropout(dropout, f"{place}.attn")
        self.mlp_norm, self.mlp, self.mlp_dropout = mlp_norm, mlp, Dropout(dropout, f"{place}.mlp")

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.attn_dropout(self.attn(self.attn_norm(x), rows), rows.keys)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x), rows), rows.keys)


class PostNormBlock(Block):
    """As the first Transformer had it: the sum is normalised, not the input (Vaswani et al., arXiv 1706.03762)."""

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = self.attn_norm(x + self.attn_dropout(self.attn(x, rows), rows.keys))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x, rows), rows.keys))


class Transformer(nn.Module):
    """Token ids to logits. Parts that are None, and blocks that are missing, are skipped.

    `embed` is called with tokens and rows. The matrices of `embed` and `head` are two parameters even where they are tied:
    each use has a gradient of its own.
    """

    def __init__(
        self, embed: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module, head: nn.Module, rotary: Rotary | None = None
    ):
        super().__init__()
        self.embed: nn.Module | None = embed
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.norm: nn.Module | None = norm
        self.head: nn.Module | None = head
        self.rotary = rotary

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T) -> (B, T, V)
        if self.embed is not None:
            x = self.embed(x, rows)  # (B, T, D)
        if self.rotary is not None:
            rows = replace(rows, rotation=self.rotary(rows.positions))
        for block in self.blocks.values():
            x = block(x, rows)
        x = self.norm(x) if self.norm is not None else x
        return self.head(x) if self.head is not None else x
