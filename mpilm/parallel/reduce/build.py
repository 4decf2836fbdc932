"""The gradient reducer that a config asks for, and the choice between shared memory and messages by timing both."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mpilm.comm.base import Comm
from mpilm.config.schema import Config, microbatch_count
from mpilm.ops.tree_reduce import make_encoding
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import FlatLayout
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.messages import BUCKETS_IN_FLIGHT, CrossRankReducer, tree_message_reducer
from mpilm.parallel.reduce.powersgd import PowerSGDReducer
from mpilm.parallel.reduce.rounds import RoundReducer
from mpilm.parallel.reduce.shared_memory import SharedMemoryReducer, detect_topology
from mpilm.parallel.reduce.step import ReducerFactory, StepReducer

MIN_TIMED_NUMEL, MAX_TIMED_NUMEL = 1 << 20, 1 << 22  # smaller sums are not worth timing; larger ones take as long per element
ATTEMPTS = 3


def build_reducer(
    flat: FlatParameters, model: nn.Module, comm: Comm, config: Config, timings: dict[str, float]
) -> StepReducer | RoundReducer:
    """Return the reducer of a stage's gradients. Collective over `comm`, the reduce axes.

    `timings` receives the seconds of the methods that were timed.
    """
    total, train, parallel, device = microbatch_count(config), config.train, config.parallel, flat.device.type
    if parallel.zero >= 2:
        return RoundReducer(flat, model, comm, total, parallel.wire_dtype)
    custom: ReducerFactory | None = None
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
    return StepReducer(
        flat, model, comm, total, train.reproducible, device == "cuda", method == "shared-memory", parallel.wire_dtype, custom
    )


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
    parts = topology.intra_node.allocate_shared(layout.numel)
    if not all(comm.all_gather_json(parts is not None)) or parts is None:
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
