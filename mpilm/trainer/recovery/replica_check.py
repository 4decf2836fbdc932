"""Comparison of weights that replicas must hold alike: it notices processors or memory that fail silently."""

import torch

from mpilm.comm.collective_errors import CollectiveError
from mpilm.engine.train_model import TrainModel
from mpilm.errors import RanksDisagreeError
from mpilm.formatting import name_ranks


def check_replicas_equal(model: TrainModel, done: int) -> None:
    """Compare a sum over the bits of every parameter that replicas hold in full. Collective over the mesh.

    Raises RanksDisagreeError on all ranks, naming the first parameter that differs, and the ranks.
    """
    differing = _differing_parameters(model) if model.zero < 3 else []
    everyone = [(rank, *item) for rank, items in enumerate(model.mesh.world.all_gather_json(differing)) for item in items]
    if everyone:
        (_, name, replicas), names = everyone[0], {name for _, name, _ in everyone}
        ranks = [rank for rank, other, _ in everyone if other == name]
        odd = f"{name_ranks(ranks)} differ{'s' * (len(ranks) == 1)} from most" if replicas > 2 else "the two differ"
        more = f", and {len(names) - 1} more parameters" if len(names) > 1 else ""
        raise CollectiveError(
            RanksDisagreeError(
                f"after step {done}: {name}{more} should be the same on all {replicas} replicas, but {odd}: a processor or its "
                "memory may be failing. The newest checkpoint may hold wrong values; resume from an older one without that host"
            )
        )


def _differing_parameters(model: TrainModel) -> list[tuple[str, int]]:
    """Return the parameters whose bits differ from those of most replicas, and the number of replicas. Collective."""
    by_axes: dict[tuple[str, ...], list[tuple[str, torch.Tensor]]] = {}
    for flat in model.flats.values():
        for name, (_, layout) in flat.layout.spans.items():
            if layout.tied_to is None:
                bits = flat.parameter(name).view(-1).view(torch.int32).sum(dtype=torch.int64).cpu()
                by_axes.setdefault(layout.replica_axes, []).append((name, bits))
    differing: list[tuple[str, int]] = []
    for axes, items in by_axes.items():
        comm = model.mesh.comm(*axes)
        if comm.size > 1:
            own = torch.stack([bits for _, bits in items])
            everyone = torch.empty(comm.size, len(items), dtype=torch.int64)
            comm.all_gather(own, everyone)
            equal = (own == everyone.mode(dim=0).values).tolist()
            differing += [(name, comm.size) for (name, _), same in zip(items, equal) if not same]
    return differing
