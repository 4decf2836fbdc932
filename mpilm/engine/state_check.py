"""The check for silent data corruption: the state against the digests of the last update, and replicas against each other."""

import math
import socket
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from mpilm.comm.collective_errors import CollectiveError
from mpilm.engine.train_model import TrainModel
from mpilm.errors import RanksDisagreeError
from mpilm.formatting import name_ranks
from mpilm.parallel.digests import CAUSE, MODULUS, name_bit, read_sums, sum_bits

ADVICE = "Nothing of this is saved; the same command, best without that host, resumes from the newest checkpoint"


def state_mismatch(model: TrainModel, done: int) -> float:
    """Return this rank's part of a sum over all ranks, which is 0 if the state of each is that of the last update and the
    weights of replicas are equal. `done`: the number of completed steps."""
    digests = model.digests.measure()
    if digests != model.digests.recorded:
        return math.inf
    if model.zero == 3 or not model.are_replicas_in_sync(done):
        return 0.0
    mismatch = 0  # an integer, exact below 2**53
    for axes, of_weights in _weight_totals(model, digests).items():
        comm = model.mesh.comm(*axes)
        mismatch += sum(of_weights.values()) % MODULUS * (comm.size - 1 if comm.rank == 0 else -1)
    return float(mismatch)


def check_state(model: TrainModel, done: int) -> None:
    """Compare the state with its digests, and with that of replicas. Collective over the mesh. Raises RanksDisagreeError on all
    ranks, naming the first parameter that is wrong, the ranks, and what is wrong."""
    digests = model.digests.measure()
    row = [socket.gethostname(), _find_changed(model, digests), _find_differing(model, done, digests)]
    hosts, changed, differing = zip(*model.mesh.world.all_gather_json(row))
    for kind in (changed, differing):  # in this order: a change tells which replica is wrong
        if found := [(rank, *item) for rank, items in enumerate(kind) for item in items]:
            _, name, problem = found[0]
            ranks = [rank for rank, items in enumerate(kind) if name in dict(items)]
            more = len({other for _, other, _ in found}) - 1
            where = f"{name_ranks(ranks)} ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})"
            what = f"{name}{f' and {more} more' if more else ''} on {where} {problem}"
            raise CollectiveError(RanksDisagreeError(f"after step {done}: {what}: {CAUSE}. {ADVICE}"))


def _find_changed(model: TrainModel, digests: Sequence[int]) -> list[tuple[str, str]]:
    """Return the tensors whose bits on this rank have changed since the last update, and how."""
    parts = zip(model.digests.names, digests, model.digests.recorded)
    changed = [(name, name_bit(now - then)) for name, now, then in parts if now != then]
    return [(name, "changed since the last update" + (f" ({bit})" if bit else "")) for name, bit in changed]


def _replica_axes(model: TrainModel, name: str) -> tuple[str, ...]:
    """Return the axes over which a tensor is equal; a moment of a divided parameter that is not divided has its name."""
    if name in model.layouts:
        return model.layouts[name].replica_axes
    return (*next(layout for layout in model.layouts.values() if layout.source == name).reduce_axes, "tensor")


def _weight_totals(model: TrainModel, digests: Sequence[int]) -> dict[tuple[str, ...], Counter[str]]:
    """Return the digests of the weights, by name, for each set of axes over which they are equal."""
    totals = defaultdict[tuple[str, ...], Counter[str]](Counter)
    for name, digest in zip(model.digests.weight_names, digests):
        totals[_replica_axes(model, name)][name] += digest
    return totals


def _find_differing(model: TrainModel, done: int, digests: Sequence[int]) -> list[tuple[str, str]]:
    """Return the tensors whose bits differ from those of most replicas. Collective over the mesh."""
    if model.zero == 3 or not model.are_replicas_in_sync(done):
        return []
    totals = _weight_totals(model, digests)
    if model.replicates_moments:
        for kind, slices in model.optimizer.state_slices().items():
            for item, digest in zip(slices, read_sums(sum_bits(slices.values()))):
                totals[_replica_axes(model, item.name)][f"{item.name} ({kind})"] += digest
    differing: list[tuple[str, str]] = []
    for axes in sorted(totals):  # in the same order on all ranks
        comm, names = model.mesh.comm(*axes), sorted(totals[axes])
        everyone = comm.all_gather_json([totals[axes][name] % MODULUS for name in names])
        others = everyone[1 - comm.rank] if comm.size == 2 else map(statistics.mode, zip(*everyone))
        most = "the other replica" if comm.size == 2 else f"most of the {comm.size} replicas"
        triples = zip(names, everyone[comm.rank], others)
        differing += [(name, f"differed from {most}") for name, own, other in triples if own != other]
    return differing
