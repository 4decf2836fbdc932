"""Predictions against what ranks hold, and the layout that ranks choose by them."""

from dataclasses import replace

import pytest
from machines import machine
from runs import build_train_model, layout, small_config, train_to_end
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.check import check_config
from mpilm.config.schema import TrainConfig, resolve_config
from mpilm.config.settings import override
from mpilm.engine.hardware import detect_hardware, software_versions
from mpilm.parallel.layout_check import resolve_mesh_shape
from mpilm.planner.layout import PlacedLayout
from mpilm.planner.memory import persistent_bytes
from mpilm.planner.profile import write_profile
from mpilm.trainer.auto_layout import choose_layout
from mpilm.verification.layouts import VOCAB_SIZE

WIDE = {"model__d_model": 128, "model__n_layers": 4, "model__n_kv_heads": 2, "train__global_batch": 16}


@pytest.mark.parametrize("changes", [{}, {"model__tie_embeddings": False, "train__optimizer": "sgd"}, {"model__arch": "gpt2"}])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, layout()), (3, layout()), (4, layout(zero=1)), (4, layout(zero=2)), (3, layout(zero=2)), (4, layout(zero=3)),
        (2, layout(2)), (4, layout(2, "interleaved", 1)), (4, layout(2, zero=3)), (8, layout(4, zero=2)),
        (4, layout(zero=0, reduce="messages")), (3, layout(zero=0, reduce="messages")),
        (2, layout(tensor=2)), (4, layout(2, tensor=2)), (4, layout(tensor=2, zero=1)), (8, layout(tensor=2, zero=2)),
        (4, layout(tensor=2, zero=3)), (8, layout(tensor=2, reduce="messages")),
        (2, layout(context=2)), (4, layout(context=2, zero=1)), (4, layout(context=2, zero=3)), (4, layout(2, context=2)),
    ],
)  # fmt: skip
def test_persistent_bytes_are_those_that_ranks_hold(size, layout, changes):
    wrong, _ = mispredicted(resolve_config(small_config(**WIDE, **layout, **changes)), size, size)
    assert wrong == []


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, layout()), (2, layout(expert=2)), (4, layout(expert=2, zero=1)), (4, layout(expert=2, zero=2)),
        (4, layout(expert=2, zero=3)), (4, layout(expert=4, zero=3)), (4, layout(2, expert=2)), (4, layout(expert=2, tensor=2)),
        (4, layout(expert=2, context=2, zero=3)),
    ],
)  # fmt: skip
def test_persistent_bytes_of_divided_experts_are_those_that_ranks_hold(size, layout):
    mixture = {"model__arch": "mixtral", "model__n_experts": 8}
    wrong, _ = mispredicted(resolve_config(small_config(**WIDE, **mixture, **layout)), size, size)
    assert wrong == []


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(
    ("size", "ranks_per_node", "batch"), [(4, 2, 16), (4, 2, 12), (6, 2, 16), (6, 3, 11), (8, 4, 16), (4, 1, 16), (3, 1, 11)]
)
def test_persistent_bytes_of_several_nodes_include_the_exchange(size, ranks_per_node, batch, zero, wire):
    config = resolve_config(
        small_config(**WIDE | {"train__global_batch": batch}, **layout(zero=zero, reduce="shared-memory", wire_dtype=wire))
    )
    wrong, exchange_bytes = mispredicted(config, size, ranks_per_node)
    assert wrong == []
    assert exchange_bytes > 500_000


def mispredicted(config, size, ranks_per_node):
    """Return (part, predicted, held) of all wrong predictions, and the most bytes that an exchange takes."""

    def body(comm):
        model = build_train_model(config, comm)
        shape = resolve_mesh_shape(config, comm.size)
        layout = PlacedLayout(config, VOCAB_SIZE, machine(ranks_per_node), shape, ranks_per_node, model.blocks_per_stage)
        return persistent_bytes(layout, list(model.stages)), model.memory_bytes()

    results = run_ranks(size, body, ranks_per_node=ranks_per_node)
    pairs = [(part, predicted[part], held[part]) for predicted, held in results for part in ("weights", "moments", "passing")]
    for part in ("gradients", "exchange"):  # predicted for the replica that needs most
        pairs.append((part, *(max(each[part] for each in side) for side in zip(*results))))
    return [pair for pair in pairs if pair[1] != pytest.approx(pair[2], rel=0.03, abs=40_000)], pairs[-1][2]


