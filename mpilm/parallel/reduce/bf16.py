"""Gradients sent as bfloat16 with error feedback: each rounding error is added to the next step's gradient."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from mpilm.ops.tree_reduce import GradientEncoding


class BFloat16Encoding(GradientEncoding):
    """bfloat16: half the bytes. The rounding error of each message is added to the next one from the same place, so that no
    error accumulates over the steps (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847)."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.residuals: dict[Hashable, Tensor] = {}

    def residual_bytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, key: Hashable, x: Tensor) -> Tensor:
        exact = x + self.residuals[key] if key in self.residuals else x.clone()
        sent = exact.to(self.dtype)
        self.residuals[key] = exact.sub_(sent).nan_to_num_(0.0, 0.0, 0.0)  # a skipped step must not spoil later ones
        return sent

    def reset_residuals(self) -> None:
        self.residuals.clear()


def make_encoding(dtype: str) -> GradientEncoding:
    """Return the encoding that parallel.wire-dtype names."""
    return BFloat16Encoding() if dtype == "bfloat16" else GradientEncoding()
