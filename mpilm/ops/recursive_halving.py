"""Reduce-scatter and all-gather of one bucket by recursive halving (ops/halving.py): about log2(P) messages a rank."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.ops.halving import HalvingMerger, count_bucket_copies, plan_halving
from mpilm.ops.tree import Interval, TreeNode
from mpilm.ops.tree_reduce import Sliceable

REDUCE_TAG, GATHER_TAG = 7, 8  # two, because ranks with fewer rounds send the next bucket before they gather the last


class RecursiveHalvingReduceScatter:
    """Reduce-scatters one bucket at a time, as TreeOrderReduceScatter does, with the same bits. Collective over `comm`."""

    def __init__(self, comm: Comm, layout: Sliceable, nodes: Sequence[Sequence[TreeNode]], device: torch.device):
        self.comm, self.layout, self.device = comm, layout, device
        self.rounds = plan_halving(comm.rank, comm.size)
        self.order = self.rounds[0].own_slices + tuple(chain.from_iterable(slices for _, slices in self.rounds[0].sends))
        self.memory_bytes = 4 * comm.size * layout.longest_slice * count_bucket_copies(max(map(len, nodes)))

    def plan(self, nodes: Sequence[Sequence[TreeNode]], microbatches: int) -> HalvingMerger:
        """Return the additions of an exchange in which ranks contribute these nodes."""
        return HalvingMerger(nodes, microbatches, self.rounds, self.comm.rank)

    def start(self, reduction: HalvingMerger, parts: Sequence[Tensor], bucket: Interval) -> None:
        """Send the first half of this rank's nodes (`parts`) of a bucket."""
        self.reduction, self.sizes = reduction, self.layout.slices(bucket)
        self.held = [torch.cat([part.split(self.sizes)[number] for number in self.order]) for part in parts]
        self._start_round(0)

    def _start_round(self, number: int) -> None:
        each, count = self.rounds[number], self.reduction.received_counts[number]
        self.received = torch.empty(count, self._numel(each.own_slices), device=self.device)
        self.requests = [self.comm.irecv(self.received, each.source, REDUCE_TAG)] if self.received.numel() else []
        at = self._numel(each.own_slices)
        for to, slices in each.sends:
            stop = at + self._numel(slices)
            if self.held and stop > at:
                rows = [row[at:stop] for row in self.held]
                self.requests.append(self.comm.isend(rows[0] if len(rows) == 1 else torch.cat(rows), to, REDUCE_TAG))
            at = stop

    def finish(self) -> list[Tensor]:
        """Go through the rounds; return this rank's slice of each node that remains."""
        for number, (own, received, merges, remaining) in enumerate(self.reduction.steps):
            for request in self.requests:
                request.wait()
            numel = self._numel(self.rounds[number].own_slices)
            rows = dict(zip([*own, *received], [*(row[:numel] for row in self.held), *self.received]))
            for into, other in merges:
                rows[into].add_(rows[other])
            self.held = [rows[position] for position in remaining]
            if number + 1 < len(self.rounds):
                self._start_round(number + 1)
        return self.held

    def gather(self, total: Tensor, sums: Tensor, bucket: Interval) -> Request:
        """Gather the sums of all slices, of which `total` is this rank's; they are in `sums` after the wait."""
        sizes = self.layout.slices(bucket)

        def finish() -> None:
            gathered = torch.empty(sum(sizes), device=self.device)
            gathered[: total.numel()] = total
            for each in reversed(self.rounds):
                own, *behind = (
                    sum(sizes[number] for number in part) for part in [each.own_slices, *(s for _, s in each.sends)]
                )
                parts = gathered[own : own + sum(behind)].split(behind)
                requests = [self.comm.irecv(part, to, GATHER_TAG) for part, (to, _) in zip(parts, each.sends) if part.numel()]
                if own:
                    requests.append(self.comm.isend(gathered[:own], each.source, GATHER_TAG))
                for request in requests:
                    request.wait()
            places = sums.split(sizes)
            for number, part in zip(self.order, gathered.split([sizes[number] for number in self.order])):
                places[number].copy_(part)

        return Request(finish)

    def _numel(self, slices: Sequence[int]) -> int:
        return sum(self.sizes[number] for number in slices)
