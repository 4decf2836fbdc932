"""Parameters, gradients and moments of a stage as flat float32 vectors, of which a rank may hold a part."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm, SelfComm
from mpilm.config.schema import StatePart
from mpilm.ops.tree import Interval
from mpilm.parallel.flat_layout import ALIGNMENT, FlatLayout, ParamSlice, intersect_intervals
from mpilm.parallel.layout import Layouts, ParamLayout
from mpilm.parallel.offload import NO_OFFLOAD, Offload
from mpilm.parallel.plan import copy_name


class FlatVector:
    """The elements of a flat vector on this rank: sorted `intervals`, concatenated in `tensor`."""

    def __init__(self, intervals: Sequence[Interval], tensor: Tensor):
        self.intervals, self.tensor = list(intervals), tensor
        self._starts = [start for start, _ in self.intervals]
        self._offsets = list(accumulate((stop - start for start, stop in self.intervals), initial=0))

    def view(self, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flat vector; raise IndexError if they are not within one interval."""
        i = bisect_right(self._starts, start) - 1
        if i < 0 or stop > self.intervals[i][1]:
            raise IndexError(f"elements {start} to {stop} of a flat vector are not on this rank")
        at = self._offsets[i] + start - self._starts[i]
        return self.tensor[at : at + stop - start]


class FlatParameters:
    """Parameters of one pipeline stage on this rank, in float32. `comm`: the ranks that sum their gradients. `zero`: 0, every
    rank holds and updates everything; 1 and 2, a rank updates its shard; 3, it holds only its shard. A tied copy shares its
    owner's memory if both are on this rank in full, and is a copy otherwise. `copies`: number of modules that have each
    parameter, and a gradient of their own for it (parallel/expert.py)."""

    def __init__(
        self,
        layouts: Layouts,
        device: torch.device,
        zero: int = 0,
        comm: Comm | None = None,
        alignment: int = ALIGNMENT,
        copies: int = 1,
        offload: Offload = NO_OFFLOAD,
    ):
        self.offload = offload
        self.device, self.zero, self.comm, self.copies = device, zero, comm or SelfComm(), copies
        self.layout = FlatLayout(layouts.values(), alignment, per_module=zero >= 2, ranks=self.comm.size)
        everything, copies_end = [(0, self.layout.numel)], self.layout.tied_copies_numel
        self.shard = self.layout.shard(self.comm.rank)
        self.aliases_owner = zero < 3 and all(layout.tied_to in layouts for layout in layouts.values() if layout.tied_to)
        self.reduced = self.shard if zero else everything  # intervals whose summed gradient this rank has after a step
        self.owned = intersect_intervals(self.reduced, [(copies_end, self.layout.numel)])  # updated by this rank's optimizer
        self.unique = intersect_intervals(self.shard, [(copies_end, self.layout.numel)])  # over all ranks: every element once
        first = copies_end if self.aliases_owner else 0
        self.values = self.zeros("weights", self.shard if zero == 3 else [(first, self.layout.numel)])

    def zeros(self, part: StatePart, intervals: Sequence[Interval]) -> FlatVector:
        """Return a vector of zeros for this part of the state, where it is to lie."""
        numel = sum(stop - start for start, stop in intervals)
        return FlatVector(intervals, self.offload.zeros(part, numel, self.device))

    def parameter(self, name: str, vector: FlatVector | None = None) -> Tensor:
        """Return a full parameter, in its shape, as a view of the values or of another vector with this layout."""
        at, layout = self.layout.spans[name]
        if layout.tied_to and self.aliases_owner and vector is None:
            return self.parameter(layout.tied_to)
        return (vector or self.values).view(at, at + layout.numel).view(layout.shape)

    def install(self, model: nn.Module) -> None:
        """Make the parameters of `model`, built on the meta device, views of the values."""
        for name in self.layout.spans:
            self.set_parameter(model, name, self.parameter(name))

    def set_parameter(self, model: nn.Module, name: str, values: Tensor) -> None:
        """Replace the parameter `name` of `model`, and of its copies, by one with these values."""
        for copy in range(self.copies):
            set_parameter(model, copy_name(name, copy), values, self.layout.spans[name][1])

    def owned_slices(self, vector: FlatVector) -> dict[ParamSlice, Tensor]:
        """Return the parameter slices that this rank updates, as views of `vector`."""
        return {item: vector.view(at, at + item.numel) for item, at in self.layout.param_slices(self.owned).items()}


def set_parameter(model: nn.Module, name: str, values: Tensor, layout: ParamLayout) -> None:
    """Replace the parameter `name` of `model` by one with these values."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=not layout.frozen))
