"""The loss: a sum over tokens, never a mean, so that sums of parts are exact."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the target of a token that has no loss


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
    """Return the sum of the cross-entropies of all targets, in nats, float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
