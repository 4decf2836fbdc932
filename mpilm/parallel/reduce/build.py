"""The gradient reducer that a config asks for, and the choice between the methods that ranks have, by timing them."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from mpilm.comm.base import Comm
from mpilm.config.schema import Config, microbatch_count
from mpilm.kernels.base import TORCH_KERNELS, Kernels
from mpilm.ops.halving import MIN_HALVING_RANKS
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tree import AccumulateOp, AccumulationPlan, TreeNode, count_buffers, even_blocks, plan_block_accumulation
from mpilm.ops.tree_reduce import GradientEncoding, make_encoding
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import FlatLayout
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.layout_check import reduces_in_rounds
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT, AllReduceReducer, MessageReducer
from mpilm.parallel.reduce.powersgd import PowerSGDReducer
from mpilm.parallel.reduce.rounds import LocalRoundReducer, MicrobatchRoundReducer
from mpilm.parallel.reduce.shared_memory import detect_topology, make_shared_memory_reducer
from mpilm.parallel.reduce.step import CrossRankReducer, StepReducer

MIN_TIMED_NUMEL, MAX_TIMED_NUMEL = 1 << 20, 1 << 22  # smaller sums are not worth timing; larger ones take as long per element
ATTEMPTS = 3


class ReductionMethod(NamedTuple):
    """A way in which ranks exchange gradients and add them. All give the same bits."""

    shared: bool  # in the shared memory of each node, and between nodes by messages
    halving: bool  # messages by recursive halving, not to all ranks at once

    def __str__(self) -> str:
        return ("shared-memory" if self.shared else "messages") + (", recursive halving" if self.halving else "")


DEFAULT_METHOD = ReductionMethod(shared=True, halving=False)


def build_reducer(
    flat: FlatParameters,
    model: nn.Module,
    config: Config,
    timings: dict[str, float],
    sequence: SequenceAxis,
    blocks: Sequence[TreeNode],
    kernels: Kernels = TORCH_KERNELS,
) -> StepReducer | MicrobatchRoundReducer:
    """Return the reducer of a stage's gradients. Collective over the ranks of `flat`. `timings` receives what was timed;
    `blocks`: the microbatches of each rank, unless they are reduced in rounds."""
    total, train, parallel, comm = microbatch_count(config), config.train, config.parallel, flat.comm
    allowed = "messages" if "gradients" in flat.offload.parts else parallel.reduce  # not in shared memory
    overlap = flat.device.type == "cuda"
    is_exact = parallel.wire_dtype == "float32" and train.reproducible and not overlap  # other methods round differently
    if reduces_in_rounds(config):
        if comm.size == 1:
            return LocalRoundReducer(flat, model, total, sequence=sequence)
        halving = is_exact and choose_method(flat, False, list_methods(comm, "messages"), timings).halving
        return MicrobatchRoundReducer(flat, model, total, parallel.wire_dtype, sequence, halving)
    if parallel.sync_every or (parallel.powersgd_rank and comm.size > 1):
        start, stop = blocks[comm.rank]
        plan = plan_block_accumulation(0, stop - start, stop - start)
        buffers = _make_buffers(flat, plan)
        across_ranks = CrossRankReducer()  # DiLoCo reduces weights, not gradients
        if not parallel.sync_every:
            across_ranks = PowerSGDReducer(comm, flat, buffers[0], parallel.powersgd_rank, train.seed)
        return StepReducer(flat, model, plan, buffers, across_ranks, overlap, kernels)
    method = ReductionMethod(allowed != "messages", False)
    if is_exact:
        method = choose_method(flat, flat.zero == 0, list_methods(comm, allowed), timings)
    return make_step_reducer(flat, model, total, train.reproducible, overlap, method, parallel.wire_dtype, blocks, kernels)


def make_step_reducer(
    flat: FlatParameters,
    model: nn.Module,
    microbatches: int,
    reproducible: bool = True,
    overlap: bool = False,
    method: ReductionMethod = DEFAULT_METHOD,
    wire_dtype: str = "float32",
    blocks: Sequence[TreeNode] = (),
    kernels: Kernels = TORCH_KERNELS,
) -> StepReducer:
    """Return a StepReducer that reduces across the ranks of `flat`, in shared memory only if there is any. `blocks`: the
    microbatches of each rank; as even as possible if not given. Collective."""
    blocks = blocks or even_blocks(flat.comm.size, microbatches)
    bucket_count, gather, comm = len(flat.layout.buckets), flat.zero == 0, flat.comm
    depth = bucket_count if overlap else min(BUCKETS_IN_FLIGHT, bucket_count)
    if not reproducible:
        start, stop = blocks[comm.rank]
        in_sequence: AccumulationPlan = [AccumulateOp(0, i == 0, ()) for i in range(stop - start)], {0: (start, stop)}
        buffers = _make_buffers(flat, in_sequence)
        return StepReducer(flat, model, in_sequence, buffers, AllReduceReducer(comm, depth), overlap, kernels)
    plans, encoding = _plan_blocks(blocks, microbatches), make_encoding(wire_dtype)
    plan, nodes = plans[comm.rank], [list(held.values()) for _, held in plans]
    if method.shared and comm.size > 1 and flat.device.type == "cpu":
        shared_reducer = make_shared_memory_reducer(comm, flat.layout, plans, microbatches, gather, encoding, method.halving)
        if shared_reducer is not None:
            buffers = [FlatVector([(0, flat.layout.numel)], buffer) for buffer in shared_reducer.own_buffers]
            return StepReducer(flat, model, plan, buffers, shared_reducer, overlap, kernels)
    across_ranks = CrossRankReducer()
    if comm.size > 1:
        exchange = microbatches, flat.device, gather, depth, encoding, method.halving
        across_ranks = MessageReducer(comm, flat.layout, nodes, *exchange)
    return StepReducer(flat, model, plan, _make_buffers(flat, plan), across_ranks, overlap, kernels)


def _plan_blocks(blocks: Sequence[TreeNode], microbatches: int) -> list[AccumulationPlan]:
    """Return the plan of each rank for its block of microbatches."""
    return [plan_block_accumulation(*block, microbatches) for block in blocks]


def _make_buffers(flat: FlatParameters, plan: AccumulationPlan) -> list[FlatVector]:
    return [flat.zeros("gradients", [(0, flat.layout.numel)]) for _ in range(count_buffers(plan[0]))]


def list_methods(comm: Comm, reduce: Literal["auto", "shared-memory", "messages"]) -> list[ReductionMethod]:
    """Return the methods that these ranks have, of those that parallel.reduce admits; the first is the best guess for small
    gradients, whose cost is the number of messages. Collective."""
    topology = None if reduce == "messages" else detect_topology(comm)
    senders = {} if topology is None else {True: topology.inter_node.size}
    if topology is None or reduce == "auto":
        senders[False] = comm.size
    return [
        ReductionMethod(shared, halving)
        for shared, count in senders.items()
        for halving in ((True, False) if count >= MIN_HALVING_RANKS else (False,))
    ]


def choose_method(
    flat: FlatParameters, gather: bool, methods: Sequence[ReductionMethod], timings: dict[str, float]
) -> ReductionMethod:
    """Return the fastest of some methods, the same on all ranks, and add to `timings` what was timed: not small gradients, nor
    a single method. Collective over the ranks of `flat`."""
    if len(methods) == 1 or flat.layout.numel < MIN_TIMED_NUMEL:
        return methods[0]
    timed = time_methods(flat.comm, flat.layout.numel, gather, methods)
    timings.update({str(method): seconds for method, seconds in timed.items()} if not timings else {})
    return min(timed, key=timed.__getitem__)


def time_methods(comm: Comm, numel: int, gather: bool, methods: Sequence[ReductionMethod]) -> dict[ReductionMethod, float]:
    """Return the seconds in which some methods reduce `numel` elements, the same on all ranks. Collective."""
    layout = FlatLayout([ParamLayout("x", (min(numel, MAX_TIMED_NUMEL),))], ranks=comm.size)
    plans, encoding = _plan_blocks(even_blocks(comm.size, comm.size), comm.size), GradientEncoding()
    nodes, x = [list(held.values()) for _, held in plans], torch.zeros(layout.numel)
    actions: dict[ReductionMethod, Callable[[], object]] = {}

    def reduce_by_messages(messages: MessageReducer) -> None:
        for start, stop in layout.buckets:
            messages.start([x[start:stop]], (start, stop))
        messages.finish()

    for method in methods:
        if method.shared:
            shared = make_shared_memory_reducer(comm, layout, plans, comm.size, gather, encoding, method.halving)
            if shared is not None:
                actions[method] = shared.finish
        else:
            exchange = comm.size, torch.device("cpu"), gather, BUCKETS_IN_FLIGHT, encoding, method.halving
            actions[method] = partial(reduce_by_messages, MessageReducer(comm, layout, nodes, *exchange))
    seconds = time_collectives(comm, comm, list(actions.values()), ATTEMPTS).amin(dim=0).tolist()
    return {method: s * numel / layout.numel for method, s in zip(actions, seconds)}


def time_collectives(world: Comm, comm: Comm, actions: Sequence[Callable[[], object]], rounds: int) -> torch.Tensor:
    """Return the seconds of the slowest rank, (rounds, actions), for actions that all ranks of `comm` take in turn. Collective
    over `world`, whose other communicators do the same."""
    times = torch.zeros(rounds, len(actions), dtype=torch.float64, device="cpu")
    for row in times:
        for number, action in enumerate(actions):
            comm.barrier()
            start_s = time.perf_counter()
            action()
            row[number] = time.perf_counter() - start_s
    world.all_reduce(times, "max")
    return times
