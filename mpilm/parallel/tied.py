"""One matrix with two uses, on two stages or one: gradients go to the owner, values come back.

Each use has a gradient of its own, summed over all microbatches by itself; then the sums are added, in the same order wherever
the uses are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.layout import Layout
from mpilm.parallel.shard import BUCKET, intersect

TAG = 1 << 14  # above the tags of activations


class Ties:
    """The ties of a model whose stages `flats` (by number) are on this rank. Collective over `comm`, the pipeline axis.

    `layouts`: of the whole model.
    """

    def __init__(self, layouts: Mapping[str, Layout], flats: Mapping[int, FlatParameters], comm: Comm):
        self.comm, self.flats = comm, flats
        self.ties = [(layout, layouts[layout.tied_to]) for layout in layouts.values() if layout.tied_to]
        self.sharing = all(flat.zero < 3 for flat in flats.values())

    def add_gradients(self, sums: Mapping[int, FlatVector]) -> None:
        """Add the summed gradient of each use to that of its owner; `sums` are by stage."""
        for number, (use, owner) in enumerate(self.ties):
            if self._one_memory(use, owner):
                for into, other in zip(self._held(owner, sums), self._held(use, sums)):
                    into.add_(other)
            else:
                self._pass(TAG + number, use, owner, sums, Tensor.add_)

    def copy_values(self) -> None:
        """Give each use that has a memory of its own the values that its owner's optimizer has written."""
        values = {stage: flat.values for stage, flat in self.flats.items()}
        for number, (use, owner) in enumerate(self.ties):
            if not self._one_memory(use, owner):
                self._pass(TAG + number, owner, use, values, Tensor.copy_)

    def _one_memory(self, use: Layout, owner: Layout) -> bool:
        return self.sharing and use.stage == owner.stage

    def _held(self, layout: Layout, vectors: Mapping[int, FlatVector]) -> Iterator[Tensor]:
        """What this rank sums or updates of a parameter, in parts; nothing where its stage is elsewhere."""
        if layout.stage in self.flats:
            flat = self.flats[layout.stage]
            for start, stop in intersect(flat.summed, [flat.layout.slot(layout.name)]):
                for at in range(start, stop, BUCKET):
                    yield vectors[layout.stage].view(at, min(at + BUCKET, stop))

    def _pass(
        self,
        tag: int,
        source: Layout,
        target: Layout,
        vectors: Mapping[int, FlatVector],
        put: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Send what is held of `source` to the rank of the same data coordinate that has `target`."""
        to, origin = target.stage % self.comm.size, source.stage % self.comm.size
        sent = [self.comm.isend(part, to, tag) for part in self._held(source, vectors)]
        for part in self._held(target, vectors):
            came = torch.empty_like(part)
            self.comm.irecv(came, origin, tag).wait()
            put(part, came)
        for request in sent:
            request.wait()
