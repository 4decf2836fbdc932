"""config.json and PEFT's adapter_config.json, written from a model's settings and read back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpilm.config import schema
from mpilm.config.check import find_limit_problem
from mpilm.config.schema import LORA_TARGETS, PART_SETTINGS, Config, ModelConfig, resolve_config
from mpilm.config.settings import get_setting_types
from mpilm.errors import ConfigError
from mpilm.formatting import format_value
from mpilm.model.hf.names import hf_module_name


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
EXPERTS = {"n_experts": "num_experts", "experts_per_token": "num_experts_per_tok", "router_loss": "router_aux_loss_coef"}
DEFAULTS = {"n_kv_heads": 0, "head_width": 0, "norm_eps": 1e-6, "rope_theta": 10000.0, "tie_embeddings": False}
QWEN = {"hidden_act": "silu", "use_sliding_window": False}
QWEN3 = QWEN | {"attention_bias": False}
MODEL_TYPES = {
    "llama": HFModelType(
        "llama", "LlamaForCausalLM", ROTARY, DEFAULTS, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": HFModelType("qwen", "Qwen2ForCausalLM", ROTARY, DEFAULTS, QWEN),
    "qwen3": HFModelType("qwen", "Qwen3ForCausalLM", ROTARY, DEFAULTS | {"head_width": 128}, QWEN3),
    "mixtral": HFModelType(
        "mixtral", "MixtralForCausalLM", ROTARY | EXPERTS | {"n_experts": "num_local_experts"},
        DEFAULTS | {"norm_eps": 1e-5, "rope_theta": 1e6, "n_experts": 8, "experts_per_token": 2, "router_loss": 0.001},
        {"hidden_act": "silu", "sliding_window": None},
    ),
    "qwen3_moe": HFModelType(
        "qwen-moe", "Qwen3MoeForCausalLM", ROTARY | EXPERTS | {"d_ff": "moe_intermediate_size"},
        DEFAULTS | {"n_experts": 128, "experts_per_token": 8, "router_loss": 0.001},
        QWEN3 | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
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
ABSENT = {"norm_topk_prob": False}  # required key -> its value if it is absent and that is not the required one
OTHER_KEYS = {"num_experts": "num_local_experts"}  # key -> one that transformers 5 may write in its place
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_VALUES: Mapping[str, tuple[Any, ...]] = {  # key -> the values that mpilm supports; the first is the default
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,), "modules_to_save": (None, []),
    "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,), "layer_replication": (None,), "lora_bias": (False,),
    "exclude_modules": (None, []), "init_lora_weights": (True, False, "gaussian"),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
}  # fmt: skip
MAX_REPEATS = 6  # in a pattern of module names; each multiplies the time that matching may take by the length of a name
MLP_MATRICES = ("gate", "up", "down")


def hf_model_type(model: ModelConfig) -> str:
    """Return the model_type of a model."""
    if model.arch == "qwen":
        return "qwen3" if model.qk_norm else "qwen2"
    return "qwen3_moe" if model.arch == "qwen-moe" else model.arch


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
    # Not for transformers: with these mpilm computes the same bits again.
    config |= {name: getattr(model, name) for name in PART_SETTINGS if getattr(model, name) > 1}
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
    """Return model, without dropout, and vocabulary size that a config.json describes; raises ConfigError naming `where`."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise ConfigError(f"{where}: model_type {format_value(name)} is not supported; {', '.join(MODEL_TYPES)} are")
    spec = MODEL_TYPES[name]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    found = {key: config.get(key, ABSENT.get(key, value)) for key, value in spec.required.items()}
    unsupported = [f"{key} {format_value(value)}" for key, value in found.items() if value != spec.required[key]]
    if scaling not in ("default", "llama3", None):
        unsupported.append(f"rope scaling of type {format_value(scaling)}")
    if unsupported:
        raise ConfigError(f"{where}: {', '.join(unsupported)} of this model is not supported")
    try:
        settings = {ours: _read(config, key, ours, spec.defaults.get(ours)) for ours, key in spec.keys.items()}
        if "n_kv_heads" in settings:  # has rotary positions
            theta = {"rope_theta": config.get("rope_theta") or rope.get("rope_theta")}
            settings["rope_theta"] = float(_read(theta, "rope_theta", "rope_theta", spec.defaults["rope_theta"]))
            if scaling == "llama3":
                settings["rope_scaling"] = tuple(float(_read(rope, key, "rope_theta")) for key in ROPE_SCALING)
        vocab_size = _read(config, "vocab_size", "vocab_size")
        settings |= {name: _read(config, name, name, 0) for name in PART_SETTINGS}
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    model = ModelConfig(arch=spec.arch, qk_norm=name in ("qwen3", "qwen3_moe"), **settings)  # type: ignore[arg-type]
    model = resolve_config(Config(model=model)).model
    for key, size in schema.divided_sizes(model).items() if model.tensor_parts else ():
        if size % model.tensor_parts:
            raise ConfigError(f"{where}: tensor_parts {model.tensor_parts} does not divide {key} {size}")
    return model, vocab_size


