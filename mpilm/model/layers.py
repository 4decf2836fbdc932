"""The small parts of a block: projections, normalisation, feed-forward, rotary positions, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.model.init import key_of
from mpilm.model.rows import Rows


class Linear(nn.Linear):
    """x W^T, with a bias or without; its values come from model/init.py (torch's own would be drawn for nothing)."""

    def __init__(self, width_in: int, width_out: int, bias: bool = False):
        super().__init__(width_in, width_out, bias=bias)

    def reset_parameters(self) -> None:
        pass


class Conv1D(nn.Module):
    """x W + b: a Linear with its matrix the other way round, as GPT-2 keeps it (a convolution of width 1 once)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.empty(width_out))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        return F.linear(x, self.weight.t(), self.bias)


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


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the deviation, times a learned weight plus a learned bias (Ba et al., arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """Feed-forward with a gate: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = Linear(d_model, d_ff)
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:  # (..., D) -> (..., D)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FeedForward(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, up: nn.Module, activation: Callable[[Tensor], Tensor], down: nn.Module):
        super().__init__()
        self.up, self.activation, self.down = up, activation, down

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down(self.activation(self.up(x)))


class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864) of heads of so many dims.

    `scaling`: empty, or factor, low and high frequency factor and original context length: waves longer than the context
    that the model was first trained on are stretched by the factor, short ones are not, those between in part (Llama 3.1).
    """

    def __init__(self, head_width: int, theta: float, scaling: Sequence[float] = ()):
        self.head_width, self.theta, self.scaling = head_width, theta, tuple(scaling)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all angles: (T,) -> 2 x (T, K), (B, T) -> 2 x (B, 1, T, K)."""
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float32, device=positions.device) / self.head_width
        angles = positions.float()[..., None] / self._scaled(self.theta**exponents)  # (..., T, K/2)
        angles = torch.cat((angles, angles), dim=-1)  # dim i turns with dim i + K/2, as Hugging Face lays it out
        angles = angles.unsqueeze(1) if positions.dim() == 2 else angles
        return angles.cos(), angles.sin()

    def _scaled(self, radians: Tensor) -> Tensor:
        """Positions a radian, (K/2,)."""
        if not self.scaling:
            return radians
        factor, low, high, original = self.scaling
        unchanged = ((original / (2 * math.pi * radians) - low) / (high - low)).clamp(0, 1)
        return radians / ((1 - unchanged) / factor + unchanged)


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
