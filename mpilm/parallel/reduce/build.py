"""The gradient reducer that a config asks for, and the choice between shared memory and messages by timing both."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mpilm.comm.base import Comm
from mpilm.config.schema import Config, microbatch_count
from mpilm.ops.tree import AccumulateOp, TreeNode, block_of_rank, plan_block_accumulation
from mpilm.ops.tree_reduce import GradientEncoding, make_encoding
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import FlatLayout
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT, AllReduceBucketReducer, MessageReducer, tree_message_reducer
from mpilm.parallel.reduce.powersgd import PowerSGDReducer
from mpilm.parallel.reduce.rounds import RoundReducer
from mpilm.parallel.reduce.shared_memory import SharedMemoryReducer, allocate_on_nodes, detect_topology
from mpilm.parallel.reduce.step import CrossRankReducer, StepReducer

MIN_TIMED_NUMEL, MAX_TIMED_NUMEL = 1 << 20, 1 << 22  # smaller sums are not worth timing; larger ones take as long per element
ATTEMPTS = 3
CustomReducer = Callable[[FlatVector], CrossRankReducer]


def build_reducer(
    flat: FlatParameters, model: nn.Module, comm: Comm, config: Config, timings: dict[str, float]
) -> StepReducer | RoundReducer:
    """Return the reducer of a stage's gradients. Collective over `comm`, the reduce axes.

    `timings` receives the seconds of the methods that were timed.
    """
    total, train, parallel, device = microbatch_count(config), config.train, config.parallel, flat.device.type
    if parallel.zero >= 2:
        return RoundReducer(flat, model, comm, total, parallel.wire_dtype)
    custom: CustomReducer | None = None
    if parallel.sync_every:
        custom = lambda sums: CrossRankReducer()  # noqa: E731 - DiLoCo reduces weights, not gradients
    elif parallel.powersgd_rank and comm.size > 1:
        custom = lambda sums: PowerSGDReducer(comm, flat, sums, parallel.powersgd_rank, train.seed)  # noqa: E731
    method: str = parallel.reduce
    if method == "auto" and parallel.wire_dtype != "float32":
        method = "shared-memory"  # bf16 rounds what is sent, so timing noise must not choose
    elif method == "auto" and custom is None and device == "cpu" and comm.size > 1:
        method, timed = fastest_method(comm, flat.layout.numel, flat.zero == 0, parallel.wire_dtype)
        timings.update(timed if not timings else {})
    shared, overlap = method == "shared-memory", device == "cuda"
    return make_step_reducer(flat, model, comm, total, train.reproducible, overlap, shared, parallel.wire_dtype, custom)


def make_step_reducer(
    flat: FlatParameters,
    model: nn.Module,
    comm: Comm,
    microbatches: int,
    reproducible: bool = True,
    overlap: bool = False,
    shared: bool = True,
    wire_dtype: str = "float32",
    custom: CustomReducer | None = None,
) -> StepReducer:
    """Return a StepReducer with a reducer across the ranks of `comm`, the reduce axes. Collective.

    `shared`: reduce in shared memory where a node has some. `custom`: makes another reducer for the sum of this rank's block,
    as a single tensor.
    """
    blocks = [block_of_rank(rank, comm.size, microbatches) for rank in range(comm.size)]
    start, stop = blocks[comm.rank]
    encoding = make_encoding(wire_dtype)
    if custom is not None:
        ops, _ = plan_block_accumulation(0, stop - start, stop - start)
    elif not reproducible:
        ops = [AccumulateOp(0, i == 0, ()) for i in range(stop - start)]
    else:
        plans = [plan_block_accumulation(*block, microbatches) for block in blocks]
        ops, nodes_held = plans[comm.rank][0], [nodes for _, nodes in plans]
        if shared and comm.size > 1 and flat.device.type == "cpu":
            counts = [_buffer_count(ops) for ops, _ in plans]
            if found := _make_shared_reducer(flat, comm, counts, nodes_held, microbatches, encoding):
                buffers, reducer = found
                return StepReducer(flat, model, ops, buffers, list(nodes_held[comm.rank]), reducer, overlap)
    buffers = [FlatVector.zeros([(0, flat.layout.numel)], flat.device) for _ in range(_buffer_count(ops))]
    depth = len(flat.layout.buckets) if overlap else min(BUCKETS_IN_FLIGHT, len(flat.layout.buckets))
    node_buffers, across_ranks = [0], CrossRankReducer()
    if custom is not None:
        across_ranks = custom(buffers[0])
    elif comm.size > 1 and not reproducible:
        across_ranks = MessageReducer([AllReduceBucketReducer(comm) for _ in range(depth)])
    elif comm.size > 1:
        node_buffers, nodes = list(nodes_held[comm.rank]), [list(held.values()) for held in nodes_held]
        across_ranks = tree_message_reducer(
            comm, flat.layout, nodes, microbatches, flat.device, flat.zero == 0, depth, encoding
        )
    return StepReducer(flat, model, ops, buffers, node_buffers, across_ranks, overlap)


def _buffer_count(ops: Sequence[AccumulateOp]) -> int:
    return 1 + max(op.buffer for op in ops)


def _make_shared_reducer(
    flat: FlatParameters,
    comm: Comm,
    counts: Sequence[int],
    nodes_held: Sequence[Mapping[int, TreeNode]],
    microbatches: int,
    encoding: GradientEncoding,
) -> tuple[list[FlatVector], SharedMemoryReducer] | None:
    """Return this rank's buffers in shared memory and their reducer; None if a node has no such memory. Collective.

    `counts`: the buffers of each rank.
    """
    topology, numel = detect_topology(comm), flat.layout.numel
    if topology is None or (parts := allocate_on_nodes(topology, comm, counts[comm.rank] * numel)) is None:
        return None
    local_counts = [counts[rank] for rank in topology.ranks(topology.inter_node.rank)]
    buffers = [[part[i * numel : (i + 1) * numel] for i in range(count)] for part, count in zip(parts, local_counts)]
    own = [FlatVector([(0, numel)], buffer) for buffer in buffers[topology.intra_node.rank]]
    return own, SharedMemoryReducer(topology, flat.layout, buffers, nodes_held, microbatches, flat.zero == 0, encoding)


def fastest_method(comm: Comm, numel: int, gather: bool, wire_dtype: str) -> tuple[str, dict[str, float]]:
    """Return "shared-memory" or "messages" and the seconds of each for `numel` elements, the same on all ranks. Collective.

    Small sums, and those without a choice, are not timed: their seconds are empty.
    """
    topology = detect_topology(comm)
    if topology is None:
        return "messages", {}
    if numel < MIN_TIMED_NUMEL:
        return "shared-memory", {}
    layout = FlatLayout([ParamLayout("x", (min(numel, MAX_TIMED_NUMEL),))], ranks=comm.size)
    nodes_held = [{0: (rank, rank + 1)} for rank in range(comm.size)]
    parts = allocate_on_nodes(topology, comm, layout.numel)
    if parts is None:
        return "messages", {}
    buffers = [[part[: layout.numel]] for part in parts]
    shared = SharedMemoryReducer(topology, layout, buffers, nodes_held, comm.size, gather, make_encoding(wire_dtype))
    nodes, encoding = [[*held.values()] for held in nodes_held], make_encoding(wire_dtype)
    messages = tree_message_reducer(comm, layout, nodes, comm.size, torch.device("cpu"), gather, BUCKETS_IN_FLIGHT, encoding)
    x = torch.zeros(layout.numel)

    def reduce_by_messages() -> None:
        for start, stop in layout.buckets:
            messages.start([x[start:stop]], (start, stop))
        messages.finish()

    seconds = _time(comm, [shared.finish, reduce_by_messages])
    scaled = {name: s * numel / layout.numel for name, s in zip(("shared-memory", "messages"), seconds)}
    return min(scaled, key=scaled.__getitem__), scaled


def _time(comm: Comm, actions: Sequence[Callable[[], None]]) -> list[float]:
    """Return the least seconds of a few attempts, of the slowest rank."""
    times = torch.zeros(len(actions), ATTEMPTS, dtype=torch.float64)
    for attempt in range(ATTEMPTS):
        for number, action in enumerate(actions):
            comm.barrier()
            start_s = time.perf_counter()
            action()
            times[number, attempt] = time.perf_counter() - start_s
    comm.all_reduce(times, "max")
    return [float(row.min()) for row in times]
