"""16-bit copies of a stage's matrices, made when the values change rather than, as autocast does, in every forward."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpilm.model.layers import Conv1D
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.pipeline.stage import StageParameters


class CastParameters(StageParameters):
    """Gives layers that multiply by a matrix copies of their parameters in `dtype`. Their gradients have that type too; the
    bits are those of autocast. `has_shared`: parameters outside of tensor parts have a gradient for each slice of the tokens;
    these are added in float32, so such a parameter has no copy."""

    def __init__(self, flats: Sequence[FlatParameters], model: nn.Module, dtype: torch.dtype, has_shared: bool):
        self.copies: list[tuple[Tensor, Tensor]] = []  # and the values that they follow
        layers = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        for flat in flats:
            flat.install(model)
            for name in flat.layout.spans:
                if name.rpartition(".")[0] in layers and (not has_shared or ".parts." in name):
                    values = flat.parameter(name)
                    copy = torch.empty_like(values, dtype=dtype)
                    flat.set_parameter(model, name, copy)
                    self.copies.append((copy, values))

    def refresh(self) -> None:
        with torch.no_grad():
            for copy, values in self.copies:
                copy.copy_(values)
