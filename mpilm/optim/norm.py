"""The norm of a gradient distributed over many ranks, with the same bits however it is divided.

Floating-point sums depend on their order; integer sums do not. Each square, exact in float64, is rounded to a multiple of one
power of two q, about 2^-51 of the largest. The multiples are added as integers of two words: billions would overflow 64 bits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.kernels.base import RowSum

MANTISSA = 52
ROW = 1 << 11  # so many multiples below 2^51 add up to less than 2^63
CHUNK_ROWS = {"cpu": 1 << 6, "gpu": 1 << 13}  # on a CPU the float64 copy of a chunk stays in the core's cache
LOW_BITS = 31  # in the low word of a row's sum, and then of the total


def global_norm(pieces: Sequence[Tensor], comm: Comm, row_sum: RowSum | None = None) -> float:
    """Return the 2-norm of all pieces of all ranks of `comm`; inf if an element is not finite. Collective. `row_sum`:
    for a GPU `compile_row_sum()`, for a CPU that of fused kernels: the same bits, several times as fast."""
    largest = _largest(pieces)
    comm.all_reduce(largest, "max")
    peak = float(largest)
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    exponent = 2 * math.frexp(peak)[1] - (MANTISSA - 1)  # q = 2^exponent: every square is below 2^51 q
    total = sum(_sum_of_squares(piece, exponent, row_sum) for piece in pieces)
    words = torch.tensor([total >> LOW_BITS, total % 2**LOW_BITS], device="cpu")
    comm.all_reduce(words)
    high, low = words.tolist()
    return math.sqrt(math.ldexp((high << LOW_BITS) + low, exponent))


def _largest(pieces: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude, or inf if an element is nan: an all-reduce by maximum may drop a nan."""
    ends = [end.abs() for piece in pieces if piece.numel() for end in torch.aminmax(piece)]
    peak = torch.stack(ends).max() if ends else torch.zeros((), device="cpu")
    return torch.where(peak.isnan(), math.inf, peak).to("cpu", torch.float64)


def compile_row_sum() -> RowSum:
    """Return `_row_sum` as one pass over memory."""
    return torch.compile(_row_sum, dynamic=False)


def _row_sum(rows: Tensor, shift: Tensor, shift_sum: Tensor) -> Tensor:  # (R, ROW), (), () -> (2,)
    """Return the sum of the squares in units of q: a high word, and a low one of LOW_BITS bits for each row. Adding `shift`,
    1.5 2^52 q, to a square rounds it to a multiple of q; the integer is then in the low bits of the sum."""
    wide = rows.double()
    squares = torch.addcmul(shift, wide, wide)  # x^2 is exact in float64: fused or not, one rounding
    return _split_words(squares.view(torch.int64).sum(1) - shift_sum)  # both wrap around; the difference is exact


def _row_sum_in_chunks(rows: Tensor, shift: Tensor, shift_sum: Tensor) -> Tensor:  # (R, ROW), (), () -> (2,)
    """Return the same, without the copy in float64 of all rows."""
    size = CHUNK_ROWS["cpu" if rows.device.type == "cpu" else "gpu"]
    sums, wide = rows.new_empty(len(rows), dtype=torch.int64), rows.new_empty(min(size, len(rows)), ROW, dtype=torch.float64)
    for chunk, chunk_sums in zip(rows.split(size), sums.split(size)):
        squares = wide[: len(chunk)].copy_(chunk)
        torch.addcmul(shift, squares, squares, out=squares)
        torch.sum(squares.view(torch.int64), 1, out=chunk_sums)
    return _split_words(sums.sub_(shift_sum))


def _split_words(sums: Tensor) -> Tensor:  # (R,) -> (2,)
    return torch.stack(((sums >> LOW_BITS).sum(), (sums % 2**LOW_BITS).sum()))


def _sum_of_squares(piece: Tensor, exponent: int, row_sum: RowSum | None) -> int:
    """Return the sum of the squares in units of q = 2^exponent."""
    shift = torch.tensor(1.5 * math.ldexp(1.0, MANTISSA + exponent), dtype=torch.float64, device=piece.device)
    shift_sum = ROW * shift.view(torch.int64)
    full = piece.numel() // ROW * ROW
    rows, rest = piece[:full].view(-1, ROW), piece.new_zeros(1, ROW)
    rest[0, : piece.numel() - full] = piece[full:]
    words = (row_sum or _row_sum_in_chunks)(rows, shift, shift_sum), _row_sum(rest, shift, shift_sum)
    return sum((high << LOW_BITS) + low for high, low in map(Tensor.tolist, words))