def profile_of_this_machine(**changes):
    names = software_versions(SelfComm("world"))
    return replace(machine(4), **{name: names[name] for name in ("torch", "processor")}, **changes)


def chosen(tmp_path, size, profile, config=None):
    write_profile(tmp_path / "machine.json", profile)
    config = override(config or resolve_config(small_config(**WIDE)), parallel__auto=str(tmp_path / "machine.json"))

    def body(comm):
        return choose_layout(config, VOCAB_SIZE, detect_hardware(TrainConfig(threads=1, device="cpu"), comm), comm)

    return run_ranks(size, body)


def test_choose_layout_takes_the_fastest_on_all_ranks(tmp_path):
    profile = profile_of_this_machine()
    (config, note), *others = chosen(tmp_path, 4, profile)
    assert all(other == (config, note) for other in others)
    assert (config.parallel.auto, config.parallel.pipeline, config.parallel.zero) == ("", 1, 0)
    assert "data 4, pipeline 1, zero 0; predicted step time" in note
    slow = replace(profile.within, exchange=((1.0, 1e-3),), gather=((1.0, 1e-3),), shared=())
    ((config, _), *_) = chosen(tmp_path, 4, replace(profile, within=slow))
    assert config.parallel.pipeline == 4


def test_choose_layout_divides_matrices_only_into_stated_parts(tmp_path):
    """The number of parts is not the planner's to choose: the result depends on it."""
    shape = {**WIDE, "model__n_heads": 4, "model__n_kv_heads": 4, "train__global_batch": 1}
    for parts, expected in ((0, 1), (4, 4)):
        config = resolve_config(small_config(**shape, model__tensor_parts=parts))
        ((config, _), *_) = chosen(tmp_path, 4, profile_of_this_machine(), config)
        assert (config.parallel.tensor, config.model.tensor_parts) == (expected, parts)


def test_train_with_a_chosen_layout_gives_the_same_bits(tmp_path):
    write_profile(tmp_path / "machine.json", profile_of_this_machine())
    tokens = write_tokens(tmp_path)
    alone = train_to_end(tiny_config(tokens, tmp_path / "alone"), 1)
    assert train_to_end(tiny_config(tokens, tmp_path / "chosen", parallel__auto=str(tmp_path / "machine.json")), 2) == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processor": "another"}, "was measured with processor another, but this machine has"),
        ({"device": "cuda"}, "was measured with device cuda, but this machine has cpu"),
        (
            {"memory_bytes": 1 << 20},
            r"--parallel.auto: no layout of 2 ranks works:\n  data 2, pipeline 1, zero 0: a rank needs",
        ),
    ],
)
def test_choose_layout_with_a_wrong_profile_raises(tmp_path, changes, message):
    with pytest.raises(CollectiveError, match=message):
        chosen(tmp_path, 2, replace(profile_of_this_machine(), **changes))


def test_choose_layout_with_other_settings_stays_valid(tmp_path):
    """Replicas that train independently have no ZeRO, however much faster it would be."""
    slow = replace(machine(4).memory[0], adamw=((1.0, 1e-3),))
    profile, config = (
        profile_of_this_machine(memory=(slow,)),
        resolve_config(small_config(**WIDE, checkpoint__every=0, run__eval_every=0)),
    )
    ((plain, _), *_) = chosen(tmp_path, 4, profile, config)
    assert plain.parallel.zero > 0
    for changes in ({"parallel__sync_every": 4}, {"parallel__powersgd_rank": 2}):
        ((found, _), *_) = chosen(tmp_path, 4, profile, override(config, **changes))
        check_config(found)
    with pytest.raises(CollectiveError, match="remove it or --model"):
        chosen(tmp_path, 2, profile, override(config, model__lora_rank=2))
