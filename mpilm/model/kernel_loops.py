"""Loops over the rows of tensors that numba compiles to vector instructions, in float32 or, as 16-bit integers, bfloat16.

They compute in float32 and round once, when they write. Each takes rows [`start`, `stop`), so that threads can share a tensor,
and treats each row alike: its bits depend neither on the other rows nor on where it lies in memory.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

F = np.float32
I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
BIAS = 127  # of the exponent of a float32
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


def write(array: Any, row: int, i: int, value: Any) -> None:
    """Round to the type of the array."""


@overload(write, inline="always")
def _write(array: Any, row: Any, i: Any, value: Any) -> Any:
    if array.dtype == types.uint16:

        def implementation(array: Any, row: Any, i: Any, value: Any) -> None:
            array[row, i] = bfloat16_bits(value)
    else:

        def implementation(array: Any, row: Any, i: Any, value: Any) -> None:
            array[row, i] = value

    return implementation


def write4(array: Any, a: int, b: int, c: int, d: int, value: Any) -> None:
    """Round to the type of an array of four dims."""


@overload(write4, inline="always")
def _write4(array: Any, a: Any, b: Any, c: Any, d: Any, value: Any) -> Any:
    if array.dtype == types.uint16:

        def implementation(array: Any, a: Any, b: Any, c: Any, d: Any, value: Any) -> None:
            array[a, b, c, d] = bfloat16_bits(value)
    else:

        def implementation(array: Any, a: Any, b: Any, c: Any, d: Any, value: Any) -> None:
            array[a, b, c, d] = value

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
            write(out, row, i, g / (F(1) + exp(-g)) * wide(up[row, i]))


@loop
def silu_product_backward(start, stop, gradient, gate, up, d_gate, d_up):
    for row in range(start, stop):
        for i in range(gate.shape[1]):
            g, d = wide(gate[row, i]), wide(gradient[row, i])
            s = F(1) / (F(1) + exp(-g))
            write(d_gate, row, i, d * wide(up[row, i]) * s * (F(1) + g * (F(1) - s)))
            write(d_up, row, i, d * g * s)


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
            write(out, row, i, wide(x[row, i]) * scale * wide(weight[i]))


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
                write(d_x, row, i, d * wide(weight[i]) * scale - value * shrink)
                d_weight[block, i] += d * value * scale


@loop
def rotate(start, stop, x, cos, sin, out):
    """(B, T, H, K) -> (B, H, T, K); rows are tokens, of one sequence after the other. Angles: (T, K), or (B T, K)."""
    tokens, heads, half = x.shape[1], x.shape[2], x.shape[3] // 2
    for row in range(start, stop):
        b, t, angle = row // tokens, row % tokens, row % cos.shape[0]
        for h in range(heads):
            for i in range(half):
                low, high = wide(x[b, t, h, i]), wide(x[b, t, h, i + half])
                write4(out, b, h, t, i, low * wide(cos[angle, i]) - high * wide(sin[angle, i]))
                write4(out, b, h, t, i + half, high * wide(cos[angle, i]) + low * wide(sin[angle, i]))


@loop
def rotate_backward(start, stop, gradient, cos, sin, d_x):
    """(B, H, T, K) -> (B, T, H, K)."""
    tokens, heads, half = d_x.shape[1], d_x.shape[2], d_x.shape[3] // 2
    for row in range(start, stop):
        b, t, angle = row // tokens, row % tokens, row % cos.shape[0]
        for h in range(heads):
            for i in range(half):
                low, high = wide(gradient[b, h, t, i]), wide(gradient[b, h, t, i + half])
                write4(d_x, b, t, h, i, low * wide(cos[angle, i]) + high * wide(sin[angle, i]))
                write4(d_x, b, t, h, i + half, high * wide(cos[angle, i]) - low * wide(sin[angle, i]))


@loop
def row_max(x, row, stop):
    largest = F(-np.inf)
    for i in range(stop):
        largest = larger(largest, wide(x[row, i]))
    return largest


@loop
def softmax(start, stop, scores, count, first):
    """In place. Row r sees the keys up to first + r % count; `count` 0: all."""
    keys = scores.shape[1]
    for row in range(start, stop):
        visible = min(keys, first + row % count + 1) if count else keys
        largest, total = row_max(scores, row, visible), F(0)
        for i in range(visible):
            e = exp(wide(scores[row, i]) - largest)
            total += e
            write(scores, row, i, e)
        factor = F(1) / total
        for i in range(visible):
            write(scores, row, i, wide(scores[row, i]) * factor)
        for i in range(visible, keys):
            scores[row, i] = 0


@loop
def softmax_backward(start, stop, gradient, weights):
    """In place of the gradient."""
    for row in range(start, stop):
        dot = F(0)
        for i in range(weights.shape[1]):
            dot += wide(gradient[row, i]) * wide(weights[row, i])
        for i in range(weights.shape[1]):
            write(gradient, row, i, wide(weights[row, i]) * (wide(gradient[row, i]) - dot))


@loop
def cross_entropy(start, stop, logits, targets, ignored, losses, log_sums):
    for row in range(start, stop):
        largest, total = row_max(logits, row, logits.shape[1]), F(0)
        for i in range(logits.shape[1]):
            total += exp(wide(logits[row, i]) - largest)
        log_sums[row] = largest + np.log(total)
        losses[row] = F(0) if targets[row] == ignored else log_sums[row] - wide(logits[row, targets[row]])


@loop
def cross_entropy_backward(start, stop, logits, targets, ignored, log_sums, factor):
    """In place of the logits."""
    for row in range(start, stop):
        target = targets[row]
        if target == ignored:
            for i in range(logits.shape[1]):
                logits[row, i] = 0
        else:
            own = exp(wide(logits[row, target]) - log_sums[row])
            for i in range(logits.shape[1]):
                write(logits, row, i, exp(wide(logits[row, i]) - log_sums[row]) * factor)
            write(logits, row, target, (own - F(1)) * factor)


@loop
def accumulate(start, stop, into, x):
    """Add to float32."""
    for i in range(start, stop):
        into[i] += wide(x[i])
