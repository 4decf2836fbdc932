"""The two-way table between our parameter names and Hugging Face's, and their config.json. Pure."""

from __future__ import annotations

import re
from typing import Any

from mpilm.config import Model
from mpilm.errors import ConfigError

LLAMA = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.#.attn_norm.weight": "model.layers.#.input_layernorm.weight",
    "blocks.#.attn.q.weight": "model.layers.#.self_attn.q_proj.weight",
    "blocks.#.attn.k.weight": "model.layers.#.self_attn.k_proj.weight",
    "blocks.#.attn.v.weight": "model.layers.#.self_attn.v_proj.weight",
    "blocks.#.attn.o.weight": "model.layers.#.self_attn.o_proj.weight",
    "blocks.#.mlp_norm.weight": "model.layers.#.post_attention_layernorm.weight",
    "blocks.#.mlp.gate.weight": "model.layers.#.mlp.gate_proj.weight",
    "blocks.#.mlp.up.weight": "model.layers.#.mlp.up_proj.weight",
    "blocks.#.mlp.down.weight": "model.layers.#.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def published_name(name: str) -> str:
    """Our name of a parameter to Hugging Face's."""
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name)
    return LLAMA[general].replace("#", number.group(1) if number else "#")


def published_config(model: Model, vocab_size: int, eos: int) -> dict[str, Any]:
    """The config.json with which transformers builds the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_model // model.n_heads,
        "max_position_embeddings": model.context_length,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }


def read_config(published: dict[str, Any], where: str) -> tuple[Model, int]:
    """The model and the vocabulary size of a config.json; raises ConfigError for one that is not of our kind."""
    if published.get("model_type") != "llama":
        raise ConfigError(f"{where}: model_type {published.get('model_type')!r} is not supported; llama is")
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    unsupported = {
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) not in ("default", None),
        "hidden_act": published.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(published.get("attention_bias")),
        "mlp_bias": bool(published.get("mlp_bias")),
    }
    if any(unsupported.values()):
        raise ConfigError(f"{where}: {', '.join(k for k, bad in unsupported.items() if bad)} of this model is not supported")
    try:
        heads, width = published["num_attention_heads"], published["hidden_size"]
        if published.get("head_dim") not in (None, width // heads):
            raise ConfigError(f"{where}: head_dim {published['head_dim']} is not hidden_size / num_attention_heads")
        model = Model(
            n_layers=published["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=published.get("num_key_value_heads") or heads,
            d_model=width,
            d_ff=published["intermediate_size"],
            context_length=published["max_position_embeddings"],
            tie_embeddings=published.get("tie_word_embeddings", False),
            rope_theta=float(published.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=published.get("rms_norm_eps", 1e-6),
        )
        return model, published["vocab_size"]
    except KeyError as missing:
        raise ConfigError(f"{where}: lacks {missing}") from None
