"""Loops over the rows of tensors that numba compiles to vector instructions, in float32 or, as 16-bit integers, bfloat16.

They compute in float32 and round once, when they write. Each takes rows [`start`, `stop`), so that threads can share a tensor,
and treats each row alike: its bits depend neither on the other rows nor on where it lies in memory.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

F = np.float32
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
TILE = 16  # rows and columns that are transposed in registers
VECTOR = ir.VectorType(I16, TILE)
BIAS = 127  # of the exponent of a float32
ZERO = np.uint64(0)
ROUNDER = 12582912.0  # 1.5 x 2^23: added to a float32, it leaves the nearest integer in the low bits
# A sum may be added in several lanes (reassoc), a product fused with an addition (contract).
OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
loop: Callable[..., Any] = njit(fastmath={"contract", "reassoc", "nsz"}, **OPTIONS)
exact: Callable[..., Any] = njit(fastmath={"contract"}, **OPTIONS)
primitive: Callable[..., Any] = intrinsic


@primitive
def wide(context: Any, value: Any) -> Any:
    """Return a float32, or the value of the bits of a bfloat16."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), I32(16)), F32)

    return types.float32(value), generate


@primitive
def bfloat16_bits(context: Any, value: Any) -> Any:
    """Return the bits of the nearest bfloat16, the even one of two."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, I32(0x7FC0), rounded), I16)

    return types.uint16(types.float32), generate


@primitive
def float64_bits(context: Any, value: Any) -> Any:
    """Return the bits of a float64 as an integer."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I64)

    return types.int64(types.float64), generate


@primitive
def power_of_two(context: Any, value: Any) -> Any:
    """Return 2^n of a number to which ROUNDER has been added."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.shl(builder.bitcast(arguments[0], I32), I32(23))
        return builder.bitcast(builder.add(exponent, I32(BIAS << 23)), F32)

    return types.float32(types.float32), generate


@primitive
def clamp(context: Any, value: Any, low: Any, high: Any) -> Any:
    """Return a number not below `low` nor above `high`; nan stays nan."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, low, high = arguments
        x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return types.float32(types.float32, types.float32, types.float32), generate


@primitive
def zero_below(context: Any, x: Any, low: Any, value: Any) -> Any:
    """Return `value`, or 0 if x is below `low`."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, low, value = arguments
        return builder.select(builder.fcmp_ordered("<", x, low), F32(0), value)

    return types.float32(types.float32, types.float32, types.float32), generate


@primitive
def larger(context: Any, x: Any, y: Any) -> Any:
    """Return the larger of two numbers in a way that is vectorized; of nan, either. A nan is found in the sum that follows."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@primitive
def transpose_tile(context: Any, x: Any, out: Any, batch: Any, row: Any, column: Any) -> Any:
    """Transpose TILE x TILE 16-bit elements of x (N, R, C), from this row and column on, into out (N, C, R)."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def pointer(array: Any, row: Any, column: Any) -> Any:
            _, rows, columns = cgutils.unpack_tuple(builder, array.shape)
            at = builder.add(builder.mul(builder.add(builder.mul(batch, rows), row), columns), column)
            return builder.bitcast(builder.gep(array.data, [at]), VECTOR.as_pointer())

        x, out = (target.make_array(kind)(target, builder, each) for kind, each in zip(signature.args[:2], arguments[:2]))
        batch, row, column = arguments[2:]
        vectors = []
        for i in range(TILE):
            vectors.append(builder.load(pointer(x, builder.add(row, I64(i)), column)))
            vectors[-1].align = 2
        for size in (8, 4, 2, 1):  # exchange the blocks beside the diagonal
            upper = [i for i in range(TILE) if not i & size]
            first, second = ([(i & ~size) + half + (TILE if i & size else 0) for i in range(TILE)] for half in (0, size))
            for i in upper:
                pair = vectors[i], vectors[i + size]
                vectors[i], vectors[i + size] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, TILE), each)) for each in (first, second)
                )
        for i, vector in enumerate(vectors):
            builder.store(vector, pointer(out, builder.add(column, I64(i)), row)).align = 2
        return target.get_dummy_value()

    return types.void(x, out, types.int64, types.int64, types.int64), generate


def write(array: Any, place: tuple[int, ...], value: Any) -> None:
    """Round to the type of the array."""


@overload(write, inline="always")
def _write(array: Any, place: Any, value: Any) -> Any:
    if array.dtype == types.uint16:

        def implementation(array: Any, place: Any, value: Any) -> None:
            array[place] = bfloat16_bits(value)
    else:

        def implementation(array: Any, place: Any, value: Any) -> None:
            array[place] = value

    return implementation


@exact
def exp(x):
    """Return e^x, within 1e-7 of it from -87 to 88, 0 below, e^88 above: 2^n times the polynomial of Cephes' expf."""
    full = x
    x = clamp(x, F(-87.0), F(88.0))
    shifted = x * F(1.4426950408889634) + F(ROUNDER)
    n = shifted - F(ROUNDER)
    rest = x - n * F(0.693359375)
    rest = rest - n * F(-2.12194440e-4)
    y = F(1.9875691500e-4)
    y = y * rest + F(1.3981999507e-3)
    y = y * rest + F(8.3334519073e-3)
    y = y * rest + F(4.1665795894e-2)
    y = y * rest + F(1.6666665459e-1)
    y = y * rest + F(5.0000001201e-1)
    return zero_below(full, F(-87.0), (y * rest * rest + rest + F(1)) * power_of_two(shifted))


