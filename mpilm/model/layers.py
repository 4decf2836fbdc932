"""The parts of a model: projections, norms, feed-forward layers, rotary positions, dropout."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.kernels.base import TORCH_KERNELS
from mpilm.model.sequence_info import Rotation, SequenceInfo


class Linear(nn.Linear):
    """x W^T, with or without a bias. Its initial values come from model/families.py: torch draws none, because drawing on the
    meta device imports the compiler (2 s and 75 MiB, measured with torch 2.13)."""

    def reset_parameters(self) -> None:
        pass


class Conv1D(nn.Module):
    """x W + b: a Linear whose matrix is transposed, as GPT-2 stores it (it was a convolution of width 1 once)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.empty(width_out))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        return F.linear(x, self.weight.t(), self.bias)


class Embedding(nn.Embedding):
    """A row of W for each id. Its initial values come from model/families.py as well."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., D)
        return self.lookup(ids)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids. An instance can have another function in the place of this one."""
        return F.embedding(ids, self.weight)


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square, times a learned weight (Zhang and Sennrich, arXiv 1910.07467)."""

    kernels = TORCH_KERNELS

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.kernels.rms_norm(x, self.weight, self.eps or 0.0)


class LayerNorm(nn.LayerNorm):
    """Subtract the mean, divide by the deviation, times a learned weight plus a learned bias (Ba et al., arXiv 1607.06450)."""

    kernels = TORCH_KERNELS

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """A gated feed-forward layer: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    kernels = TORCH_KERNELS

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = Linear(d_model, d_ff, bias=False)
        self.up = Linear(d_model, d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor, info: SequenceInfo | None = None) -> Tensor:  # (..., D) -> (..., D)
        return self.down(self.kernels.silu_product(self.activation, self.gate(x), self.up(x)))


class FeedForward(nn.Module):
    """Two projections with an activation function between them."""

    def __init__(self, up: nn.Module, activation: Callable[[Tensor], Tensor], down: nn.Module):
        super().__init__()
        self.up, self.activation, self.down = up, activation, down

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down(self.activation(self.up(x)))


class RotaryEmbedding:
    """Rotary positions (Su et al., arXiv 2104.09864). `scaling`: empty, or Llama 3.1's (factor, low and high frequency factor,
    original context length), which stretches waves longer than that by the factor, and somewhat shorter ones in part."""

    def __init__(self, head_width: int, theta: float, scaling: Sequence[float] = ()):
        self.head_width, self.theta, self.scaling = head_width, theta, tuple(scaling)

    def __call__(self, positions: Tensor) -> Rotation:
        """Return cosines and sines of all angles: (T,) -> 2 x (T, K), (B, T) -> 2 x (B, 1, T, K)."""
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float32, device=positions.device) / self.head_width
        angles = positions.float()[..., None] / self._scale(self.theta**exponents)  # (..., T, K/2)
        angles = torch.cat((angles, angles), dim=-1)  # dim i turns with dim i + K/2, as Hugging Face lays it out
        angles = angles.unsqueeze(1) if positions.dim() == 2 else angles
        return angles.cos(), angles.sin()

    def _scale(self, wavelengths: Tensor) -> Tensor:  # (K/2,) -> (K/2,)
        """Apply `scaling` to wavelengths, which are divided by 2 pi."""
        if not self.scaling:
            return wavelengths
        factor, low, high, original = self.scaling
        unchanged = ((original / (2 * math.pi * wavelengths) - low) / (high - low)).clamp(0, 1)
        return wavelengths / ((1 - unchanged) / factor + unchanged)


class TokenSlices(Protocol):
    """The slices of a sample that are here."""

    @property
    def slice_numbers(self) -> Sequence[int]:
        """Their numbers, in the order in which they lie."""


class Dropout(nn.Module):
    """Dropout whose mask depends on a key per sample and on the module's path, not on the order of computation."""

    def __init__(self, probability: float, path: str):
        super().__init__()
        self.probability, self.path = probability, path
        self.slices: TokenSlices | None = None  # if the first dim of a sample is divided, each slice has a mask of its own

    def forward(self, x: Tensor, keys: list[int] | None) -> Tensor:  # (B, ...) -> (B, ...)
        """Drop elements of `x`; `keys` holds one integer for each of its samples, or is None in evaluation."""
        if self.probability == 0.0 or not keys:  # in this order: a compiled block must not depend on the keys
            return x
        masks = torch.stack([self._draw_mask(key, x) for key in keys])
        return x * masks.div_(1.0 - self.probability)

    def _draw_mask(self, key: int, x: Tensor) -> Tensor:
        if self.slices is None:
            return self.draw(x.new_empty(x.shape[1:]), key, self.path)
        numbers = self.slices.slice_numbers
        parts = x.new_empty(len(numbers), x.shape[1] // len(numbers), *x.shape[2:])
        for part, number in zip(parts, numbers):
            self.draw(part, key, f"{self.path}.{number}")
        return parts.flatten(0, 1)

    def draw(self, mask: Tensor, key: int, path: str) -> Tensor:
        """Fill `mask` with zeros and ones, which depend on the key and the path."""
        generator = torch.Generator(mask.device).manual_seed(hash_key(key, path) >> 1)
        return mask.bernoulli_(1.0 - self.probability, generator=generator)


def hash_key(*parts: object) -> int:
    """Return a 64-bit key of the parts, the same in every process (Python's hash() is not)."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
