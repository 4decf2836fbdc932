"""config.json, written from a model's settings and read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpilm.config.schema import Config, ModelConfig, resolve_config
from mpilm.errors import ConfigError


@dataclass(frozen=True)
class HFModelType:
    """A model_type of Hugging Face: how its config.json states our settings."""

    arch: str
    architecture: str  # the class in transformers
    keys: Mapping[str, str]  # our setting -> key
    defaults: Mapping[str, Any]  # our setting -> its value if the key is absent
    required: Mapping[str, Any]  # key -> the only value that mpilm supports


COMMON = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "context_length": "max_position_embeddings",
}
SHAPE = COMMON | {"tie_embeddings": "tie_word_embeddings"}
ROTARY = SHAPE | {"n_kv_heads": "num_key_value_heads", "head_width": "head_dim", "norm_eps": "rms_norm_eps"}
DEFAULTS = {"n_kv_heads": 0, "head_width": 0, "norm_eps": 1e-6, "tie_embeddings": False}
MODEL_TYPES = {
    "llama": HFModelType(
        "llama", "LlamaForCausalLM", ROTARY, DEFAULTS, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": HFModelType("qwen", "Qwen2ForCausalLM", ROTARY, DEFAULTS, {"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": HFModelType(
        "qwen", "Qwen3ForCausalLM", ROTARY, DEFAULTS | {"head_width": 128},
        {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
    "mixtral": HFModelType(
        "mixtral", "MixtralForCausalLM",
        ROTARY | {
            "n_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok", "router_loss": "router_aux_loss_coef"
        },
        DEFAULTS | {"norm_eps": 1e-5, "n_experts": 8, "experts_per_token": 2, "router_loss": 0.001},
        {"hidden_act": "silu", "sliding_window": None},
    ),
    "gpt2": HFModelType(
        "gpt2", "GPT2LMHeadModel",
        {
            "n_layers": "n_layer", "n_heads": "n_head", "d_model": "n_embd", "d_ff": "n_inner",
            "context_length": "n_positions", "tie_embeddings": "tie_word_embeddings", "norm_eps": "layer_norm_epsilon",
        },
        {"d_ff": 0, "tie_embeddings": True, "norm_eps": 1e-5},
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "bert": HFModelType(
        "bert", "BertForMaskedLM", COMMON | {"norm_eps": "layer_norm_eps"}, {"norm_eps": 1e-12},
        {
            "hidden_act": "gelu", "is_decoder": False, "type_vocab_size": 2, "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
ROPE_THETA = {"mixtral": 1e6}  # the default of rope_theta; for other types it is 10,000
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def hf_model_type(model: ModelConfig) -> str:
    """Return the model_type of a model."""
    if model.arch == "qwen":
        return "qwen3" if model.qk_norm else "qwen2"
    return model.arch


def hf_config(model: ModelConfig, vocab_size: int, eos: int) -> dict[str, Any]:
    """Return the config.json from which transformers builds the same model."""
    name = hf_model_type(model)
    spec = MODEL_TYPES[name]
    config: dict[str, Any] = {
        "architectures": [spec.architecture],
        "model_type": name,
        "vocab_size": vocab_size,
        **{key: getattr(model, ours) for ours, key in spec.keys.items()},
        **spec.required,
        "torch_dtype": "float32",
    }
    if model.arch == "bert":
        return config | {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": model.dropout}
    config |= {"bos_token_id": eos, "eos_token_id": eos}
    if model.arch == "gpt2":
        return config | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout)
    config |= {"rope_theta": model.rope_theta}
    if model.rope_scaling:
        *factors, original = model.rope_scaling
        config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE_SCALING, (*factors, int(original))))}
    return config | {"attention_dropout": 0.0}


def read_hf_config(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
    """Return the model, without dropout, and the vocabulary size that a config.json describes. Raises ConfigError, which names
    the file `where`, for a model that mpilm does not support."""
    name = config.get("model_type")
    if name not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type {name!r} is not supported; {', '.join(MODEL_TYPES)} are")
    spec = MODEL_TYPES[name]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    unsupported = [f"{key} {config[key]!r}" for key, value in spec.required.items() if config.get(key, value) != value]
    if scaling not in ("default", "llama3", None):
        unsupported.append(f"rope scaling of type {scaling!r}")
    if unsupported:
        raise ConfigError(f"{where}: {', '.join(unsupported)} of this model is not supported")
    try:
        settings = {
            ours: _read(config, key, getattr(ModelConfig(), ours), spec.defaults.get(ours)) for ours, key in spec.keys.items()
        }
        if "n_kv_heads" in settings:  # has rotary positions
            theta = {"rope_theta": config.get("rope_theta") or rope.get("rope_theta")}
            settings["rope_theta"] = float(_read(theta, "rope_theta", 1.0, ROPE_THETA.get(name, 10000.0)))
            if scaling == "llama3":
                settings["rope_scaling"] = tuple(float(_read(rope, key, 1.0)) for key in ROPE_SCALING)
        vocab_size = _read(config, "vocab_size", 1)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    model = ModelConfig(arch=spec.arch, qk_norm=name == "qwen3", **settings)  # type: ignore[arg-type]
    return resolve_config(Config(model=model)).model, vocab_size


def _read(config: Mapping[str, Any], key: str, like: Any, default: Any = None) -> Any:
    """Return the value of `key`, or `default` if it has none. Raises ValueError if neither exists, and unless the value has the
    type of `like` and, as a number, is above zero."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"lacks {key!r}")
    types = (int, float) if isinstance(like, float) else (type(like),)
    if type(value) not in types or (type(value) is not bool and not value > 0):
        raise ValueError(f"{key} {value!r} is not {'true or false' if isinstance(like, bool) else 'a number above zero'}")
    return value
