"""Low-rank adapters (Hu et al., arXiv 2106.09685): beside each chosen matrix a product of two thin ones, alone trained.

Applied from outside: the model is built as ever, and its linear layers are given a hook that adds what the adapter says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from mpilm.config import LORA_TARGETS, Model
from mpilm.model.layers import Conv1D, Linear


class Adapter(nn.Module):
    """x A^T B^T, times a factor; A is (inner, in) and B, zero at first, (out, inner)."""

    def __init__(self, width_in: int, inner: int, width_out: int, factor: float):
        super().__init__()
        self.a, self.b, self.factor = Linear(width_in, inner), Linear(inner, width_out), factor

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.b(self.a(x)) * self.factor


def targets_of(model: Model) -> tuple[str, ...]:
    """The matrices of a block that have an adapter."""
    return (model.lora_targets or LORA_TARGETS[model.arch]) if model.lora_rank else ()


def adapt(transformer: nn.Module, model: Model) -> None:
    """Give the blocks of `transformer` the adapters that `model` asks for."""
    for layer in list(_targets(transformer, targets_of(model))):
        width_in, width_out = _widths(layer)
        layer.lora = Adapter(width_in, model.lora_rank, width_out, model.lora_alpha / model.lora_rank)
        layer.register_forward_hook(lambda layer, inputs, y: y + layer.lora(inputs[0]))


def _targets(transformer: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Linear | Conv1D]:
    for path, module in transformer.get_submodule("blocks").named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and path.rpartition(".")[2] in names:
            yield module


def _widths(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def initial_deviation(name: str, model: Model) -> float:
    """Of the values of an adapter's matrix: as PEFT draws them, though from a normal distribution."""
    if name.endswith(".b.weight"):
        return 0.0
    widths = {"down": model.d_ff, "o": model.n_heads * model.head_width}
    return 1 / math.sqrt(3 * widths.get(name.split(".")[-4], model.d_model))


def is_frozen(name: str, model: Model) -> bool:
    """Whether a parameter stays as it is in training: with adapters, all but theirs."""
    return bool(model.lora_rank) and ".lora." not in name