def _read(config: Mapping[str, Any], key: str, setting: str, default: Any = None) -> Any:
    """Return the value of `key`, or `default` if it has none. Raises ValueError if neither exists, and unless the value has the
    type of our setting, is within its limits and, as a number, is above zero."""
    value, like = config.get(key, config.get(OTHER_KEYS.get(key, key))), getattr(ModelConfig, setting)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"lacks {key!r}")
    types = (int, float) if isinstance(like, float) else (type(like),)
    if type(value) not in types or (type(value) is not bool and not value > 0):
        kind = "true or false" if isinstance(like, bool) else "a number above zero"
        raise ValueError(f"{key} {format_value(value)} is not {kind}")
    if problem := find_limit_problem(value, get_setting_types(ModelConfig)[setting]):
        raise ValueError(f"{key} {problem}")
    return value


def hf_adapter_config(model: ModelConfig, base: str) -> dict[str, Any]:
    """Return the adapter_config.json of a model with adapters; `base` is the folder of the model without them."""
    return {
        "peft_type": "LORA",
        "task_type": None if model.arch == "bert" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora_rank,
        "lora_alpha": int(model.lora_alpha) if model.lora_alpha.is_integer() else model.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model),
        "fan_in_fan_out": model.arch == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }


def read_base_model(config: Mapping[str, Any], where: str) -> str:
    """Return the folder or name of the model that an adapter belongs to. Raises ConfigError, which names the file `where`."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ConfigError(f"{where}: lacks base_model_name_or_path, the model that the adapter belongs to")
    return base


def add_hf_adapter(model: ModelConfig, config: Mapping[str, Any], where: str) -> ModelConfig:
    """Return `model` with the adapters that an adapter_config.json describes; raises ConfigError naming the file `where`."""
    supported = {**ADAPTER_VALUES, "fan_in_fan_out": (model.arch == "gpt2",)}
    if unsupported := [key for key, values in supported.items() if config.get(key, values[0]) not in values]:
        raise ConfigError(f"{where}: {', '.join(f'{key} {format_value(config[key])}' for key in unsupported)} is not supported")
    targets = config.get("target_modules")
    try:
        inner, alpha = _read(config, "r", "lora_rank"), float(_read(config, "lora_alpha", "lora_alpha"))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    allowed = LORA_TARGETS[model.arch]
    try:
        names = tuple(name for name in allowed if _is_target(targets, _first_module(name, model.arch)))
    except (re.error, TypeError):
        names = ()
    if not names:
        problem = f"target_modules {format_value(targets)} names no matrix of {model.arch} that may have an adapter"
        matrices = ", ".join(_first_module(name, model.arch).partition(".0.")[2] for name in allowed)
        raise ConfigError(f"{where}: {problem}: {matrices}")
    return replace(model, lora_rank=inner, lora_alpha=alpha, lora_targets=() if names == allowed else names)


def _first_module(name: str, arch: str) -> str:
    """Return Hugging Face's name of a matrix in block 0."""
    return hf_module_name(f"blocks.0.{'mlp' if name in MLP_MATRICES else 'attn'}.{name}", arch)


def _target_modules(model: ModelConfig) -> str | list[str]:
    """Return the last parts of the target modules' names if no other modules share them, otherwise a pattern of whole names."""
    allowed = LORA_TARGETS[model.arch]
    targets = [name for name in allowed if name in (model.lora_targets or allowed)]
    modules = [_first_module(name, model.arch) for name in targets]
    endings = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    if model.arch != "bert" and [n for n in allowed if _is_target(endings, _first_module(n, model.arch))] == targets:
        return endings
    stem, paths = modules[0].partition(".0.")[0], [re.escape(module.partition(".0.")[2]) for module in modules]
    return rf"{re.escape(stem)}\.\d+\.({'|'.join(paths)})"


def _is_target(targets: Any, module: str) -> bool:
    """Return whether `module` is a target by PEFT's rules: targets are a pattern of whole names, or a list of their endings."""
    if isinstance(targets, str):
        if re.search(r"\)[*+{]", targets) or len(re.findall(r"[*+{]", targets)) > MAX_REPEATS:
            raise re.error("a pattern that may take for ever")
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == ending or module.endswith(f".{ending}") for ending in targets)
