"""The mesh of a run: this rank's coordinate, and a communicator along each axis."""

from __future__ import annotations

from collections.abc import Mapping

from mpilm.comm.activity import Activity
from mpilm.comm.base import Comm, SelfComm
from mpilm.mesh.shape import AXES, MeshShape


class Mesh:
    """The ranks of `world` in their shape. An axis of size 1 has a communicator like any other."""

    def __init__(self, shape: MeshShape, world: Comm, comms: Mapping[str, Comm], activity: Activity | None = None):
        self.shape, self.world, self._comms, self.activity = shape, world, comms, activity or Activity()
        self.rank = world.rank
        self.coordinate = shape.coordinate(world.rank)

    @classmethod
    def build(cls, shape: MeshShape, world: Comm, activity: Activity | None = None) -> Mesh:
        """Make the communicators, on all ranks in the order of AXES. Collective."""
        if shape.size != world.size:
            sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape.sizes))
            raise ValueError(f"{world}: a mesh of {sizes} is {shape.size} ranks, not {world.size}")
        return cls(shape, world, {axis: _along(axis, shape, world) for axis in AXES}, activity)

    def comm(self, axis: str) -> Comm:
        """The ranks that differ from this one along `axis` only, in the order of their index on it."""
        return self._comms[axis]

    def check(self, whether: bool) -> None:
        """Compare the ranks' calls, or trust them to be the same (see Traced). To be called by all ranks alike."""
        for comm in (self.world, *self._comms.values()):
            comm.check = whether


def _along(axis: str, shape: MeshShape, world: Comm) -> Comm:
    if getattr(shape, axis) == 1:  # on every rank alike: nobody waits in a split that others leave out
        return SelfComm(axis)
    return world.split(shape.color(world.rank, (axis,)), world.rank, axis)
