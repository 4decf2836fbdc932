"""The config.json of Hugging Face's libraries, to be written and to be read. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpilm.config import Config, Model, resolve
from mpilm.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """A model_type: our setting -> their key, for settings of this family; `absent`: what a file means that lacks a key;
    `fixed`: what must be so, as nothing else is built here."""

    arch: str
    architecture: str
    keys: Mapping[str, str]
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


COMMON = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "context_length": "max_position_embeddings",
}
SHAPE = COMMON | {"tie_embeddings": "tie_word_embeddings"}
ROTARY = SHAPE | {"n_kv_heads": "num_key_value_heads", "head_width": "head_dim", "norm_eps": "rms_norm_eps"}
ABSENT = {"n_kv_heads": 0, "head_width": 0, "norm_eps": 1e-6, "tie_embeddings": False}
KINDS = {
    "llama": Kind(
        "llama", "LlamaForCausalLM", ROTARY, ABSENT, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": Kind("qwen", "Qwen2ForCausalLM", ROTARY, ABSENT, {"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Kind(
        "qwen", "Qwen3ForCausalLM", ROTARY, ABSENT | {"head_width": 128},
        {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
    "mixtral": Kind(
        "mixtral", "MixtralForCausalLM",
        ROTARY | {
            "n_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok", "router_loss": "router_aux_loss_coef"
        },
        ABSENT | {"norm_eps": 1e-5, "n_experts": 8, "experts_per_token": 2, "router_loss": 0.001},
        {"hidden_act": "silu", "sliding_window": None},
    ),
    "gpt2": Kind(
        "gpt2", "GPT2LMHeadModel",
        {
            "n_layers": "n_layer", "n_heads": "n_head", "d_model": "n_embd", "d_ff": "n_inner",
            "context_length": "n_positions", "tie_embeddings": "tie_word_embeddings", "norm_eps": "layer_norm_epsilon",
        },
        {"d_ff": 0, "tie_embeddings": True, "norm_eps": 1e-5},
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "bert": Kind(
        "bert", "BertForMaskedLM", COMMON | {"norm_eps": "layer_norm_eps"}, {"norm_eps": 1e-12},
        {
            "hidden_act": "gelu", "is_decoder": False, "type_vocab_size": 2, "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
THETA = {"mixtral": 1e6}  # what a file without a rope_theta means; elsewhere 10,000
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def kind_of(model: Model) -> str:
    """The model_type of a model."""
    if model.arch == "qwen":
        return "qwen3" if model.qk_norm else "qwen2"
    return model.arch


def published_config(model: Model, vocab_size: int, eos: int) -> dict[str, Any]:
    """The config.json with which transformers builds the same model."""
    name = kind_of(model)
    kind = KINDS[name]
    words: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": name,
        "vocab_size": vocab_size,
        **{theirs: getattr(model, ours) for ours, theirs in kind.keys.items()},
        **kind.fixed,
        "torch_dtype": "float32",
    }
    if model.arch == "bert":
        return words | {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": model.dropout}
    words |= {"bos_token_id": eos, "eos_token_id": eos}
    if model.arch == "gpt2":
        return words | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout)
    return words | _rope(model) | {"attention_dropout": 0.0}


def _rope(model: Model) -> dict[str, Any]:
    theta = {"rope_theta": model.rope_theta}
    if not model.rope_scaling:
        return theta
    factor, low, high, original = model.rope_scaling
    return theta | {"rope_scaling": {"rope_type": "llama3", **dict(zip(SCALING, (factor, low, high, int(original))))}}


def read_config(published: Mapping[str, Any], where: str) -> tuple[Model, int]:
    """The model and the vocabulary size of a config.json; raises ConfigError for one that is not of our kind.

    Dropout is no part of a model's shape here: it is 0, and the user's to set.
    """
    name = published.get("model_type")
    if name not in KINDS:
        raise ConfigError(f"{where}: model_type {name!r} is not supported; {', '.join(KINDS)} are")
    kind = KINDS[name]
    unlike = [key for key, value in kind.fixed.items() if published.get(key, value) != value]
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if unlike or scaling not in ("default", "llama3", None):
        words = [f"{key} {published[key]!r}" for key in unlike] or [f"rope scaling of type {scaling!r}"]
        raise ConfigError(f"{where}: {', '.join(words)} of this model is not supported")
    try:
        found = {ours: _value(published, theirs, ours, kind) for ours, theirs in kind.keys.items()}
        if "n_kv_heads" in found:  # has rotary positions
            found["rope_theta"] = float(published.get("rope_theta") or rope.get("rope_theta") or THETA.get(name, 10000.0))
            found["rope_scaling"] = tuple(float(rope[key]) for key in SCALING) if scaling == "llama3" else ()
        vocab_size = _typed("vocab_size", published["vocab_size"], 1)
    except KeyError as missing:
        raise ConfigError(f"{where}: lacks {missing}") from None
    except (ValueError, TypeError) as wrong:
        raise ConfigError(f"{where}: {wrong}") from None
    shape = Model(arch=kind.arch, qk_norm=name == "qwen3", **found)  # type: ignore[arg-type]
    return resolve(Config(model=shape)).model, vocab_size


def _value(published: Mapping[str, Any], theirs: str, ours: str, kind: Kind) -> Any:
    value = published.get(theirs)
    if value is None and ours not in kind.absent:
        raise KeyError(theirs)
    return kind.absent[ours] if value is None else _typed(theirs, value, getattr(Model(), ours))


def _typed(key: str, value: Any, like: Any) -> Any:
    """The value of a key, if it is of the kind that it must be; raises ValueError."""
    kinds = (int, float) if isinstance(like, float) else (type(like),)
    if type(value) not in kinds or (type(value) is not bool and not value > 0):
        raise ValueError(f"{key} {value!r} is not {'true or false' if isinstance(like, bool) else 'a number above zero'}")
    return value
