"""Tied parameters: one matrix with two uses, on two stages or one. Gradients go to the owner, values come back.

Each use has its own gradient, summed over all microbatches; then the sums are added, in the same order wherever the uses are.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.ops.tree import Interval
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import intersect_intervals
from mpilm.parallel.layout import FlatKey, Layouts, ParamLayout

FIRST_TAG = 1 << 14  # above the tags of activations
Vectors = Mapping[FlatKey, FlatVector]


class TiedParameters:
    """The ties of a model with these `layouts`. `flats`: of this rank's stages. Collective over `comm`, the pipeline axis."""

    def __init__(self, layouts: Layouts, flats: Mapping[FlatKey, FlatParameters], comm: Comm):
        self.comm, self.flats = comm, flats
        self.pairs = [(layout, layouts[layout.tied_to]) for layout in layouts.values() if layout.tied_to]
        self.intervals = {layout.name: self._own_intervals(layout) for pair in self.pairs for layout in pair}

    def add_gradients(self, sums: Vectors) -> None:
        """Add the summed gradient of each copy to that of its owner."""
        for tag, (copy, owner) in enumerate(self.pairs, FIRST_TAG):
            if self._is_alias(copy):
                for total, other in zip(self._local_parts(owner, sums), self._local_parts(copy, sums)):
                    total.add_(other)
            else:
                self._transfer(tag, copy, owner, sums, Tensor.add_)

    def copy_values(self) -> None:
        """Give each copy with memory of its own the values that its owner's optimizer has written."""
        values = {key: flat.values for key, flat in self.flats.items()}
        for tag, (copy, owner) in enumerate(self.pairs, FIRST_TAG):
            if not self._is_alias(copy):
                self._transfer(tag, owner, copy, values, Tensor.copy_)

    def _is_alias(self, copy: ParamLayout) -> bool:
        return copy.flat_key in self.flats and self.flats[copy.flat_key].aliases_owner

    def _own_intervals(self, layout: ParamLayout) -> list[Interval]:
        """Return the parts of a parameter's buckets that this rank reduces or updates; none if its stage is on another rank."""
        flat = self.flats.get(layout.flat_key)
        return [] if flat is None else intersect_intervals(flat.layout.group_of(layout.name).buckets, flat.reduced)

    def _local_parts(self, layout: ParamLayout, vectors: Vectors) -> Iterator[Tensor]:
        return (vectors[layout.flat_key].view(*interval) for interval in self.intervals[layout.name])

    def _transfer(
        self, tag: int, source: ParamLayout, target: ParamLayout, vectors: Vectors, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Send the parts of `source` to the rank with `target` that has the same coordinate on the other axes."""
        to, origin = target.stage % self.comm.size, source.stage % self.comm.size
        sends = [self.comm.isend(part, to, tag) for part in self._local_parts(source, vectors)]
        for part in self._local_parts(target, vectors):
            received = torch.empty_like(part)
            self.comm.irecv(received, origin, tag).wait()
            combine(part, received)
        for request in sends:
            request.wait()
