"""Coordinates of ranks on the axes of a mesh: pure arithmetic, for any number of ranks."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

AXES = ("pipeline", "data", "expert", "context", "tensor")
"""The last varies fastest: tensor ranks communicate most and are closest together."""


@dataclass(frozen=True)
class MeshShape:
    """The number of ranks along each axis."""

    pipeline: int = 1
    data: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in zip(AXES, self.sizes):
            if size < 1:
                raise ValueError(f"the {axis} axis has {size} ranks; the smallest is 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """Total number of ranks."""
        return math.prod(self.sizes)

    @property
    def replicas(self) -> int:
        """Number of ranks, or groups of ranks, that have microbatches of their own."""
        return self.data * self.expert

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the index of a rank along each axis."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.size} ranks")
        indices = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            indices.append(index)
        return dict(zip(AXES, reversed(indices)))

    def rank(self, coordinate: Mapping[str, int]) -> int:
        """Return the rank at a coordinate."""
        rank = 0
        for axis, size in zip(AXES, self.sizes):
            if not 0 <= coordinate[axis] < size:
                raise ValueError(f"index {coordinate[axis]} is out of range on the {axis} axis of {size} ranks")
            rank = rank * size + coordinate[axis]
        return rank

    def color(self, rank: int, axes: Collection[str]) -> int:
        """Return a number equal for ranks that differ along `axes` only: the lowest rank of the group."""
        return self.rank({axis: 0 if axis in axes else index for axis, index in self.coordinate(rank).items()})
