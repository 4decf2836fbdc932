"""The norm of a gradient that lies in pieces on many ranks, to the same bits however it is cut.

Floating-point sums depend on their order; integer sums do not. Each square, exact in float64, is rounded to a multiple of
one power of two q, about 2^-51 of the largest square, and the multiples are added as integers, in two words since 64 bits
would be too few for billions of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements; on a CPU the float64 copy of a chunk stays in the core's cache
MANTISSA = 52
ROW = 1 << 11  # this many multiples below 2^51 add up to less than 2^63
LOW_BITS = 31  # of a row's sum, and then of the total, that make the low word


RowWords = Callable[[Tensor, Tensor, Tensor], Tensor]


def global_norm(pieces: Sequence[Tensor], comm: Comm, row_words: RowWords | None = None) -> float:
    """2-norm of all pieces of all ranks of `comm`; inf if an element is not finite. Collective.

    `row_words`: `compiled_row_words()`, for a GPU: the same bits, seven times as fast (measured on an H200).
    """
    largest = _largest(pieces)
    comm.all_reduce(largest, "max")
    peak = float(largest)
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    exponent = 2 * math.frexp(peak)[1] - (MANTISSA - 1)  # q = 2^exponent: every square is below 2^51 q
    total = sum(_multiples(piece, exponent, row_words) for piece in pieces)
    words = torch.tensor([total >> LOW_BITS, total % 2**LOW_BITS], device="cpu")
    comm.all_reduce(words)
    high, low = words.tolist()
    return math.sqrt(math.ldexp((high << LOW_BITS) + low, exponent))


def _largest(pieces: Sequence[Tensor]) -> Tensor:
    """The largest magnitude, nan if there is one (an all-reduce by maximum may drop a nan, so it travels as inf)."""
    ends = [end.abs() for piece in pieces if piece.numel() for end in torch.aminmax(piece)]
    peak = torch.stack(ends).max() if ends else torch.zeros((), device="cpu")
    return torch.where(peak.isnan(), math.inf, peak).to("cpu", torch.float64)


def compiled_row_words() -> RowWords:
    """What reads each element once, where torch compiles it."""
    return torch.compile(_row_words, dynamic=False)


def _row_words(rows: Tensor, shift: Tensor, of_shifts: Tensor) -> Tensor:  # (R, ROW), (), () -> (2,)
    wide = rows.double()
    sums = torch.addcmul(shift, wide, wide).view(torch.int64).sum(1) - of_shifts
    return torch.stack(((sums >> LOW_BITS).sum(), (sums % 2**LOW_BITS).sum()))


def _multiples(piece: Tensor, exponent: int, row_words: RowWords | None = None) -> int:
    """The sum of the squares as a number of q's.

    Adding C = 1.5 2^52 q to a square rounds it to a multiple of q; the integer then stands in the low bits of the sum.
    """
    shift = torch.tensor(1.5 * math.ldexp(1.0, MANTISSA + exponent), dtype=torch.float64, device=piece.device)
    row_of_shifts = _wrapped(ROW * int(shift.view(torch.int64)))
    total = 0
    if row_words is not None:
        whole = piece.numel() // ROW * ROW
        high, low = row_words(piece[:whole].view(-1, ROW), shift, torch.tensor(row_of_shifts, device=piece.device)).tolist()
        total, piece = (high << LOW_BITS) + low, piece[whole:]
    size = min(CHUNK[piece.device.type], piece.numel())
    padded = torch.zeros(-(-size // ROW) * ROW, dtype=torch.float64, device=piece.device)
    for chunk in piece.split(CHUNK[piece.device.type]):
        squares = padded[: -(-chunk.numel() // ROW) * ROW]
        squares[: chunk.numel()].copy_(chunk)
        squares[chunk.numel() :] = 0.0
        torch.addcmul(shift, squares, squares, out=squares)  # x^2 is exact in float64: fused or not, one rounding
        rows = squares.view(torch.int64).view(-1, ROW).sum(1) - row_of_shifts  # both wrap around; the difference is right
        total += (int((rows >> LOW_BITS).sum()) << LOW_BITS) + int((rows % 2**LOW_BITS).sum())
    return total


def _wrapped(value: int) -> int:
    """The integer as 64 bits with a sign hold it."""
    return (value + 2**63) % 2**64 - 2**63
