"""The table of parameters, and parameters as views of one buffer."""

import pytest
import torch
from text import TINY, tiny
from torch import nn

from mpilm.model.llama import TIED, Llama
from mpilm.parallel.flat import ALIGNMENT, FlatLayout, FlatParameters
from mpilm.parallel.layout import Layout, owned, resolve
from mpilm.trainer.build import build_model

SHAPES = {"embed": (5, 3), "norm": (3,), "mlp": (7, 3), "head": (5, 3)}
CPU = torch.device("cpu")


def test_resolve_says_what_decays_and_what_is_tied():
    table = resolve(SHAPES, {"head": "embed"})
    assert list(table) == list(SHAPES)
    assert {name: layout.decays for name, layout in table.items()} == {"embed": True, "norm": False, "mlp": True, "head": True}
    assert table["head"] == Layout("head", (5, 3), ("data",), True, "embed")
    assert [layout.name for layout in owned(table)] == ["embed", "norm", "mlp"]
    assert [layout.numel for layout in owned(table)] == [15, 3, 21]


@pytest.mark.parametrize("tied", [{"head": "none"}, {"none": "embed"}, {"head": "norm"}])
def test_impossible_ties_are_refused(tied):
    with pytest.raises(ValueError, match="cannot be tied to"):
        resolve(SHAPES, tied)


def test_every_offset_is_aligned_and_nothing_overlaps():
    flat = FlatLayout(resolve(SHAPES, {}).values())
    buffer = torch.zeros(flat.numel)
    views = flat.views(buffer)
    for number, (name, (at, layout)) in enumerate(flat.slots.items(), start=1):
        assert at % ALIGNMENT == 0
        assert views[name].shape == layout.shape
        assert views[name].data_ptr() == buffer.data_ptr() + 4 * at
        assert not views[name].any()  # what was written to the others is not here
        views[name].fill_(number)
    assert buffer.count_nonzero() == sum(layout.numel for _, layout in flat.slots.values())
    assert flat.numel == 16 + 16 + 32 + 16


def test_flat_parameters_lie_in_the_order_of_backward_tied_ones_first():
    flat = FlatParameters(resolve(SHAPES, {"head": "embed"}), CPU)
    assert list(flat.gradients.slots) == ["head", "mlp", "norm", "embed"]
    assert list(flat.owned.slots) == ["mlp", "norm", "embed"]
    assert flat.tied_numel == 16
    assert flat.new_gradient().numel() == flat.values.numel() + 16


def test_a_tied_gradient_is_added_to_its_owners():
    flat = FlatParameters(resolve(SHAPES, {"head": "embed"}), CPU)
    gradient = flat.new_gradient()
    views = flat.gradients.views(gradient)
    for number, view in enumerate(views.values()):
        view.fill_(10.0**number)
    own = flat.add_tied(gradient)
    assert own.data_ptr() == gradient.data_ptr() + 4 * 16
    summed = flat.owned.views(own)
    assert {name: set(view.flatten().tolist()) for name, view in summed.items()} == {
        "mlp": {10.0}, "norm": {100.0}, "embed": {1001.0},
    }  # fmt: skip


@pytest.mark.parametrize("tie", [True, False])
def test_installed_parameters_are_views_of_the_buffer(tie):
    model, flat = build_model(tiny("", "", model__tie_embeddings=tie).model, 11, CPU)
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        assert list(parameters) == [name for name, _ in Llama(tiny("", "").model, 11).named_parameters()]
    flat.values.fill_(0.5)
    for name, parameter in parameters.items():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0
        assert parameter.untyped_storage().data_ptr() == flat.values.untyped_storage().data_ptr()
        assert (parameter == 0.5).all(), name
    shared = parameters["head.weight"].data_ptr() == parameters["embed.weight"].data_ptr()
    assert shared == tie
    assert parameters["head.weight"] is not parameters["embed.weight"]  # each use has a gradient of its own
    assert flat.tied == (TIED if tie else {})


def test_only_matrices_decay():
    _, flat = build_model(tiny("", "").model, 11, CPU)
    decaying = {name for name, (_, layout) in flat.owned.slots.items() if layout.decays}
    assert {name for name in flat.by_name if name not in decaying} == {
        name for name in flat.by_name if name.endswith("norm.weight")
    }
    assert len(decaying) == 1 + 7 * TINY.model.n_layers
