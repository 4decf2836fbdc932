"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): x A^T B^T times a factor, added to the output of a layer. A is
(inner, in); B is (out, inner) and starts at zero. They are applied from outside, by hooks on the layers of a plain model."""

import math
from collections import OrderedDict

from torch import nn

from mpilm.config.schema import LORA_TARGETS, ModelConfig
from mpilm.model.layers import Conv1D, Linear


def add_lora(transformer: nn.Module, model: ModelConfig) -> None:
    """Give the blocks of `transformer` the adapters that `model` asks for."""
    if not model.lora_rank:
        return
    targets, factor = model.lora_targets or LORA_TARGETS[model.arch], model.lora_alpha / model.lora_rank
    for path, layer in list(transformer.get_submodule("blocks").named_modules()):
        if isinstance(layer, (nn.Linear, Conv1D)) and path.rpartition(".")[2] in targets:
            width_in, width_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
            a, b = Linear(width_in, model.lora_rank, bias=False), Linear(model.lora_rank, width_out, bias=False)
            layer.lora = nn.Sequential(OrderedDict(a=a, b=b))
            layer.register_forward_hook(lambda layer, inputs, y: y + layer.lora(inputs[0]) * factor)


def lora_initial_std(name: str, model: ModelConfig) -> float:
    """Return the deviation of an adapter matrix's initial values: that of PEFT, whose distribution is uniform, not normal."""
    if name.endswith(".b.weight"):
        return 0.0
    widths = {"down": model.d_ff, "o": model.n_heads * model.head_width}
    return 1 / math.sqrt(3 * widths.get(name.split(".")[-4], model.d_model))


def is_frozen(name: str, model: ModelConfig) -> bool:
    """Return whether training leaves a parameter unchanged: with adapters, it trains nothing else."""
    return bool(model.lora_rank) and ".lora." not in name
