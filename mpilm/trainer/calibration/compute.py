"""What a rank computes: matrices, attention, whole blocks, the loss, and what runs through memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpilm.comm.base import SelfComm
from mpilm.config import Config, Model, resolve
from mpilm.model.families import build_model
from mpilm.model.flops import attention_flops_per_token, block_matrices, block_numel, saved_floats_per_token
from mpilm.model.loss import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.optim.elementwise import EPS
from mpilm.optim.norm import global_norm
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.flat import set_parameter
from mpilm.parallel.fsdp import ReleasableBuffer
from mpilm.parallel.layout import ParamLayout
from mpilm.planner.machine import Compute, Curve, Memory, on
from mpilm.trainer.calibration.bench import Bench

TOKENS = (128, 512, 2048)
WIDTHS = (128, 384, 1024, 2048)
CONTEXTS, HEADS = (128, 512, 2048), (32, 64, 128)
BLOCKS = ((128, 128), (256, 256), (512, 512), (1024, 1024))  # tokens and width of the blocks that are timed as a whole
CACHE_BYTES, MOST_BLOCKS = 128 << 20, 8  # no cache holds so much
LOGITS = ((128, 2048), (512, 8192), (1024, 32768))
ELEMENTS = (1 << 16, 1 << 20, 1 << 24)


def computing(bench: Bench, threads: int, ranks: int) -> tuple[list[Compute], list[Memory]]:
    found = [_compute(bench, threads, ranks, dtype) for dtype in ("float32", "bfloat16")]
    bench.progress(f"what runs through memory, {ranks} rank{'s' * (ranks > 1)} a node")
    return found, [_streaming(bench, threads, ranks)]


def _compute(bench: Bench, threads: int, ranks: int, dtype: str) -> Compute:
    bench.progress(f"matrices in {dtype}, {ranks} rank{'s' * (ranks > 1)} a node, {threads} thread{'s' * (threads > 1)} each")
    linear = _surface(TOKENS, WIDTHS, lambda tokens, width: _linear_s(bench, dtype, int(tokens), int(width)))
    attention = _surface(CONTEXTS, HEADS, lambda length, width: _attention_s(bench, dtype, int(length), int(width)))
    parts = Compute(
        threads, ranks, dtype, linear_forward=linear[0], linear_backward=linear[1], attention_forward=attention[0],
        attention_backward=attention[1], rest_forward={}, rest_backward={}, loss_forward=(), loss_backward=(),
    )  # fmt: skip
    rest = {arch: _rest(bench, parts, arch) for arch in ("llama", "gpt2")}
    loss = _pair([(rows * logits, _loss_s(bench, rows, logits)) for rows, logits in LOGITS])
    return replace(
        parts, rest_forward={arch: pair[0] for arch, pair in rest.items()},
        rest_backward={arch: pair[1] for arch, pair in rest.items()}, loss_forward=loss[0], loss_backward=loss[1],
    )  # fmt: skip


Times = tuple[float, float]  # forward and backward


def _surface(firsts: Sequence[int], others: Sequence[int], measure: Callable[[float, float], Times]):  # type: ignore[no-untyped-def]
    """Forward and backward, each a curve over the second size for each of the first."""
    rows = [(first, _pair([(other, measure(first, other)) for other in others])) for first in firsts]
    return tuple((first, pair[0]) for first, pair in rows), tuple((first, pair[1]) for first, pair in rows)


def _pair(points: Sequence[tuple[float, Times]]) -> tuple[Curve, Curve]:
    return tuple((size, times[0]) for size, times in points), tuple((size, times[1]) for size, times in points)


def _times(bench: Bench, dtype: str, forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Times:
    """Of a computation and its backward, the gradients new each time."""
    autocast = make_autocast(dtype, bench.device)

    def ahead() -> Tensor:
        with autocast():
            return forward()

    def both() -> None:
        y = ahead()
        y.backward(y.detach())
        for x in inputs:
            x.grad = None

    forward_s = bench.seconds(ahead)
    return forward_s, max(0.1 * forward_s, bench.seconds(both) - forward_s)


def _linear_s(bench: Bench, dtype: str, tokens: int, width: int) -> Times:
    weight = torch.full((width, width), 0.01, device=bench.device, requires_grad=True)
    x = torch.ones(tokens, width, device=bench.device, requires_grad=True)
    forward_s, backward_s = _times(bench, dtype, lambda: F.linear(x, weight), [x, weight])
    flops = 2 * tokens * width**2
    return forward_s / flops, backward_s / (2 * flops)


def _attention_s(bench: Bench, dtype: str, length: int, width: int) -> Times:
    heads = max(2, (1 << 19) // (length * width))
    q, k, v = (torch.full((1, heads, length, width), 0.01, device=bench.device, requires_grad=True) for _ in range(3))
    forward_s, backward_s = _times(
        bench, dtype, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]
    )  # fmt: skip
    flops = 2 * heads * width * length * length  # a causal context counted by half
    return forward_s / flops, backward_s / (2 * flops)


def _block_shape(arch: str, tokens: int, width: int) -> Model:
    return resolve(
        Config(model=Model(arch=arch, n_layers=1, n_heads=max(1, width // 64), d_model=width, context_length=min(tokens, 512)))  # type: ignore[arg-type]
    ).model


def _rest(bench: Bench, parts: Compute, arch: str) -> tuple[Curve, Curve]:
    """Of a whole block what matrices and attention do not explain, by floats that it keeps."""
    points: list[tuple[float, Times]] = []
    for tokens, width in BLOCKS:
        shape = _block_shape(arch, tokens, width)
        kept, (forward_s, backward_s) = (
            tokens * saved_floats_per_token(shape, parts.dtype),
            _block_s(bench, parts.dtype, shape, tokens),
        )
        explained = [0.0, 0.0]
        for a, b, _ in block_matrices(shape):
            for i, surface in enumerate((parts.linear_forward, parts.linear_backward)):
                explained[i] += 2 * tokens * a * b * (1 + i) * on(surface, tokens, math.sqrt(a * b))
        flops = tokens * attention_flops_per_token(shape)
        explained[0] += flops / 3 * on(parts.attention_forward, shape.context_length, shape.head_width)
        explained[1] += 2 * flops / 3 * on(parts.attention_backward, shape.context_length, shape.head_width)
        rest = [max(0.02 * whole, whole - known) for whole, known in zip((forward_s, backward_s), explained)]
        points.append((kept, (rest[0] / kept, rest[1] / kept)))
    return _pair(points)


def _block_s(bench: Bench, dtype: str, shape: Model, tokens: int) -> Times:
    """Of one block among several, one after the other as in training: what backward needs has left the cache by then."""
    each = 4 * (tokens * saved_floats_per_token(shape, dtype) + block_numel(shape))
    count = max(1, min(MOST_BLOCKS, round(CACHE_BYTES / each)))
    blocks = [_block(bench, shape) for _ in range(count)]
    rows = tokens // shape.context_length
    x = torch.ones(rows, shape.context_length, shape.d_model, device=bench.device, requires_grad=True)
    where = SequenceInfo(
        torch.arange(shape.context_length, device=bench.device), dropout_keys=list(range(rows)), loss_weight=1.0
    )

    def forward() -> Tensor:
        y = x
        for block in blocks:
            y = block(y, where)
        return y

    parameters = [parameter for block in blocks for parameter in block.parameters()]
    forward_s, backward_s = _times(bench, dtype, forward, [x, *parameters])
    return forward_s / count, backward_s / count


def _block(bench: Bench, shape: Model) -> nn.Module:
    with torch.device("meta"):
        block = build_model(shape, 128).get_submodule("blocks.0")
    for name, parameter in list(block.named_parameters()):
        values = torch.full(parameter.shape, 0.01, device=bench.device)
        set_parameter(block, name, values, ParamLayout(name, tuple(parameter.shape)))
    return block


def _loss_s(bench: Bench, rows: int, logits: int) -> Times:
    x = torch.zeros(1, rows, logits, device=bench.device, requires_grad=True)
    targets = torch.zeros(1, rows, dtype=torch.int64, device=bench.device)
    forward_s, backward_s = _times(bench, "float32", lambda: loss_sum(x, targets), [x])
    return forward_s / (rows * logits), backward_s / (rows * logits)


def _streaming(bench: Bench, threads: int, ranks: int) -> Memory:
    def curve(measure: Callable[[int], Callable[[], object]], sizes: Sequence[int] = ELEMENTS) -> Curve:
        return tuple((size, bench.seconds(measure(size)) / size) for size in sizes)

    def vectors(size: int, count: int) -> list[Tensor]:
        return [torch.full((size,), 0.01, device=bench.device) for _ in range(count)]

    def add(size: int) -> Callable[[], object]:
        a, b = vectors(size, 2)
        return lambda: a.add_(b)

    def scale(size: int) -> Callable[[], object]:
        (a,) = vectors(size, 1)
        return lambda: a.mul_(0.999)

    def norm(size: int) -> Callable[[], object]:
        (a,) = vectors(size, 1)
        return lambda: global_norm([a], SelfComm("alone"))

    def adamw(size: int) -> Callable[[], object]:
        (*four,), count = vectors(size, 4), torch.ones((), device=bench.device)
        return lambda: torch._fused_adamw_(
            [four[0]], [four[1]], [four[2]], [four[3]], [], [count], lr=0.0, beta1=0.9, beta2=0.95, weight_decay=0.0, eps=EPS,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def embedding(size: int) -> Callable[[], object]:
        weight = torch.zeros(size // 256, 256, device=bench.device, requires_grad=True)
        tokens = torch.arange(512, device=bench.device).remainder(size // 256)

        def backward() -> None:
            F.embedding(tokens, weight).sum().backward()
            weight.grad = None

        return backward

    def fresh(size: int) -> Callable[[], object]:
        memory = ReleasableBuffer(size, bench.device)

        def touch() -> None:
            memory.acquire()
            memory.tensor.fill_(0.0)
            memory.release()

        return touch

    return Memory(threads, ranks, *map(curve, (add, scale, norm, adamw, embedding, fresh)))
