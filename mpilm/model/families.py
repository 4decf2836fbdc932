"""The registry of model families: how each is built, which matrices it ties, where its parameters start. CONTRIBUTING.md lists
the other places that a new family needs."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mpilm.config.schema import MIXTURES, QWEN_STYLE, ModelConfig
from mpilm.model.attention import Attention, AttentionCore, FusedQKVAttention
from mpilm.model.layers import Conv1D, FeedForward, LayerNorm, Linear, RMSNorm, RotaryEmbedding, SwiGLU, hash_key
from mpilm.model.lora import add_lora, lora_initial_std
from mpilm.model.moe import MixtureOfExperts
from mpilm.model.transformer import BertEmbedding, Block, PostNormBlock, TokenEmbedding, TokenPositionEmbedding, Transformer

INIT_STD = 0.02


def build_model(model: ModelConfig, vocab_size: int) -> Transformer:
    """Build a model with its adapters, if it has any. Its parameters have no values yet."""
    transformer = BUILDERS[model.arch](model, vocab_size)
    add_lora(transformer, model)
    return transformer


def tied_parameters(model: ModelConfig) -> Mapping[str, str]:
    """Return the parameters that always have the value of another: with tie-embeddings, one matrix has two uses."""
    if not model.tie_embeddings:
        return {}
    return {"head.weight": "embed.tokens.weight" if model.arch in ("gpt2", "bert") else "embed.weight"}


def initial_std(name: str, model: ModelConfig) -> float | None:
    """Return the deviation of initial values, None for ones; smaller for matrices that add to a residual stream."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith(".bias"):
        return 0.0
    if ".lora." in name:
        return lora_initial_std(name, model)
    if name.endswith((".o.weight", ".down.weight")) and model.arch != "bert":
        return INIT_STD / math.sqrt(2 * model.n_layers)
    return INIT_STD


def initial_value(seed: int, name: str, shape: tuple[int, ...], std: float | None) -> Tensor:
    """Return float32 values for the parameter `name`: normal with deviation `std`, or ones if `std` is None. They depend on
    (seed, name, shape) alone, so that any part of a model can be made anywhere. numpy's Philox and its table-driven normal
    distribution give the same numbers on every processor; torch's generators differ between vector widths."""
    if not std:
        return torch.full(shape, 1.0 if std is None else 0.0)
    generator = np.random.Generator(np.random.Philox(key=hash_key("init", seed, name)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(std)


def build_llama(model: ModelConfig, vocab_size: int) -> Transformer:
    """Build a Llama (Touvron et al., arXiv 2302.13971), Qwen or Mixtral model: RMSNorm, rotary positions, SwiGLU. Qwen 2 adds
    biases to queries, keys and values; Qwen 3 normalises queries and keys; Mixtral and Qwen 3 MoE have mixtures of experts."""
    width, eps, qwen = model.d_model, model.norm_eps, model.arch in QWEN_STYLE

    def build_block(path: str) -> Block:
        core = AttentionCore(True, model.dropout, f"{path}.core")
        attention = Attention(model, core, qkv_bias=qwen and not model.qk_norm, qk_norm=qwen and model.qk_norm)
        mlp = MixtureOfExperts(model) if model.arch in MIXTURES else SwiGLU(width, model.d_ff)
        return Block(path, model.dropout, RMSNorm(width, eps), attention, RMSNorm(width, eps), mlp)

    rotary = RotaryEmbedding(model.head_width, model.rope_theta, model.rope_scaling)
    blocks = [build_block(f"blocks.{i}") for i in range(model.n_layers)]
    norm, head = RMSNorm(width, eps), Linear(width, vocab_size, bias=False)
    return Transformer(TokenEmbedding(model, vocab_size), blocks, norm, head, rotary)


def build_gpt2(model: ModelConfig, vocab_size: int) -> Transformer:
    """Build a GPT-2 model (Radford et al., 2019): learned positions, LayerNorm before each part, GELU, biases everywhere."""
    width, eps = model.d_model, model.norm_eps

    def build_block(path: str) -> Block:
        attention = FusedQKVAttention(model, AttentionCore(True, model.dropout, f"{path}.core"))
        mlp = FeedForward(Conv1D(width, model.d_ff), nn.GELU("tanh"), Conv1D(model.d_ff, width))
        return Block(path, model.dropout, LayerNorm(width, eps), attention, LayerNorm(width, eps), mlp)

    blocks = [build_block(f"blocks.{i}") for i in range(model.n_layers)]
    norm, head = LayerNorm(width, eps), Linear(width, vocab_size, bias=False)
    return Transformer(TokenPositionEmbedding(model, vocab_size), blocks, norm, head)


def build_bert(model: ModelConfig, vocab_size: int) -> Transformer:
    """Build a BERT model (Devlin et al., arXiv 1810.04805): an encoder that sees both sides and predicts masked tokens."""
    width, eps = model.d_model, model.norm_eps

    def build_block(path: str) -> Block:
        attention = Attention(model, AttentionCore(False, model.dropout, f"{path}.core"), qkv_bias=True, o_bias=True)
        mlp = FeedForward(Linear(width, model.d_ff, bias=True), nn.GELU(), Linear(model.d_ff, width, bias=True))
        return PostNormBlock(path, model.dropout, LayerNorm(width, eps), attention, LayerNorm(width, eps), mlp)

    blocks = [build_block(f"blocks.{i}") for i in range(model.n_layers)]
    project, head = Linear(width, width, bias=True), Linear(width, vocab_size, bias=True)
    norm = nn.Sequential(OrderedDict(project=project, gelu=nn.GELU(), norm=LayerNorm(width, eps)))
    return Transformer(BertEmbedding(model, vocab_size), blocks, norm, head)


BUILDERS: Mapping[str, Callable[[ModelConfig, int], Transformer]] = {
    "llama": build_llama,
    "qwen": build_llama,
    "mixtral": build_llama,
    "qwen-moe": build_llama,
    "gpt2": build_gpt2,
    "bert": build_bert,
}
