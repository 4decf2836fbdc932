"""The mesh of a run: this rank's coordinate, and a communicator for each set of axes in use."""

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.mesh.shape import AXES, MeshShape

AXIS_SETS = (
    *((axis,) for axis in AXES),
    ("data", "expert"),
    ("data", "context"),
    ("data", "expert", "context"),
    ("data", "context", "tensor"),
    ("data", "expert", "context", "tensor"),
    ("pipeline", "tensor"),
)
"""Sets of axes with a communicator, in the order in which all ranks create them. Gradients are reduced, and ZeRO shards, over
data, context and, unless the parameters are those of experts, expert; parameters that are not cut are replicated over tensor
too."""


class Mesh:
    """The ranks of `world` arranged in `shape`. An axis of size 1 has a communicator like any other. The constructor creates
    the communicators, on all ranks in the order of AXIS_SETS. Collective."""

    def __init__(self, shape: MeshShape, world: Comm, recorder: FlightRecorder | None = None):
        if shape.size != world.size:
            sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape.sizes))
            raise ValueError(f"{world}: a mesh of {sizes} is {shape.size} ranks, not {world.size}")
        self.shape, self.world, self.recorder = shape, world, recorder or FlightRecorder()
        self.rank, self.coordinate = world.rank, shape.coordinate(world.rank)
        self._comms: dict[tuple[str, ...], Comm] = {}
        for axes in AXIS_SETS:
            used = tuple(axis for axis in axes if getattr(shape, axis) > 1)
            if used in self._comms:
                self._comms[axes] = self._comms[used]  # the other axes have one rank each
            elif not used:  # on all ranks alike, so no rank waits in a split that others skip
                self._comms[axes] = SelfComm("+".join(axes))
            else:
                self._comms[axes] = world.split(shape.color(world.rank, axes), world.rank, "+".join(axes))

    def comm(self, *axes: str) -> Comm:
        """Return the communicator of the ranks that differ from this one along `axes` only, in world order."""
        return self._comms[axes]

    def check_calls(self, enabled: bool) -> None:
        """Let every communicator compare the ranks' calls, or stop it (see InstrumentedComm). Call on all ranks alike."""
        self.world.checks_calls = enabled  # those of the axes, and those that are made from them, follow
