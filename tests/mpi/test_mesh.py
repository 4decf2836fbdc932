"""Mesh communicators on real MPI, in every shape that these ranks allow."""

import itertools

import torch

from mpilm.comm.base import Comm
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import AXES, MeshShape


def test_mesh_of_every_shape_connects_its_axes(world: Comm) -> None:
    divisors = [k for k in range(1, world.size + 1) if world.size % k == 0]
    shapes = [MeshShape(*sizes) for sizes in itertools.product(divisors, repeat=len(AXES))]
    for shape in (shape for shape in shapes if shape.size == world.size):
        mesh = Mesh.build(shape, world)
        x = torch.ones(3)
        for axis in AXES:
            comm = mesh.comm(axis)
            assert (comm.size, comm.rank) == (getattr(shape, axis), mesh.coordinate[axis])
            comm.all_reduce(x)
            received = torch.empty(1, dtype=torch.int64)
            send = comm.isend(torch.tensor([world.rank]), (comm.rank + 1) % comm.size)
            comm.irecv(received, (comm.rank - 1) % comm.size).wait()
            send.wait()
            previous = {**mesh.coordinate, axis: (mesh.coordinate[axis] - 1) % comm.size}
            assert received.item() == shape.rank(previous)
        assert x.tolist() == [world.size] * 3
