"""The small parts of a block: normalisation, feed-forward, rotary positions, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.model.init import key_of


class Linear(nn.Linear):
    """x W^T without bias; its values come from model/init.py (torch's own would be drawn for nothing)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """A row of W for each id; its values come from model/init.py."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Divide by the root mean square, times a learned weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """Feed-forward with a gate: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = Linear(d_model, d_ff)
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotation(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of rotary positions (Su et al., arXiv 2104.09864): (T,) -> 2 x (T, K)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions.float()[:, None] / theta**exponents  # (T, K/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, K): dim i turns with dim i + K/2, as Hugging Face lays it out
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, H, T, K) -> (B, H, T, K)
    """Turn each pair of dims by the angle of its position."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-high, low), dim=-1) * sin.to(x.dtype)


class Dropout(nn.Module):
    """Dropout whose mask depends on a key per sample and on the place in the model, not on the order of computation.

    `keys` holds one integer for each row of x, made from (seed, step, sample); no keys, no dropout (evaluation).
    """

    def __init__(self, probability: float, place: str):
        super().__init__()
        self.probability, self.place = probability, place

    def forward(self, x: Tensor, keys: list[int] | None) -> Tensor:  # (B, ...) -> (B, ...)
        if keys is None or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        masks = torch.stack([self._mask(key, x) for key in keys])
        return x * masks.div_(keep)

    def _mask(self, key: int, x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(key_of(key, self.place) >> 1)
        return torch.empty(x.shape[1:], dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.probability, generator=generator)
