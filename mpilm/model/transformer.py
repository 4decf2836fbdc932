"""The frame that all families share: embedding, blocks, norm, head."""

from dataclasses import replace

from torch import Tensor, nn

from mpilm.config.schema import ModelConfig
from mpilm.model.layers import Dropout, Embedding, LayerNorm, RotaryEmbedding
from mpilm.model.sequence_info import SequenceInfo


class TokenEmbedding(Embedding):
    """A learned vector for each token."""

    def __init__(self, model: ModelConfig, vocab_size: int):
        super().__init__(vocab_size, model.d_model)
        self.dropout = Dropout(model.dropout, "embed")

    def forward(self, tokens: Tensor, info: SequenceInfo) -> Tensor:  # type: ignore[override]  # (B, T) -> (B, T, D)
        return self.dropout(self.lookup(tokens), info.dropout_keys)


class TokenPositionEmbedding(nn.Module):
    """A learned vector for each token, plus one for its position."""

    def __init__(self, model: ModelConfig, vocab_size: int):
        super().__init__()
        self.tokens = Embedding(vocab_size, model.d_model)
        self.positions = Embedding(model.context_length, model.d_model)
        self.dropout = Dropout(model.dropout, "embed")

    def forward(self, tokens: Tensor, info: SequenceInfo) -> Tensor:  # (B, T) -> (B, T, D)
        return self.dropout(self.tokens(tokens) + self.positions(info.positions), info.dropout_keys)


class BertEmbedding(TokenPositionEmbedding):
    """Learned vectors for the token, its position and its segment, normalised."""

    def __init__(self, model: ModelConfig, vocab_size: int):
        super().__init__(model, vocab_size)
        self.segments = Embedding(2, model.d_model)  # of sentences A and B; mpilm has A only
        self.norm = LayerNorm(model.d_model, model.norm_eps)

    def forward(self, tokens: Tensor, info: SequenceInfo) -> Tensor:  # (B, T) -> (B, T, D)
        x = self.add_segment(self.tokens(tokens) + self.positions(info.positions))
        return self.dropout(self.norm(x), info.dropout_keys)

    def add_segment(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Add the vector of sentence A. An instance can have another function in the place of this one."""
        return x + self.segments.weight[0]


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, path: str, dropout: float, attn_norm: nn.Module, attn: nn.Module, mlp_norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.attn_norm, self.attn, self.attn_dropout = attn_norm, attn, Dropout(dropout, f"{path}.attn")
        self.mlp_norm, self.mlp, self.mlp_dropout = mlp_norm, mlp, Dropout(dropout, f"{path}.mlp")

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.attn_dropout(self.attn(self.attn_norm(x), info), info.dropout_keys)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x), info), info.dropout_keys)


class PostNormBlock(Block):
    """The block of the first Transformer, which normalises sums, not inputs (Vaswani et al., arXiv 1706.03762)."""

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = self.attn_norm(x + self.attn_dropout(self.attn(x, info), info.dropout_keys))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x, info), info.dropout_keys))


class Transformer(nn.Module):
    """Token ids to logits. Parts that are None and blocks that are missing are skipped, so a part of a model keeps its names.
    Tied matrices of `embed` and `head` are two parameters, because each use has a gradient of its own."""

    def __init__(
        self, embed: nn.Module, blocks: list[Block], norm: nn.Module, head: nn.Module, rotary: RotaryEmbedding | None = None
    ):
        super().__init__()
        self.embed: nn.Module | None = embed
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.norm: nn.Module | None = norm
        self.head: nn.Module | None = head
        self.rotary = rotary

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T) -> (B, T, V)
        if self.embed is not None:
            x = self.embed(x, info)  # (B, T, D)
        if self.rotary is not None:
            info = replace(info, rotation=self.rotary(info.positions))
        for block in self.blocks.values():
            x = block(x, info)
        x = self.norm(x) if self.norm is not None else x
        return self.head(x) if self.head is not None else x
