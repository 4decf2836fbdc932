"""The architectures there are: how each is built, which of its matrices are one, and where its parameters start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mpilm.config import Model
from mpilm.model.bert import bert
from mpilm.model.gpt2 import gpt2
from mpilm.model.llama import llama
from mpilm.model.lora import adapt, initial_deviation
from mpilm.model.transformer import Transformer

BUILDERS: Mapping[str, Callable[[Model, int], Transformer]] = {
    "llama": llama,
    "qwen": llama,
    "mixtral": llama,
    "gpt2": gpt2,
    "bert": bert,
}
STD = 0.02


def build(model: Model, vocab_size: int) -> Transformer:
    """The whole model, with its adapters where it has any; its values still to be given."""
    transformer = BUILDERS[model.arch](model, vocab_size)
    adapt(transformer, model)
    return transformer


def tied(model: Model) -> Mapping[str, str]:
    """Parameters that always have the value of another: with tie-embeddings, one matrix has two uses."""
    if not model.tie_embeddings:
        return {}
    return {"head.weight": "embed.tokens.weight" if model.arch in ("gpt2", "bert") else "embed.weight"}


def initial_std(name: str, model: Model) -> float | None:
    """Deviation of a parameter's initial values; None for ones. What adds to a residual stream that is never normalised starts
    smaller."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith(".bias"):
        return 0.0
    if ".lora." in name:
        return initial_deviation(name, model)
    if name.endswith((".o.weight", ".down.weight")) and model.arch != "bert":
        return STD / math.sqrt(2 * model.n_layers)
    return STD
