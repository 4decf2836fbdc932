"""What ranks say to each other: between two, among all, and in memory that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from mpilm.comm.base import Comm, SelfComm
from mpilm.parallel.flat_layout import BUCKET, FlatLayout
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.shared_memory import NodeTopology, SharedMemoryReducer
from mpilm.planner.machine import Curve, Network
from mpilm.trainer.calibration.bench import Bench

MESSAGES = (1 << 14, 1 << 18, 1 << 22)  # elements


def network(bench: Bench, comm: Comm, apart: int = 1) -> Network | None:
    """Between the ranks of a node, or of all nodes; one speaks with the one that is so many ranks `apart`. Collective over the
    world; None where there is one rank."""
    if min(bench.comm.all_gather_json(comm.size)) == 1:
        return None
    bench.progress(f"messages between {comm.size} ranks")
    n, rank, device = comm.size, comm.rank, bench.device
    small = _ping_s(bench, comm, apart, torch.zeros(1, device=device))
    large = _ping_s(bench, comm, apart, torch.zeros(MESSAGES[-1], device=device))
    exchange, gather = [], []
    for size in MESSAGES:
        each = size // n
        x, out, leaving = torch.zeros(each * n, device=device), torch.empty(each * n, device=device), each * (n - 1)
        exchange.append((size, bench.collective_s(lambda x=x, out=out: comm.all_to_all(x, out), comm) / leaving))  # type: ignore[misc]
        mine = x[rank * each : (rank + 1) * each]
        gather.append((size, bench.collective_s(lambda mine=mine, out=out: comm.all_gather(mine, out), comm) / leaving))  # type: ignore[misc]
    one = torch.zeros(1, dtype=torch.float64, device="cpu")
    return Network(
        ranks=n, latency_s=small, bandwidth=4 * MESSAGES[-1] / max(1e-9, large - small), exchange=tuple(exchange),
        gather=tuple(gather), reduce_s=bench.collective_s(lambda: comm.all_reduce(one), comm, 20), shared=_shared(bench, comm),
    )  # fmt: skip


def across(bench: Bench, comm: Comm, node: Comm) -> Network | None:
    """Between all ranks of several nodes."""
    return network(bench, comm, node.size) if min(comm.all_gather_json(comm.size - node.size)) > 0 else None


def _ping_s(bench: Bench, comm: Comm, apart: int, x: Tensor) -> float:
    """One way between ranks that are so far apart, all of them at once."""
    y = torch.empty_like(x)

    def there_and_back() -> None:
        requests = [comm.irecv(y, (comm.rank - apart) % comm.size), comm.isend(x, (comm.rank + apart) % comm.size)]
        for request in requests:
            request.wait()

    return bench.collective_s(there_and_back, comm, 20)


def _shared(bench: Bench, comm: Comm) -> Curve:
    """The sum in shared memory, where there is some."""
    points: list[tuple[float, float]] = []
    for size in (BUCKET // 16, BUCKET, 16 * BUCKET) if bench.device.type == "cpu" else ():
        layout = FlatLayout([ParamLayout("x", (size,))], ranks=comm.size)
        nodes, parts = NodeTopology(comm, SelfComm("across")), comm.allocate_shared(layout.numel)
        if not all(bench.comm.all_gather_json(parts is not None)) or parts is None:
            break
        buffers = [[part[: layout.numel]] for part in parts]
        held = [{0: (r, r + 1)} for r in range(comm.size)]
        summing = SharedMemoryReducer(nodes, layout, buffers, held, comm.size, gather=True)
        points.append((layout.numel, bench.collective_s(summing.finish, comm) / layout.numel))
    return tuple(points)
