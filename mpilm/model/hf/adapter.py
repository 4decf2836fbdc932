"""PEFT's adapter_config.json, written from a model's settings and read back."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpilm.config.schema import LORA_TARGETS, ModelConfig
from mpilm.errors import ConfigError
from mpilm.model.hf.names import hf_module_name

ADAPTER_CONFIG = "adapter_config.json"
SUPPORTED: Mapping[str, tuple[Any, ...]] = {  # key -> the values that mpilm supports; the first is the default
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,), "modules_to_save": (None, []),
    "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,), "layer_replication": (None,), "lora_bias": (False,),
    "exclude_modules": (None, []), "init_lora_weights": (True, False, "gaussian"),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
}  # fmt: skip
MLP_MATRICES = ("gate", "up", "down")


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
    """Return `model` with the adapters that an adapter_config.json describes. Raises ConfigError, which names the file `where`,
    for adapters that mpilm does not support."""
    supported = {**SUPPORTED, "fan_in_fan_out": (model.arch == "gpt2",)}
    unsupported = [key for key, values in supported.items() if config.get(key, values[0]) not in values]
    if unsupported:
        raise ConfigError(f"{where}: {', '.join(f'{key} {config[key]!r}' for key in unsupported)} is not supported")
    inner, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(inner) is not int or (type(alpha) is not int and type(alpha) is not float) or not (inner > 0 and alpha > 0):
        raise ConfigError(f"{where}: r {inner!r} and lora_alpha {alpha!r} must be numbers above zero")
    allowed = LORA_TARGETS[model.arch]
    try:
        names = tuple(name for name in allowed if _is_target(targets, _first_module(name, model.arch)))
    except (re.error, TypeError):
        names = ()
    if not names:
        raise ConfigError(
            f"{where}: target_modules {targets!r} names no matrix of {model.arch} that may have an adapter: "
            + ", ".join(_first_module(name, model.arch).partition(".0.")[2] for name in allowed)
        )
    return replace(model, lora_rank=inner, lora_alpha=float(alpha), lora_targets=() if names == allowed else names)


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
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == ending or module.endswith(f".{ending}") for ending in targets)
