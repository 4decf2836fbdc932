"""Parameters, gradients and moments as flat vectors, of which a rank may hold a part."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from mpilm.parallel.layout import Layout
from mpilm.parallel.shard import ALIGNMENT, FlatLayout, Interval, Piece, intersect


class FlatVector:
    """The elements of a flat vector that this rank holds: sorted `intervals`, one after the other in `tensor`."""

    def __init__(self, intervals: Sequence[Interval], tensor: Tensor):
        self.intervals, self.tensor = list(intervals), tensor
        self._starts = [start for start, _ in self.intervals]
        self._places = list(accumulate((stop - start for start, stop in self.intervals), initial=0))

    @classmethod
    def zeros(cls, intervals: Sequence[Interval], device: torch.device) -> FlatVector:
        return cls(intervals, torch.zeros(sum(stop - start for start, stop in intervals), device=device))

    def view(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat vector; raises IndexError where they do not lie in one interval."""
        i = bisect_right(self._starts, start) - 1
        if i < 0 or stop > self.intervals[i][1]:
            raise IndexError(f"elements {start} to {stop} of a flat vector are not held here")
        at = self._places[i] + start - self._starts[i]
        return self.tensor[at : at + stop - start]


class FlatParameters:
    """The parameters of one pipeline stage, as far as this rank holds them, in float32.

    `rank` of `ranks` along the data axis. `zero`: 0, every rank holds and updates everything; 1 and 2, it updates its shard;
    3, it holds its shard only. A tied use shares its owner's memory where both are on this rank whole, and otherwise has a
    copy of it.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        device: torch.device,
        zero: int = 0,
        rank: int = 0,
        ranks: int = 1,
        alignment: int = ALIGNMENT,
    ):
        self.device, self.zero, self.rank, self.ranks = device, zero, rank, ranks
        self.layout = FlatLayout(layouts.values(), alignment, apart=zero >= 2, ranks=ranks)
        everything, uses_end = [(0, self.layout.numel)], self.layout.uses_numel
        self.shard = self.layout.shard(rank)
        self.shares = zero < 3 and all(layout.tied_to in layouts for layout in layouts.values() if layout.tied_to)
        self.summed = self.shard if zero else everything
        """Intervals of which this rank has the summed gradient at the end of a step."""
        self.updated = intersect(self.summed, [(uses_end, self.layout.numel)])
        """Intervals that this rank's optimizer updates."""
        self.counted = intersect(self.shard, [(uses_end, self.layout.numel)])
        """Intervals that together are every parameter once, over the data ranks."""
        first = uses_end if self.shares else 0
        self.values = FlatVector.zeros(self.shard if zero == 3 else [(first, self.layout.numel)], device)

    def parameter(self, name: str, vector: FlatVector | None = None) -> Tensor:
        """A whole parameter as a view of the values, or of another vector of this layout; in its shape."""
        at, layout = self.layout.slots[name]
        if layout.tied_to and self.shares and vector is None:
            return self.parameter(layout.tied_to)
        return (vector or self.values).view(at, at + layout.numel).view(layout.shape)

    def install(self, model: nn.Module) -> None:
        """Make the parameters of `model`, built on the meta device, views of the values."""
        for name in self.layout.slots:
            set_parameter(model, name, self.parameter(name), self.layout.slots[name][1])

    def pieces(self, vector: FlatVector) -> dict[Piece, Tensor]:
        """What this rank updates, as parts of parameters with their elements in `vector`."""
        found = self.layout.pieces(self.updated)
        return {piece: vector.view(at, at + piece.numel) for piece, at in found.items()}


def set_parameter(model: nn.Module, name: str, values: Tensor, layout: Layout) -> None:
    """Put a parameter with these values in the place of the one called `name`."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=not layout.frozen))
