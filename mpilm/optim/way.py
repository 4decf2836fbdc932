"""Which way to sum gradients is the faster here: tried at the start on a vector of the size that there is to sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from mpilm.comm.base import Comm
from mpilm.optim.exchange import Round, TreeExchange
from mpilm.optim.sent import BucketSum, SentSum
from mpilm.optim.shared import SharedSum, nodes_of
from mpilm.optim.wire import wire_of
from mpilm.parallel.layout import Layout
from mpilm.parallel.shard import FlatLayout

LEAST, MOST = 1 << 20, 1 << 22  # elements: fewer are not worth trying, and more take as long for each
TRIES = 3


def faster(comm: Comm, numel: int, gather: bool, wire_dtype: str) -> tuple[str, dict[str, float]]:
    """shared or sent, and the seconds of each for so many elements. Collective; the same on all ranks. What is small, or has no
    choice, is not tried: its seconds are none."""
    nodes = nodes_of(comm)
    if nodes is None:
        return "sent", {}
    if numel < LEAST:
        return "shared", {}
    layout = FlatLayout([Layout("x", (min(numel, MOST),), ("data",), False)], ranks=comm.size)
    held = [{0: (rank, rank + 1)} for rank in range(comm.size)]
    parts = nodes.node.share(layout.numel)
    if not all(comm.all_gather_json(parts is not None)) or parts is None:
        return "sent", {}
    shared = SharedSum(nodes, layout, [[part[: layout.numel]] for part in parts], held, comm.size, gather, wire_of(wire_dtype))
    step, device = Round([[*of.values()] for of in held], comm.size), torch.device("cpu")
    places = [BucketSum(TreeExchange(comm, layout, comm.size, device, wire_of(wire_dtype)), step, gather) for _ in range(2)]
    sent, x = SentSum(places), torch.zeros(layout.numel)

    def send() -> None:
        for start, stop in layout.buckets:
            sent.start([x[start:stop]], (start, stop))
        sent.finish()

    took_s = _seconds(comm, [shared.finish, send])
    scaled = {way: seconds * numel / layout.numel for way, seconds in zip(("shared", "sent"), took_s)}
    return min(scaled, key=scaled.__getitem__), scaled


def _seconds(comm: Comm, ways: Sequence[Callable[[], None]]) -> list[float]:
    """The least of some tries, of the slowest rank."""
    times = torch.zeros(len(ways), TRIES, dtype=torch.float64)
    for attempt in range(TRIES):
        for number, way in enumerate(ways):
            comm.barrier()
            start_s = time.perf_counter()
            way()
            times[number, attempt] = time.perf_counter() - start_s
    comm.all_reduce(times, "max")
    return [float(of.min()) for of in times]
