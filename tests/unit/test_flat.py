"""Parameters as views of flat vectors, of which a rank may hold a part."""

import pytest
import torch
from runs import CPU, full_model, place
from text import tiny_config
from torch import nn

from mpilm.engine.pipelined import resolve_model_layouts
from mpilm.model.families import build_model
from mpilm.parallel.digests import read_sums, sum_bits
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ALIGNMENT, intersect_intervals
from mpilm.parallel.layout import resolve_layouts, select_stage

SHAPES = {"embed": (5, 3), "norm": (3,), "mlp": (7, 3), "head": (5, 3)}
TIED = {"head": "embed"}


def test_parameters_are_aligned_views_without_overlap():
    flat = FlatParameters(resolve_layouts(SHAPES, {}), CPU)
    buffer = flat.values.tensor
    for number, (name, (at, layout)) in enumerate(flat.layout.spans.items(), start=1):
        view = flat.parameter(name)
        assert at % ALIGNMENT == 0
        assert view.shape == layout.shape
        assert view.data_ptr() == buffer.data_ptr() + 4 * at
        assert not view.any()  # nothing written to the others is here
        view.fill_(number)
    assert buffer.count_nonzero() == sum(layout.numel for _, layout in flat.layout.spans.values())
    assert buffer.numel() == flat.layout.numel == 16 + 16 + 32 + 16


def test_tied_copy_on_the_owners_stage_aliases_its_value_but_not_its_gradient():
    flat = FlatParameters(resolve_layouts(SHAPES, TIED), CPU)
    assert flat.parameter("head").data_ptr() == flat.parameter("embed").data_ptr()
    assert flat.values.intervals == [(16, 80)]
    gradient = flat.zeros("gradients", flat.reduced)
    copy, owner = (flat.parameter(name, gradient) for name in ("head", "embed"))
    assert copy.shape == owner.shape == (5, 3)
    assert copy.data_ptr() == gradient.tensor.data_ptr()
    assert owner.data_ptr() == gradient.tensor.data_ptr() + 4 * 64


@pytest.mark.parametrize(("zero", "stages"), [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_tied_copy_is_separate_if_its_owner_is_sharded_or_on_another_stage(zero, stages):
    table = resolve_layouts(SHAPES, TIED, lambda name: int(stages == 2 and name in ("mlp", "head")))
    flat = FlatParameters(select_stage(table, stages - 1), CPU, zero)
    assert not flat.aliases_owner
    assert flat.values.intervals[0][0] == 0
    assert all(start >= flat.layout.tied_copies_numel for start, _ in flat.owned)  # the owner's optimizer updates it


def test_vector_of_some_intervals_returns_views_within_them():
    vector = FlatVector([(16, 48), (64, 80)], torch.arange(48.0))
    assert vector.view(16, 48).tolist() == list(range(32))
    assert vector.view(20, 22).tolist() == [4, 5]
    assert vector.view(64, 80).tolist() == list(range(32, 48))
    assert vector.view(70, 70).numel() == 0
    assert vector.view(64, 65).data_ptr() == vector.tensor.data_ptr() + 4 * 32


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (15, 17), (40, 49), (40, 66), (48, 64), (50, 52), (79, 81), (90, 91)])
def test_vector_of_some_intervals_refuses_views_outside(start, stop):
    with pytest.raises(IndexError, match=f"elements {start} to {stop} of a flat vector are not on this rank"):
        FlatVector([(16, 48), (64, 80)], torch.zeros(48)).view(start, stop)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_intervals_held_reduced_owned_and_unique_follow_zero(zero, ranks):
    table = resolve_layouts({**SHAPES, "wide": (40, 10)}, TIED)
    flats = [FlatParameters(table, CPU, zero, place(rank, ranks)) for rank in range(ranks)]
    copies, end = flats[0].layout.tied_copies_numel, flats[0].layout.numel
    everything = [(0, end)]
    for flat in flats:
        held = flat.shard if zero == 3 else intersect_intervals(everything, [(copies, end)])
        assert flat.values.intervals == held
        assert flat.values.tensor.numel() == sum(stop - start for start, stop in held)
        assert flat.reduced == (flat.shard if zero else everything)
        assert flat.owned == intersect_intervals(flat.reduced, [(copies, end)])
    unique = sorted(interval for flat in flats for interval in flat.unique)
    assert [i for start, stop in unique for i in range(start, stop)] == list(range(copies, end))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_owned_slices_are_views_of_what_the_rank_updates(zero):
    table = resolve_layouts({**SHAPES, "wide": (40, 10)}, TIED)
    owned = {name: layout.numel for name, layout in table.items() if not layout.tied_to}
    seen = {name: torch.zeros(numel) for name, numel in owned.items()}
    for rank in range(3):
        flat = FlatParameters(table, CPU, zero, place(rank, 3))
        vector = flat.zeros("gradients", flat.reduced)
        for item, view in flat.owned_slices(vector).items():
            assert view.untyped_storage().data_ptr() == vector.tensor.untyped_storage().data_ptr()
            assert view.shape == (item.numel,)
            seen[item.name][item.start : item.stop] += 1
    assert all((count == (1 if zero else 3)).all() for count in seen.values())


@pytest.mark.parametrize("tie", [True, False])
def test_installed_parameters_are_views_of_the_vector(tie):
    model, flat = full_model(tiny_config("", "", model__tie_embeddings=tie).model, 11, CPU)
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        assert list(parameters) == [name for name, _ in build_model(tiny_config("", "").model, 11).named_parameters()]
    flat.values.tensor.fill_(0.5)
    for name, parameter in parameters.items():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0
        assert parameter.untyped_storage().data_ptr() == flat.values.tensor.untyped_storage().data_ptr()
        assert (parameter == 0.5).all(), name
    shared = parameters["head.weight"].data_ptr() == parameters["embed.weight"].data_ptr()
    assert shared == tie
    assert parameters["head.weight"] is not parameters["embed.weight"]  # each has a gradient of its own
    assert flat.layout.spans["head.weight"][1].tied_to == ("embed.weight" if tie else None)


def test_stages_of_a_model_hold_all_its_parameters():
    shape = tiny_config("", "", model__n_layers=3).model
    table = resolve_model_layouts(shape, 11, (2, 1))
    stages = [FlatParameters(select_stage(table, stage), CPU) for stage in range(2)]
    assert [len(flat.layout.spans) for flat in stages] == [1 + 2 * 9, 9 + 2]
    assert {name for flat in stages for name in flat.layout.spans} == table.keys()


def test_sum_of_bits_changes_with_every_bit_and_is_the_sum_over_parts():
    def digest(*tensors):
        return sum(read_sums(sum_bits(tensors))) % 2**32

    for numel in (1, 5, 37):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        assert digest(x) == digest(*x.split(3))
        for bit in range(32 * numel):
            altered = x.clone()
            altered.view(torch.int32)[bit // 32] ^= (1 << bit % 32) - (2**32 if bit % 32 == 31 else 0)
            assert (digest(altered) - digest(x)) % 2**32 in (2 ** (bit % 32), 2**32 - 2 ** (bit % 32))
