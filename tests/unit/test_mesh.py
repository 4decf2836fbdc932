"""Coordinates of ranks, and the communicators of a mesh, on thread ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import run_ranks

from mpilm.comm.base import Comm, SelfComm
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import AXES, MeshShape

shapes = st.builds(MeshShape, *(st.integers(1, 4) for _ in AXES))
SMALL = [MeshShape(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2)) if MeshShape(*sizes).size <= 8]


def test_coordinate_varies_fastest_along_tensor() -> None:
    shape = MeshShape(pipeline=2, data=3, context=1, tensor=2)
    places = [tuple(shape.coordinate(rank).values()) for rank in range(4)]
    assert places == [(0, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 1, 0, 0, 0), (0, 1, 0, 0, 1)]
    assert shape.coordinate(11) == {"pipeline": 1, "data": 2, "expert": 0, "context": 0, "tensor": 1}
    assert shape.size == 12


@given(shapes)
def test_rank_and_coordinate_are_inverse(shape: MeshShape) -> None:
    places = [shape.coordinate(rank) for rank in range(shape.size)]
    assert [shape.rank(place) for place in places] == list(range(shape.size))
    assert places == [dict(zip(AXES, place)) for place in itertools.product(*map(range, shape.sizes))]


@given(shapes, st.sets(st.sampled_from(AXES)))
def test_color_is_equal_for_ranks_that_differ_along_the_axes_only(shape: MeshShape, axes: set[str]) -> None:
    def rest(rank: int) -> list[int]:
        return [index for axis, index in shape.coordinate(rank).items() if axis not in axes]

    ranks = range(shape.size)
    for a, b in itertools.islice(itertools.product(ranks, ranks), 500):
        assert (shape.color(a, axes) == shape.color(b, axes)) == (rest(a) == rest(b))


def test_shape_refuses_empty_axes_and_unknown_places() -> None:
    with pytest.raises(ValueError, match="the data axis has 0 ranks"):
        MeshShape(data=0)
    with pytest.raises(ValueError, match="rank 4 is not in a mesh of 4 ranks"):
        MeshShape(data=4).coordinate(4)
    with pytest.raises(ValueError, match="index 2 is out of range on the tensor axis of 2 ranks"):
        MeshShape(tensor=2).rank({"pipeline": 0, "data": 0, "expert": 0, "context": 0, "tensor": 2})


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_mesh_has_a_communicator_for_each_axis(shape: MeshShape) -> None:
    def body(world: Comm) -> None:
        mesh = Mesh(shape, world)
        assert (mesh.world, mesh.rank, mesh.coordinate) == (world, world.rank, shape.coordinate(world.rank))
        for axis in AXES:
            comm = mesh.comm(axis)
            assert (comm.name, comm.size, comm.rank) == (axis, getattr(shape, axis), mesh.coordinate[axis])
            members = [r for r in range(world.size) if shape.color(r, (axis,)) == shape.color(world.rank, (axis,))]
            assert comm.all_gather_json(world.rank) == members
        x = torch.ones(3)
        for axis in AXES:  # the sum over all axes, one after the other, is the sum over the mesh
            mesh.comm(axis).all_reduce(x)
        assert x.tolist() == [shape.size] * 3

    run_ranks(shape.size, body)


def test_mesh_of_one_rank_has_axes_of_one() -> None:
    mesh = Mesh(MeshShape(), SelfComm("world"))
    assert [mesh.comm(axis).size for axis in AXES] == [1] * len(AXES)


def test_mesh_of_another_size_than_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="pipeline 2 x data 1 x expert 1 x context 1 x tensor 2 is 4 ranks, not 3"):
        run_ranks(3, lambda world: Mesh(MeshShape(pipeline=2, tensor=2), world))


def test_mesh_refuses_an_unknown_axis() -> None:
    with pytest.raises(KeyError, match="experts"):
        Mesh(MeshShape(), SelfComm("world")).comm("experts")
