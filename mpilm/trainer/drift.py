"""Whether ranks that should hold the same weights do: a processor or its memory may fail without a word."""

from __future__ import annotations

import torch

from mpilm.comm.together import AgreedError
from mpilm.errors import RanksDisagreeError
from mpilm.trainer.sharded import ShardedModel


def refuse_drift(model: ShardedModel, done: int) -> None:
    """Compare a sum over the bits of every parameter that replicas hold whole. Collective over the mesh; raises
    RanksDisagreeError, agreed by all ranks, naming the first parameter that differs, and the ranks."""
    bad = _differing(model) if model.zero < 3 and model.data.size > 1 else []
    everyone = [found for theirs in model.mesh.world.all_gather_json(bad) for found in theirs]
    if everyone:
        name, names = everyone[0][0], {name for name, _ in everyone}
        ranks = sorted({rank for other, rank in everyone if other == name})
        odd = f"rank {', '.join(map(str, ranks))} differs from most" if model.data.size > 2 else "the two differ"
        more = f", and {len(names) - 1} more parameters" if len(names) > 1 else ""
        raise AgreedError(RanksDisagreeError(
            f"after step {done}: {name}{more} should be the same on all {model.data.size} replicas, and {odd}: a processor or "
            "its memory may be failing. The newest checkpoint may hold wrong values; go on from an older one without that host"
        ))  # fmt: skip


def _differing(model: ShardedModel) -> list[list[object]]:
    """The parameters whose bits here are not those of most replicas, with this rank's number in the world. Collective over the
    data axis."""
    names, sums = [], []
    for flat in model.flats.values():
        for name, (_, layout) in flat.layout.slots.items():
            if layout.tied_to is None:
                names.append(name)
                sums.append(flat.parameter(name).view(-1).view(torch.int32).sum(dtype=torch.int64).cpu())
    mine = torch.stack(sums)
    every = torch.empty(model.data.size, len(names), dtype=torch.int64)
    model.data.all_gather(mine, every)
    usual = every.mode(dim=0).values
    return [[name, model.mesh.rank] for name, same in zip(names, (mine == usual).tolist()) if not same]
