"""Comparison of every layout of these ranks with the serial run: the same losses, gradients and weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import numpy as np
import torch
from torch import Tensor

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError, check_same_on_all_ranks, run_on_all_ranks
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.config.check import check_config
from mpilm.config.schema import (
    MIXTURES,
    Config,
    ParallelConfig,
    replica_size,
    resolve_config,
    sequence_part_count,
    tensor_part_count,
)
from mpilm.config.settings import flatten, override
from mpilm.data.batch import Batch
from mpilm.engine.device_transport import connect_devices
from mpilm.engine.hardware import Hardware, detect_hardware
from mpilm.engine.step import forward_backward, optimizer_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import ConfigError, RanksDisagreeError
from mpilm.formatting import count_noun
from mpilm.mesh.mesh import Mesh
from mpilm.model.layers import hash_key
from mpilm.parallel.flat_layout import ALIGNMENT, ParamSlice
from mpilm.parallel.layout_check import partition_by_cost, resolve_mesh_shape
from mpilm.parallel.pipeline.schedules import SCHEDULES

VOCAB_SIZE = 331
MAX_LAYOUTS = 64
COLUMNS = ("data", "pipeline", "expert", "context", "tensor")
GPU_TOLERANCE = 1e-4  # relative to the largest element: GPU kernels may add in another order each time

Slices = Mapping[ParamSlice, Tensor]


class RandomTokens:
    """A MicrobatchSource of random tokens, for models that need not learn anything."""

    def __init__(self, config: Config, vocab_size: int = VOCAB_SIZE):
        self.config, self.vocab_size = config, vocab_size

    def training_batch(self, step: int, m: int) -> Batch:
        rows, length = self.config.train.micro_batch, self.config.model.context_length
        generator = np.random.Generator(np.random.Philox(key=hash_key("verify", self.config.train.seed, step, m)))
        tokens = generator.integers(0, self.vocab_size, (rows, length + 1), dtype=np.int64)
        samples = step * self.config.train.global_batch + m * rows + np.arange(rows)
        return Batch.from_arrays(tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=np.arange(length), samples=samples)

    def target_tokens(self, step: int) -> int:
        return self.config.train.global_batch * self.config.model.context_length


@dataclass(frozen=True)
class LayoutOutcome:
    """The results of a few steps, as far as this rank has them."""

    numbers: list[float]  # loss and gradient norm of each step
    gradients: list[Slices]  # of each step
    weights: Slices  # after the last step


def list_layouts(config: Config, ranks: int) -> Iterator[tuple[Config, str]]:
    """Yield `config` with all layouts of so many ranks, each with the reason why it cannot run this model, or "". If parts are
    not stated, layouts with a tensor or context axis have as many as the longest such axis that this model admits needs."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]

    def count_parts(axis: str, size: int, stated: int) -> int:
        possible = (n for n in divisors if n % size == 0 and not _why_invalid(override(config, {f"parallel.{axis}": n}), n))
        return stated or (max(possible, default=0) * (2 if axis == "context" else 1) if size > 1 else 0)

    model = config.model
    experts = [n for n in divisors if n == 1 or (model.arch in MIXTURES and model.n_experts % n == 0)]
    for context, tensor, pipeline, expert in product(*[divisors] * 3, experts):
        if ranks % (pipeline * tensor * context * expert):
            continue
        tensor_parts = count_parts("tensor", tensor, model.tensor_parts)
        sequence_parts = count_parts("context", context, model.sequence_parts)
        shape = replace(model, tensor_parts=tensor_parts, sequence_parts=sequence_parts)
        for schedule in SCHEDULES if pipeline > 1 or ranks == 1 else ("1f1b",):
            for zero in (0, 1, 2, 3) if ranks > pipeline * tensor else (0,):
                parallel = ParallelConfig(pipeline, tensor, context, expert=expert, schedule=schedule, zero=zero)  # type: ignore[arg-type]
                changed = resolve_config(replace(config, model=shape, parallel=parallel))
                yield changed, _why_invalid(changed, ranks)


def _why_invalid(config: Config, ranks: int) -> str:
    try:
        check_config(config)
        resolve_mesh_shape(config, ranks)
        partition_by_cost(config, VOCAB_SIZE)
        return ""
    except ConfigError as error:
        return str(error)