@loop
def silu_product(start, stop, gate, up, out):
    for row in range(start, stop):
        for i in range(gate.shape[1]):
            g = wide(gate[row, i])
            write(out, (row, i), g / (F(1) + exp(-g)) * wide(up[row, i]))


@loop
def silu_product_backward(start, stop, gradient, gate, up, d_gate, d_up):
    for row in range(start, stop):
        for i in range(gate.shape[1]):
            g, d = wide(gate[row, i]), wide(gradient[row, i])
            s = F(1) / (F(1) + exp(-g))
            write(d_gate, (row, i), d * wide(up[row, i]) * s * (F(1) + g * (F(1) - s)))
            write(d_up, (row, i), d * g * s)


@loop
def rms_norm(start, stop, x, weight, eps, out, scales):
    width = x.shape[1]
    for row in range(start, stop):
        total = F(0)
        for i in range(width):
            total += wide(x[row, i]) * wide(x[row, i])
        scale = F(1) / np.sqrt(total / F(width) + eps)
        scales[row] = scale
        for i in range(width):
            write(out, (row, i), wide(x[row, i]) * scale * wide(weight[i]))


@loop
def rms_norm_backward(start, stop, gradient, x, weight, scales, d_x, d_weight):
    """From `start` to `stop` are blocks of rows, and `d_weight` has a row of zeros for each of them."""
    width, blocks = x.shape[1], d_weight.shape[0]
    for block in range(start, stop):
        for row in range(x.shape[0] * block // blocks, x.shape[0] * (block + 1) // blocks):
            scale, dot = scales[row], F(0)
            for i in range(width):
                dot += wide(gradient[row, i]) * wide(weight[i]) * wide(x[row, i])
            shrink = dot * scale * scale * scale / F(width)
            for i in range(width):
                value, d = wide(x[row, i]), wide(gradient[row, i])
                write(d_x, (row, i), d * wide(weight[i]) * scale - value * shrink)
                d_weight[block, i] += d * value * scale


@loop
def rotate(start, stop, x, cos, sin, back, out):
    """(B, T, H, K) -> (B, H, T, K), or `back` by the reverse rotation. Angles: (T, K), or (B T, K)."""
    first, second, half = x.shape[1], x.shape[2], x.shape[3] // 2
    sign = F(-1) if back else F(1)
    for row in range(start, stop):
        b, i = row // first, row % first
        for j in range(second):
            angle = (b * second + j if back else row) % cos.shape[0]
            for k in range(half):
                low, high = wide(x[b, i, j, k]), wide(x[b, i, j, k + half])
                c, s = wide(cos[angle, k]), wide(sin[angle, k]) * sign
                write(out, (b, j, i, k), low * c - high * s)
                write(out, (b, j, i, k + half), high * c + low * s)


@loop
def attend_rows(start, stop, scores, scale, spans, first, factors, log_sums):
    """Overwrite scores (R, keys), of which the first is key `first`, with their exponentials relative to the largest. Row r
    sees the keys from spans[0, r] to spans[1, r], which are unsigned: no index is checked for its sign. `factors` make the sum
    of a row 1; `log_sums` are the logarithms of the sums of all exponentials."""
    for row in range(start, stop):
        low, high = spans[0, row] - first, spans[1, row] - first
        largest, total = F(-np.inf), F(0)
        for i in range(low, high):
            largest = larger(largest, wide(scores[row, i]))
        for i in range(ZERO, low):
            scores[row, i] = 0
        for i in range(low, high):
            e = exp((wide(scores[row, i]) - largest) * scale)
            total += e
            write(scores, (row, i), e)
        for i in range(high, np.uint64(scores.shape[1])):
            scores[row, i] = 0
        factors[row], log_sums[row] = F(1) / total, largest * scale + np.log(total)


@loop
def attend_rows_backward(start, stop, scores, gradient, scale, spans, first, log_sums, deltas):
    """Overwrite scores (R, keys) with weights, and the gradient of the weights with that of the scores before scaling."""
    for row in range(start, stop):
        low, high = spans[0, row] - first, spans[1, row] - first
        for i in range(ZERO, low):
            scores[row, i] = 0
            gradient[row, i] = 0
        for i in range(low, high):
            weight = exp(wide(scores[row, i]) * scale - log_sums[row])
            write(scores, (row, i), weight)
            write(gradient, (row, i), weight * (wide(gradient[row, i]) - deltas[row]) * scale)
        for i in range(high, np.uint64(scores.shape[1])):
            scores[row, i] = 0
            gradient[row, i] = 0


@loop
def scale_into(start, stop, x, factors, first, out):
    """Write x, the rows (B H t) of queries from `first` on, to out (B, T, H, K)."""
    heads = out.shape[2]
    count = x.shape[0] // (out.shape[0] * heads)
    for row in range(start, stop):
        b, h, t = row // (heads * count), row // count % heads, first + row % count
        for i in range(x.shape[1]):
            write(out, (b, t, h, i), wide(x[row, i]) * factors[row])


@loop
def dot_rows(start, stop, x, y, out):
    for row in range(start, stop):
        total = F(0)
        for i in range(x.shape[1]):
            total += wide(x[row, i]) * wide(y[row, i])
        out[row] = total


@loop
def accumulate_keys(start, stop, total, x, first):
    """Add x (N, keys, K) to the keys of total (N, T, K), float32, from `first` on."""
    for batch in range(start, stop):
        for key in range(x.shape[1]):
            for i in range(x.shape[2]):
                total[batch, first + key, i] += wide(x[batch, key, i])


@loop
def log_sum_exp(start, stop, logits, log_sums):
    for row in range(start, stop):
        largest, total = F(-np.inf), F(0)
        for i in range(logits.shape[1]):
            largest = larger(largest, wide(logits[row, i]))
        for i in range(logits.shape[1]):
            total += exp(wide(logits[row, i]) - largest)
        log_sums[row] = largest + np.log(total)


@loop
def softmax_gradient(start, stop, logits, targets, log_sums, factors):
    """In place of the logits; a target of -1 is not among them."""
    for row in range(start, stop):
        target, log_sum, factor = targets[row], log_sums[row], factors[row]
        own = exp(wide(logits[row, max(target, 0)]) - log_sum)
        for i in range(logits.shape[1]):
            write(logits, (row, i), exp(wide(logits[row, i]) - log_sum) * factor)
        if target >= 0:
            write(logits, (row, target), (own - F(1)) * factor)


@loop
def accumulate(start, stop, total, x):
    """Add to float32."""
    total, x = total[start:stop], x[start:stop]
    for i in range(total.shape[0]):
        total[i] += wide(x[i])


@exact  # not loop, which may take 0 for -0
def widen(start, stop, x, out):
    """Convert to float32, and -0 to 0, as when it is added to something."""
    x, out = x[start:stop], out[start:stop]
    for i in range(out.shape[0]):
        out[i] = wide(x[i]) + F(0)


@exact
def transpose(start, stop, x, out):
    """(N, R, C) -> (N, C, R) of 16-bit elements. `start` to `stop`: strips of TILE columns, batch after batch."""
    rows, columns = x.shape[1:]
    strips = -(-columns // TILE)
    for strip in range(start, stop):
        batch, first = strip // strips, strip % strips * TILE
        tiled = rows // TILE * TILE if first + TILE <= columns else 0
        for row in range(0, tiled, TILE):
            transpose_tile(x, out, batch, row, first)
        for column in range(first, min(columns, first + TILE)):
            for row in range(tiled, rows):
                out[batch, column, row] = x[batch, row, column]


@exact
def sum_squares(start, stop, x, shift, words):
    """Write the sum of the squares of each row in units of q to its row of `words`: a high word, and a low one of 31 bits. They
    are rounded by adding `shift`, 1.5 x 2^52 q (optim/norm.py)."""
    shift_bits = float64_bits(shift)
    for row in range(start, stop):
        total = np.int64(0)
        for i in range(x.shape[1]):
            value = np.float64(x[row, i])
            total += float64_bits(shift + value * value) - shift_bits
        words[row, 0], words[row, 1] = total >> 31, total & 0x7FFFFFFF
