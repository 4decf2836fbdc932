"""Measurements for a machine profile: what a rank computes, what it moves through memory, and messages between ranks."""

import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import Config, ModelConfig, TrainConfig, resolve_config
from mpilm.errors import ConfigError
from mpilm.formatting import count_noun, format_duration
from mpilm.kernels.base import loss_sum
from mpilm.model.families import build_model
from mpilm.model.flops import block_matrices, block_numel, saved_floats_per_token
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.tree_reduce import GradientEncoding
from mpilm.optim.norm import global_norm
from mpilm.optim.optimizer import fused_adamw
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.flat_layout import BUCKET, FlatLayout
from mpilm.parallel.fsdp import ReleasableBuffer
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.build import time_collectives
from mpilm.parallel.reduce.shared_memory import NodeTopology, SharedMemoryReducer
from mpilm.planner.cost import attention_s, linear_s
from mpilm.planner.profile import ComputeRates, Curve, MemoryRates, NetworkRates

MEASUREMENT_S = 0.12  # of one measurement, which has three calls at least
PROGRESS_S, BUDGET_S, LIMIT_S = 5.0, 150.0, 600.0  # between lines; after which a single call must do; for the calibration
TOKENS, WIDTHS = (128, 512, 2048), (128, 384, 1024, 2048)  # of matrix products
CONTEXTS, HEAD_WIDTHS = (128, 512, 2048), (32, 64, 128)  # of attention cores
BLOCKS = ((128, 128), (256, 256), (512, 512), (1024, 1024))  # tokens and width of blocks that are timed as one
CACHE_BYTES, MAX_BLOCKS = 128 << 20, 8  # so many blocks that no cache holds what they keep
LOGITS = ((128, 2048), (512, 8192), (1024, 32768))  # rows and vocabulary size
ELEMENTS = (1 << 16, 1 << 20, 1 << 24)  # of vectors in memory
MESSAGES = (1 << 14, 1 << 18, 1 << 22)  # elements
SUMS = (BUCKET // 16, BUCKET, 16 * BUCKET)  # elements, in shared memory
ForwardBackward = tuple[float, float]  # seconds


@dataclass
class Bench:
    """The ranks and the device to measure."""

    comm: Comm
    node: Comm
    device: torch.device
    alone: bool = False  # only the first rank of each node works, and the others wait
    began_s: float = field(default_factory=time.monotonic)
    printed_s: float = 0.0
    task: str = ""
    done: int = 0  # measurements of this task
    tasks: int = 0
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of the tasks
    stored: list[float] = field(default_factory=list)  # measurements of a calibration that was interrupted, still to be used
    keep: Callable[[float], None] = lambda seconds: None  # stores a measurement

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    def progress(self, text: str) -> None:
        """Begin a task."""
        number = f"{next(self.numbers)} of {self.tasks}, " if self.tasks else ""
        self.task, self.done, self.printed_s = f"{number}{text}", 0, self.elapsed_s
        if self.comm.rank == 0:
            print(f"  measuring {self.task}", file=sys.stderr, flush=True)

    def measure(self, action: Callable[[], float]) -> float:
        """Return the next stored measurement, or the seconds that `action` measures, and store them. Collective."""
        if self.stored:
            return self.stored.pop(0)
        seconds = action()
        self.keep(seconds)
        return seconds

    def _count(self, elapsed_s: float) -> None:
        """Count a measurement; raise CollectiveError if all of them together take too long."""
        self.done += 1
        if elapsed_s > LIMIT_S:
            advice = "end other programs here, and start one rank a core at most; numbers of a busy machine would mislead"
            raise CollectiveError(ConfigError(f"--calibrate has taken {format_duration(elapsed_s)} and is not done: {advice}"))
        if self.comm.rank == 0 and elapsed_s > self.printed_s + PROGRESS_S:
            self.printed_s = elapsed_s
            text = f"{count_noun(self.done, 'measurement')}, {format_duration(elapsed_s)} since the start"
            print(f"  measuring {self.task}: {text}", file=sys.stderr, flush=True)

    def time_call(self, action: Callable[[], object]) -> float:
        """Return the seconds of one call: the median over the calls of a rank, and over the ranks. Collective."""
        return self.measure(lambda: self._time_call(action))

    def time_collective(self, comm: Comm, action: Callable[[], object], calls: int = 5) -> float:
        """Return the slowest rank's seconds for one call by all ranks of `comm`. Collective."""
        return self.measure(lambda: time_collective(self.comm, comm, action, calls))

    def _time_call(self, action: Callable[[], object]) -> float:
        def timed() -> float:
            start_s = time.perf_counter()
            action()
            if self.device.type != "cpu":
                torch.get_device_module(self.device).synchronize(self.device)
            return time.perf_counter() - start_s

        self.comm.barrier()
        times = list[float]()
        if not self.alone or self.node.rank == 0:
            first_s = timed()
            until_s, is_late = time.perf_counter() + MEASUREMENT_S, self.elapsed_s > BUDGET_S
            while not is_late and (len(times) < 3 or (time.perf_counter() < until_s and len(times) < 1000)):
                times.append(timed())
            times = times or [first_s]
        medians, elapsed_s = zip(*self.comm.all_gather_json([statistics.median(times) if times else 0.0, self.elapsed_s]))
        self._count(max(elapsed_s))
        return statistics.median(each for each in medians if each > 0)


def time_collective(world: Comm, comm: Comm, action: Callable[[], object], calls: int = 5) -> float:
    """Return the slowest rank's seconds for one call by all ranks of `comm`, the median of `calls`. Collective over `world`."""
    action()
    return float(time_collectives(world, comm, [action], calls).median())


def measure_rates(bench: Bench, threads: int, ranks: int) -> tuple[list[ComputeRates], list[MemoryRates]]:
    """Measure ranks that have so many threads each, `ranks` of them on a node. Collective."""
    label = f"{count_noun(ranks, 'rank')} a node, {count_noun(threads, 'thread')} each"
    compute = []
    for dtype in ("float32", "bfloat16"):
        bench.progress(f"matrices in {dtype}, {label}")
        compute.append(_compute_rates(bench, threads, ranks, dtype))
    bench.progress(f"memory, {label}")
    curves = defaultdict[str, list[tuple[float, float]]](list)
    for size in ELEMENTS:
        for name, action in _memory_operations(size, bench.device).items():
            curves[name].append((size, bench.time_call(action) / size))
    return compute, [MemoryRates(threads, ranks, **{name: tuple(points) for name, points in curves.items()})]


def _compute_rates(bench: Bench, threads: int, ranks: int, dtype: str) -> ComputeRates:
    def leaf(*shape: int) -> Tensor:
        return torch.full(shape, 0.01, device=bench.device, requires_grad=True)

    def linear(tokens: int, width: int) -> ForwardBackward:
        x, weight = leaf(tokens, width), leaf(width, width)
        return _rates(bench, dtype, lambda: F.linear(x, weight), [x, weight], 2 * tokens * width**2, 2)

    def attention(length: int, width: int) -> ForwardBackward:
        q, k, v = (leaf(1, max(2, (1 << 19) // (length * width)), length, width) for _ in range(3))
        flops = 2 * length * q.numel()  # a causal context counts half
        return _rates(bench, dtype, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], flops, 2)

    def loss(rows: int, vocab_size: int) -> ForwardBackward:
        x, targets = leaf(1, rows, vocab_size), torch.zeros(1, rows, dtype=torch.int64, device=bench.device)
        return _rates(bench, "float32", lambda: loss_sum(x, targets), [x], x.numel())

    linears = _split([(tokens, _split([(width, linear(tokens, width)) for width in WIDTHS])) for tokens in TOKENS])
    cores = _split([(length, _split([(width, attention(length, width)) for width in HEAD_WIDTHS])) for length in CONTEXTS])
    losses = _split([(rows * vocab_size, loss(rows, vocab_size)) for rows, vocab_size in LOGITS])
    curves: tuple[Any, ...] = (*linears, *cores, {}, {}, *losses)  # the rest of a block follows from these
    rates = ComputeRates(threads, ranks, dtype, *curves)
    rest = {arch: _split([_rest_rates(bench, rates, arch, *sizes) for sizes in BLOCKS]) for arch in ("llama", "gpt2")}
    forward, backward = ({arch: pair[i] for arch, pair in rest.items()} for i in (0, 1))
    return replace(rates, rest_forward=forward, rest_backward=backward)


def _split(points):  # type: ignore[no-untyped-def]
    """Return two curves, or surfaces, from points that have a value, or a curve, for forward and for backward."""
    return tuple(tuple((size, pair[i]) for size, pair in points) for i in (0, 1))


def _rates(
    bench: Bench, dtype: str, forward: Callable[[], Tensor], inputs: Sequence[Tensor], units: float, backward_cost: int = 1
) -> ForwardBackward:
    """Measure a computation and its backward, which makes new gradients each time, in seconds a unit."""
    autocast = make_autocast(dtype, bench.device)

    def run_forward() -> Tensor:
        with autocast():
            return forward()

    def run_both() -> None:
        y = run_forward()
        y.backward(y.detach())
        for x in inputs:
            x.grad = None

    forward_s = bench.time_call(run_forward)
    return forward_s / units, max(0.1 * forward_s, bench.time_call(run_both) - forward_s) / (backward_cost * units)


def _rest_rates(bench: Bench, rates: ComputeRates, arch: str, tokens: int, width: int) -> tuple[float, ForwardBackward]:
    """Measure what a block computes besides matrix products and attention: floats that it keeps, and seconds for each. One
    block among several is timed, run in turn as in training: what backward needs has left the cache by then."""
    shape = ModelConfig(arch=arch, n_layers=1, n_heads=max(1, width // 64), d_model=width, context_length=min(tokens, 512))  # type: ignore[arg-type]
    model = resolve_config(Config(model=shape)).model
    length, saved = model.context_length, tokens * saved_floats_per_token(model, rates.dtype)
    count = max(1, min(MAX_BLOCKS, round(CACHE_BYTES / (4 * (saved + block_numel(model))))))
    blocks = [build_model(model, 128).get_submodule("blocks.0").to(bench.device) for _ in range(count)]
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    for parameter in parameters:
        parameter.data.fill_(0.01)
    rows = tokens // length
    x = torch.ones(rows, length, model.d_model, device=bench.device, requires_grad=True)
    sequences = SequenceInfo(torch.arange(length, device=bench.device), dropout_keys=list(range(rows)), loss_weight=1.0)

    def forward() -> Tensor:
        y = x
        for block in blocks:
            y = block(y, sequences)
        return y

    block_s = _rates(bench, rates.dtype, forward, [x, *parameters], count)
    products = [linear_s(rates, tokens, inputs, outputs) for inputs, outputs, _ in block_matrices(model)]
    known_s = map(sum, zip(*products, attention_s(rates, model, tokens)))
    forward_s, backward_s = (max(0.02 * measured, measured - known) / saved for measured, known in zip(block_s, known_s))
    return saved, (forward_s, backward_s)


def _memory_operations(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return an operation on vectors of so many elements for each rate of MemoryRates."""
    a, b, c, d = (torch.full((size,), 0.01, device=device) for _ in range(4))
    weight = torch.zeros(size // 256, 256, device=device, requires_grad=True)
    tokens, fresh = torch.arange(512, device=device).remainder(size // 256), ReleasableBuffer(size, device)

    def embedding() -> None:
        F.embedding(tokens, weight).sum().backward()
        weight.grad = None

    def touch() -> None:
        fresh.acquire()
        fresh.tensor.fill_(0.0)
        fresh.release()

    return {
        "add": lambda: a.add_(b),
        "scale": lambda: a.mul_(0.999),
        "norm": lambda: global_norm([a], SelfComm("alone")),
        "adamw": lambda: fused_adamw([a], [b], [[c], [d]], 1, TrainConfig(), lr=0.0, weight_decay=0.0),
        "embedding": embedding,
        "fresh": touch,
    }


def measure_network(bench: Bench, comm: Comm, distance: int = 1) -> NetworkRates | None:
    """Measure messages between ranks of `comm`, single ones over `distance`; None for one rank. Collective over the world."""
    world, n, device = bench.comm, comm.size, bench.device
    if min(world.all_gather_json(n)) == 1:
        return None
    bench.progress(f"messages between {n} ranks")

    def shift(x: Tensor, out: Tensor) -> None:
        for request in (comm.irecv(out, (comm.rank - distance) % n), comm.isend(x, (comm.rank + distance) % n)):
            request.wait()

    one_way_s, exchange, gather = list[float](), list[tuple[float, float]](), list[tuple[float, float]]()
    for numel in (1, MESSAGES[-1]):
        x, out = (torch.zeros(numel, device=device) for _ in range(2))
        one_way_s.append(bench.time_collective(comm, partial(shift, x, out), 20))
    for size in MESSAGES:
        x, out = (torch.zeros(size // n * n, device=device) for _ in range(2))
        mine, sent = x.view(n, -1)[comm.rank], size // n * (n - 1)
        exchange.append((size, bench.time_collective(comm, partial(comm.all_to_all, x, out)) / sent))
        gather.append((size, bench.time_collective(comm, partial(comm.all_gather, mine, out)) / sent))
    reduce_s = bench.time_collective(comm, partial(comm.all_reduce, torch.zeros(1, dtype=torch.float64, device="cpu")), 20)
    bandwidth = 4 * MESSAGES[-1] / max(1e-9, one_way_s[1] - one_way_s[0])
    return NetworkRates(n, one_way_s[0], bandwidth, tuple(exchange), tuple(gather), reduce_s, _shared_sum_curve(bench, comm))


def _shared_sum_curve(bench: Bench, comm: Comm) -> Curve:
    """Measure an all-reduce in shared memory; empty if ranks share none."""
    points: list[tuple[float, float]] = []
    for size in SUMS if bench.device.type == "cpu" else ():
        layout = FlatLayout([ParamLayout("x", (size,))], ranks=comm.size)
        nodes, parts = NodeTopology(comm, SelfComm("across")), comm.allocate_shared(layout.numel)
        if not all(bench.comm.all_gather_json(parts is not None)) or parts is None:
            break
        buffers, held = [[part[: layout.numel]] for part in parts], [{0: (rank, rank + 1)} for rank in range(comm.size)]
        summing = SharedMemoryReducer(nodes, layout, buffers, held, comm.size, gather=True, encoding=GradientEncoding())
        points.append((layout.numel, bench.time_collective(comm, summing.finish) / layout.numel))
    return tuple(points)