def verify_layouts(config: Config, world: Comm, self_test: bool, print_line: Callable[[str], None]) -> None:
    """Run every layout and compare it with the serial run. Collective; raises CollectiveError if one differs. `self_test`: one
    rank flips the lowest bit of one gradient element, which the comparison must find."""
    check_same_on_all_ranks(world, "settings", flatten(config))
    hardware = run_on_all_ranks(world, lambda: detect_hardware(config.train, world))
    world = InstrumentedComm(connect_devices(config.train.device_transport, world, hardware))
    tolerance = GPU_TOLERANCE if hardware.device.type != "cpu" else 0.0
    serial = dict[tuple[int, int], LayoutOutcome]()  # by the numbers of tensor and sequence parts
    titles = [f"{axis:>{max(4, len(axis))}}" for axis in COLUMNS]
    columns = f"{'  '.join(titles)}  {'parts':>5}  {'schedule':<11}  {'ZeRO':>4}"
    print_line(f"{columns}  {'loss':>9}  {'gradient':>9}  {'weight':>9}")
    failed = ran = 0
    for layout, reason in _draw_layouts(config, world.size, print_line):
        parallel, parts = layout.parallel, (sequence_part_count(layout), tensor_part_count(layout))
        axes = {**vars(parallel), "data": world.size // replica_size(parallel) // parallel.expert}
        sizes = "  ".join(f"{axes[axis]:>{len(title)}}" for axis, title in zip(COLUMNS, titles))
        schedule = parallel.schedule if parallel.pipeline > 1 or world.size == 1 else "-"
        label = f"{sizes}  {'{} x {}'.format(*parts):>5}  {schedule:<11}  {parallel.zero:>4}"
        if reason:
            print_line(f"{label}  not run: {reason}")
            continue
        if parts not in serial:
            serial[parts] = run_layout(replace(layout, parallel=resolve_config(Config()).parallel), SelfComm("world"), hardware)
        outcome = run_layout(layout, world, hardware, self_test)
        differences, bits_equal = _compare(outcome, serial[parts], world)
        passed = bits_equal or max(differences) <= tolerance
        ran, failed = ran + 1, failed + (not passed)
        verdict = "equal bits" if bits_equal else f"within {tolerance:g}" if passed else "DIFFERENT"
        print_line("  ".join([label, *(f"{difference:>9.2g}" for difference in differences), verdict]))
    if not ran:
        raise CollectiveError(ConfigError(f"no layout of {world.size} ranks can run this model and batch: nothing is verified"))
    if failed and self_test:
        raise CollectiveError(RanksDisagreeError(f"self-test: found the flipped bit on {failed} of {ran} layouts, as it must"))
    if failed:
        expected = f"a relative difference of at most {tolerance:g}" if tolerance else "equal bits"
        raise CollectiveError(RanksDisagreeError(f"{failed} of {ran} layouts differ from the serial run; expected: {expected}"))
    counts = f"{count_noun(ran, 'layout')} of {count_noun(world.size, 'rank')}, {count_noun(config.train.steps, 'step')} each"
    print_line(f"{counts}: " + (f"within {tolerance:g}" if tolerance else "bitwise identical, as guaranteed"))


def _draw_layouts(config: Config, ranks: int, print_line: Callable[[str], None]) -> list[tuple[Config, str]]:
    """Return all layouts or, if they are very many, some of those that can run, drawn by the seed."""
    layouts = list(list_layouts(config, ranks))
    if len(layouts) <= MAX_LAYOUTS:
        return layouts
    possible = [item for item in layouts if not item[1]]
    drawn = sorted(Random(config.train.seed).sample(range(len(possible)), min(MAX_LAYOUTS, len(possible))))
    print_line(f"{len(drawn)} of {len(possible)} possible layouts, drawn by --train.seed {config.train.seed}")
    return [possible[i] for i in drawn]


def run_layout(config: Config, world: Comm, hardware: Hardware, flip_bit: bool = False) -> LayoutOutcome:
    """Train for `train.steps` on one layout. Collective over `world`."""
    mesh = Mesh(resolve_mesh_shape(config, world.size), world)
    alignment = ALIGNMENT * hardware.threads
    model = TrainModel(config, mesh, partition_by_cost(config, VOCAB_SIZE), VOCAB_SIZE, hardware.device, alignment)
    model.init_parameters()
    source, numbers, gradients = RandomTokens(config), list[float](), []
    for step in range(config.train.steps):
        loss, norm, *_ = forward_backward(model, source, step)
        if flip_bit and step == config.train.steps - 1:  # the next step would refuse replicas that differ
            _flip_one_gradient_bit(model, world)
        numbers += [loss, norm]
        gradients.append(_clone(model.gradient_slices()))
        optimizer_step(model, step, norm)
    return LayoutOutcome(numbers, gradients, _clone(model.owned_slices()))


def _flip_one_gradient_bit(model: TrainModel, world: Comm) -> None:
    """Flip the lowest bit of a gradient element on the last rank that updates any (of many, some may not). Collective."""
    slices = model.gradient_slices().values()
    updating = [rank for rank, count in enumerate(world.all_gather_json(len(slices))) if count]
    if world.rank == updating[-1]:
        max(slices, key=torch.numel)[:1].view(torch.int32).bitwise_xor_(1)


def _clone(slices: Slices) -> Slices:
    return {item: x.clone() for item, x in slices.items()}


def _compare(outcome: LayoutOutcome, serial: LayoutOutcome, world: Comm) -> tuple[list[float], bool]:
    """Return the largest differences of loss, gradient and weights over all ranks, and whether all bits agree. Collective."""
    loss = max(_nan_to_inf(abs(a - b) / abs(b)) for a, b in zip(outcome.numbers, serial.numbers))
    pairs = [*zip(outcome.gradients, serial.gradients), (outcome.weights, serial.weights)]
    (*gradients, weight), bits_equal = zip(*(_compare_slices(own, full) for own, full in pairs))
    differs = outcome.numbers != serial.numbers or not all(bits_equal)
    largest = torch.tensor([loss, max(gradients), weight, differs], dtype=torch.float64)
    world.all_reduce(largest, "max")
    *differences, any_differ = largest.tolist()
    return differences, not any_differ


def _compare_slices(own: Slices, serial: Slices) -> tuple[float, bool]:
    """Return the largest difference of an element, relative to the largest of all parameters, and whether all bits agree."""
    full = {item.name: x for item, x in serial.items()}
    pairs = [(x, full[item.name][item.start : item.stop]) for item, x in own.items()]
    scale = max(float(x.abs().max()) for x in full.values())
    difference = max((_nan_to_inf(float((a - b).abs().max()) / scale) for a, b in pairs), default=0.0)
    return difference, all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def _nan_to_inf(difference: float) -> float:
    """Replace nan, for which every comparison is false, by a value larger than any tolerance."""
    return math.inf if math.isnan(difference) else difference
