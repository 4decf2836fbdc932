"""The adapter_config.json of Hugging Face's PEFT, to be written and to be read. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpilm.config import LORA_TARGETS, Model
from mpilm.errors import ConfigError
from mpilm.model.huggingface import published_module

ADAPTER_CONFIG = "adapter_config.json"
FIXED: Mapping[str, tuple[Any, ...]] = {  # what must be so, as nothing else is built here
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,), "modules_to_save": (None, []),
    "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,), "layer_replication": (None,), "lora_bias": (False,),
    "exclude_modules": (None, []), "init_lora_weights": (True, False, "gaussian"),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
}  # fmt: skip
MLP = ("gate", "up", "down")


def published_adapter(model: Model, base: str) -> dict[str, Any]:
    """The adapter_config.json of a model with adapters; `base` is the folder of the model without them."""
    return {
        "peft_type": "LORA",
        "task_type": None if model.arch == "bert" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora_rank,
        "lora_alpha": int(model.lora_alpha) if model.lora_alpha.is_integer() else model.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": _published_targets(model),
        "fan_in_fan_out": model.arch == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }


def base_of_adapter(published: Mapping[str, Any], where: str) -> str:
    """The folder, or the name, of the model that an adapter belongs to; raises ConfigError."""
    base = published.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ConfigError(f"{where}: lacks base_model_name_or_path, the model that the adapter belongs to")
    return base


def with_adapter(model: Model, published: Mapping[str, Any], where: str) -> Model:
    """The model with the adapter that an adapter_config.json describes; raises ConfigError for one that is not built here."""
    unlike = [key for key, values in FIXED.items() if published.get(key, values[0]) not in values]
    if published.get("fan_in_fan_out", model.arch == "gpt2") != (model.arch == "gpt2"):
        unlike.append("fan_in_fan_out")
    if unlike:
        raise ConfigError(f"{where}: {', '.join(f'{key} {published[key]!r}' for key in unlike)} is not supported")
    inner, alpha, targets = (published.get(key) for key in ("r", "lora_alpha", "target_modules"))
    numbers = not isinstance(inner, bool) and not isinstance(alpha, bool)
    if not (numbers and isinstance(inner, int) and isinstance(alpha, (int, float)) and inner > 0 and alpha > 0):
        raise ConfigError(f"{where}: r {inner!r} and lora_alpha {alpha!r} must be numbers above zero")
    there = LORA_TARGETS[model.arch]
    try:
        names = tuple(name for name in there if _is_target(targets, _module(name, model.arch)))
    except (re.error, TypeError):
        names = ()
    if not names:
        raise ConfigError(
            f"{where}: target_modules {targets!r} names no matrix of {model.arch} that may have an adapter: "
            + ", ".join(_module(name, model.arch).partition(".0.")[2] for name in there)
        )
    return replace(model, lora_rank=inner, lora_alpha=float(alpha), lora_targets=() if names == there else names)


def _module(name: str, arch: str) -> str:
    """The published name of a matrix in block 0."""
    return published_module(f"blocks.0.{'mlp' if name in MLP else 'attn'}.{name}", arch)


def _published_targets(model: Model) -> str | list[str]:
    """The last words of their names, where these are of no other matrices, or else a pattern of the whole names."""
    chosen = [name for name in LORA_TARGETS[model.arch] if name in (model.lora_targets or LORA_TARGETS[model.arch])]
    modules = [_module(name, model.arch) for name in chosen]
    words = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    if model.arch != "bert" and [n for n in LORA_TARGETS[model.arch] if _is_target(words, _module(n, model.arch))] == chosen:
        return words
    stem, ends = modules[0].partition(".0.")[0], [re.escape(module.partition(".0.")[2]) for module in modules]
    return rf"{re.escape(stem)}\.\d+\.({'|'.join(ends)})"


def _is_target(targets: Any, module: str) -> bool:
    """As PEFT has it: a pattern of the whole name, or the last words of it."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == word or module.endswith(f".{word}") for word in targets)
