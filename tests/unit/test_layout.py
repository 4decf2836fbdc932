"""The layout table: what decays, what is tied, and which stage has which parameters."""

import pytest
from text import TINY, tiny_config

from mpilm.engine.pipelined import resolve_model_layouts
from mpilm.parallel.layout import ParamLayout, resolve_layouts, select_owned, select_stage
from mpilm.parallel.plan import fsdp_unit, stage_of

SHAPES = {"embed": (5, 3), "norm": (3,), "mlp": (7, 3), "head": (5, 3)}


def test_layouts_name_what_decays_and_what_is_tied():
    table = resolve_layouts(SHAPES, {"head": "embed"})
    assert list(table) == list(SHAPES)
    assert {name: layout.decays for name, layout in table.items()} == {"embed": True, "norm": False, "mlp": True, "head": True}
    assert table["head"] == ParamLayout("head", (5, 3), tied_to="embed")
    assert table["embed"] == ParamLayout("embed", (5, 3), tied_copies=("head",))
    assert [layout.name for layout in select_owned(table)] == ["embed", "norm", "mlp"]
    assert [layout.numel for layout in select_owned(table)] == [15, 3, 21]


@pytest.mark.parametrize("tied", [{"head": "none"}, {"none": "embed"}, {"head": "norm"}])
def test_ties_of_unequal_or_missing_parameters_are_refused(tied):
    with pytest.raises(ValueError, match="cannot be tied to"):
        resolve_layouts(SHAPES, tied)


def test_stages_have_their_parameters_in_model_order():
    table = resolve_layouts(SHAPES, {"head": "embed"}, lambda name: int(name in ("mlp", "head")))
    assert [list(select_stage(table, stage)) for stage in range(3)] == [["embed", "norm"], ["mlp", "head"], []]
    assert select_stage(table, 1)["head"].tied_to == "embed"  # its owner is on another stage


@pytest.mark.parametrize("cut", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_blocks_follow_the_partition_with_embedding_first_and_head_last(cut):
    table = resolve_model_layouts(tiny_config("", "", model__n_layers=3).model, 11, cut)
    stage_of_block = [stage for stage, layers in enumerate(cut) for _ in range(layers)]
    for name, layout in table.items():
        if name.startswith("blocks."):
            assert layout.stage == stage_of_block[int(name.split(".")[1])]
    ends = {name: layout.stage for name, layout in table.items() if not name.startswith("blocks.")}
    assert ends == {"embed.weight": 0, "norm.weight": len(cut) - 1, "head.weight": len(cut) - 1}


def test_stage_of_a_block_follows_its_number():
    assert [stage_of(f"blocks.{i}", (2, 9)) for i in (1, 2, 10)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "unit"),
    [("embed.weight", "embed"), ("blocks.12.attn.q.weight", "blocks.12"), ("blocks.1.attn_norm.weight", "blocks.1"),
     ("head.weight", "head"), ("norm.weight", "norm")],
)  # fmt: skip
def test_fsdp_unit_is_a_block_or_a_module_outside_blocks(name, unit):
    assert fsdp_unit(name) == unit


def test_matrices_decay_and_vectors_do_not():
    table = resolve_model_layouts(tiny_config("", "").model, 11, (TINY.model.n_layers,))
    decaying = {layout.name for layout in select_owned(table) if layout.decays}
    assert {layout.name for layout in select_owned(table)} - decaying == {
        name for name in table if name.endswith("norm.weight")
    }
    assert len(decaying) == 1 + 7 * TINY.model.n_layers
