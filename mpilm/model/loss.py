"""The loss: a sum over tokens, never a mean, so that sums of sums are exact."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target with this value counts for nothing


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
    """Sum of the cross-entropies of all targets, in nats, float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
