"""In what the parts of a gradient travel: as they are, or rounded, with what rounding has lost sent along the next time."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class Exact:
    """Float32, as gradients are."""

    dtype = torch.float32

    def owed_bytes(self, numel: int) -> int:
        """Memory kept from step to step, where so many elements are sent in each."""
        return 0

    def encode(self, key: Hashable, x: Tensor) -> Tensor:
        """What is sent for x; `key` names the place in the gradient that x is of, and what it is sent for."""
        return x

    def forget(self) -> None:
        """What is owed belonged to another state."""


class Rounded(Exact):
    """Bfloat16: half the bytes. What each rounding leaves is added to what the same place sends next, so that in the sum over
    the steps nothing is lost (error feedback; Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847)."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.owed: dict[Hashable, Tensor] = {}

    def owed_bytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, key: Hashable, x: Tensor) -> Tensor:
        wanted = x + self.owed[key] if key in self.owed else x.clone()
        sent = wanted.to(self.dtype)
        self.owed[key] = wanted.sub_(sent).nan_to_num_(0.0, 0.0, 0.0)  # a step that is left out must not spoil those to come
        return sent

    def forget(self) -> None:
        self.owed.clear()


def wire_of(dtype: str) -> Exact:
    """The one that parallel.wire-dtype names."""
    return Rounded() if dtype == "bfloat16" else Exact()
