"""The norm of a gradient that lies in pieces on many ranks, to the same bits however it is cut.

Floating-point sums depend on their order; integer sums do not. Each square, exact in float64, is rounded to a multiple of
one power of two q that all ranks agree on, and the multiples are added as 64-bit integers. q follows from the largest
element and the number of elements alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements; on a CPU the float64 copy of a chunk stays in the core's cache
MANTISSA = 52


def global_norm(pieces: Sequence[Tensor], numel: int, comm: Comm) -> float:
    """2-norm of all pieces of all ranks of `comm`, `numel` elements in all; inf or nan if an element is. Collective."""
    largest = _largest(pieces)
    comm.all_reduce(largest, "max")
    peak = float(largest)
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    exponent = _grid_exponent(peak, numel)
    total = torch.tensor(sum(_multiples(piece, exponent) for piece in pieces), dtype=torch.int64)
    comm.all_reduce(total)
    return math.sqrt(math.ldexp(int(total), exponent))


def _largest(pieces: Sequence[Tensor]) -> Tensor:
    """The largest magnitude, nan if there is one (an all-reduce by maximum may drop a nan, so it travels as inf)."""
    ends = [end.abs() for piece in pieces if piece.numel() for end in torch.aminmax(piece)]
    peak = torch.stack(ends).max() if ends else torch.zeros(())
    return torch.where(peak.isnan(), math.inf, peak).to("cpu", torch.float64)


def _grid_exponent(peak: float, numel: int) -> int:
    """The finest q = 2^exponent at which a square fits a float64 mantissa and `numel` squares fit 62 bits."""
    square_bits = 2 * math.frexp(peak)[1]  # peak^2 < 2^square_bits
    spare = 62 - (MANTISSA - 1) - math.ceil(math.log2(max(numel, 1)))
    return square_bits - (MANTISSA - 1) - min(0, spare)


def _multiples(piece: Tensor, exponent: int) -> int:
    """The sum of the squares as a number of q's.

    Adding C = 1.5 2^52 q to a square rounds it to a multiple of q; the integer then stands in the low bits of the sum.
    """
    shift = torch.tensor(1.5 * math.ldexp(1.0, MANTISSA + exponent), dtype=torch.float64, device=piece.device)
    offset = int(shift.view(torch.int64))
    total = 0
    size = CHUNK[piece.device.type]
    double = torch.empty(min(size, piece.numel()), dtype=torch.float64, device=piece.device)
    for chunk in piece.split(size):
        squares = double[: chunk.numel()].copy_(chunk)
        torch.addcmul(shift, squares, squares, out=squares)  # x^2 is exact in float64: fused or not, one rounding
        total += int(squares.view(torch.int64).sum()) - offset * chunk.numel()
    return total % 2**64  # the tensor's sum wraps around; the difference is right again
