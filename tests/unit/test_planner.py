"""Predictions against closed forms on machines of one rate, the search, and the machine file."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig, resolve_config
from mpilm.config.settings import override
from mpilm.errors import ConfigError, FileError
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import attention_flops_per_token, block_matrices, flops_per_token, parameter_count, stage_numel
from mpilm.parallel.layout_check import partition_by_cost
from mpilm.parallel.pipeline.schedules import analytic_bubble
from mpilm.planner.command import explain_scaling, growth_rows, plot_scaling, show_ranking, show_scaling
from mpilm.planner.cost import block_s, compute_s, simulated_s, step_time
from mpilm.planner.layout import PlacedLayout
from mpilm.planner.profile import interpolate, interpolate2d, read_profile, write_profile
from mpilm.planner.search import PlannedJob, search, to_flags
from tests.machines import RATE, flat, machine, network

SHAPE = ModelConfig(n_layers=8, n_heads=4, n_kv_heads=1, d_model=64, context_length=64)
VOCAB_SIZE = 1  # so small that embedding and head weigh nothing
TRAIN = TrainConfig(global_batch=32, micro_batch=1)


def job(ranks_per_node=2, on_machine=None, **changes):
    config = resolve_config(override(Config(model=SHAPE, train=TRAIN), **changes))
    return PlannedJob(config, VOCAB_SIZE, on_machine or machine(ranks_per_node))


def placed(ranks, on_machine=None, **parallel):
    config = resolve_config(Config(model=SHAPE, train=TRAIN, parallel=ParallelConfig(**parallel)))
    pipeline = config.parallel.pipeline
    shape, cut = MeshShape(pipeline=pipeline, data=ranks // pipeline), partition_by_cost(config, VOCAB_SIZE)
    return PlacedLayout(config, VOCAB_SIZE, on_machine or machine(ranks), shape, ranks, cut)


def changed(layout, **changes):
    return replace(layout, config=override(layout.config, **changes))


# Curves.


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6), st.floats(1.0, 1e7))
def test_interpolate_between_points_stays_between_values(values, size):
    curve = tuple((10.0**i, value) for i, value in enumerate(values))
    assert min(values) * (1 - 1e-9) <= interpolate(curve, size) <= max(values) * (1 + 1e-9)
    assert all(interpolate(curve, x) == pytest.approx(y) for x, y in curve)
    assert (interpolate(curve, 0.1), interpolate(curve, 1e9)) == (values[0], values[-1])


def test_interpolate_power_law_is_exact():
    curve = ((4.0, 2.0 * 4.0**-0.5), (4096.0, 2.0 * 4096.0**-0.5))
    assert interpolate(curve, 100.0) == pytest.approx(2.0 * 100.0**-0.5)
    surface = ((1.0, curve), (100.0, tuple((x, 10 * y) for x, y in curve)))
    assert interpolate2d(surface, 10.0, 100.0) == pytest.approx(math.sqrt(10) * 2.0 * 100.0**-0.5)


# Steps.


def test_step_time_of_one_rank_is_that_of_all_operations():
    time, config = step_time(placed(1)), placed(1).config
    assert time.compute_s == pytest.approx(32 * 64 * flops_per_token(config.model, VOCAB_SIZE) * RATE, rel=1e-9)
    assert time.total_s == pytest.approx(time.compute_s, rel=1e-9)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 16), (8, 4), (32, 1), (3, 11)])
def test_step_time_of_replicas_is_that_of_the_fullest(ranks, microbatches):
    assert step_time(placed(ranks)).total_s == pytest.approx(step_time(placed(1)).total_s * microbatches / 32)


@pytest.mark.parametrize(
    ("schedule", "pipeline", "chunks"),
    [("gpipe", 2, 1), ("1f1b", 4, 1), ("1f1b", 8, 1), ("interleaved", 2, 2), ("interleaved", 4, 2)],
)
def test_step_time_of_even_stages_has_the_bubble_of_the_formula(schedule, pipeline, chunks):
    time = step_time(placed(pipeline, pipeline=pipeline, schedule=schedule, chunks=chunks))
    assert time.bubble_s / time.total_s == pytest.approx(analytic_bubble(schedule, pipeline, chunks, 32), abs=0.002)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("count", [32, 48, 44])
def test_step_time_of_many_microbatches_is_as_simulated(schedule, count):
    chunks = 2 if schedule == "interleaved" else 1
    layout = changed(placed(4, pipeline=4, schedule=schedule, chunks=chunks), train__global_batch=count)
    assert step_time(layout).total_s == pytest.approx(simulated_s(layout, compute_s(layout), count), rel=1e-9)


def test_step_time_with_recomputation_has_another_forward():
    again = changed(placed(1), train__recompute="block")
    assert step_time(again).compute_s == pytest.approx(4 / 3 * step_time(placed(1)).compute_s, rel=1e-3)


def test_block_s_weight_gradients_are_half_of_matrix_backward():
    model = placed(1).config.model
    products_s = 64 * 2 * sum(a * b for a, b, _ in block_matrices(model)) * RATE
    _, backward, weights = block_s(placed(1))
    assert weights == pytest.approx(products_s)
    assert backward == pytest.approx(2 * products_s + 64 * attention_flops_per_token(model) * 2 / 3 * RATE)


def test_step_time_with_another_share_of_the_cores_scales():
    assert step_time(placed(8, machine(2))).compute_s == pytest.approx(4 * step_time(placed(8)).compute_s)
    roomy = replace(placed(2, machine(8)), ranks_per_node=2)  # eight were measured: each now has four times the cores
    assert step_time(roomy).compute_s == pytest.approx(step_time(placed(2)).compute_s / 4)


# Messages.

PER_ELEMENT = 1e-9


def elements_sent(layout):
    return step_time(layout).communication_s / PER_ELEMENT


def gradient_elements():
    model = placed(1).config.model
    return parameter_count(model, VOCAB_SIZE) + VOCAB_SIZE * model.d_model  # a tied matrix has two gradients


@pytest.mark.parametrize(
    ("zero", "passes"),
    [
        (0, 2),  # the sums of all slices, gathered
        (1, 2),  # the sums of one slice; the weights gathered
        (2, 8 + 1),  # a sum for each round of microbatches
        (3, 8 * 3),  # and the weights gathered before each forward and backward
    ],
)
def test_step_time_by_messages_counts_elements(zero, passes):
    rates = flat(PER_ELEMENT)
    sending = machine(4, within=network(4, exchange=rates, gather=rates, shared=()))
    assert elements_sent(placed(4, sending, zero=zero)) == pytest.approx(passes * 3 / 4 * gradient_elements(), rel=1e-6)


def test_step_time_in_shared_memory_counts_reads_and_writes():
    shared, silent = (machine(4, within=network(4, shared=flat(PER_ELEMENT), gather=flat(1e-30))) for _ in range(2))
    assert elements_sent(placed(4, shared)) == pytest.approx(gradient_elements(), rel=1e-6)
    reduced = gradient_elements() * 1.25 / 2.75  # each rank reads a slice of all, and none all slices
    assert elements_sent(placed(4, shared, zero=1)) == pytest.approx(reduced, rel=1e-6)
    assert elements_sent(placed(4, silent, reduce="messages")) < 1


@pytest.mark.parametrize(("recompute", "more"), [("none", 16 + 1), ("block", 32)])
def test_step_time_of_tensor_ranks_counts_gathers_and_exchanges(recompute, more):
    """32 microbatches; 8 blocks of two layers that gather and exchange forward and backward; the ends of the model."""
    sending = machine(2, within=network(2, exchange=flat(PER_ELEMENT), gather=flat(PER_ELEMENT)))
    layout = changed(placed(2, sending, tensor=2), model__n_kv_heads=4, train__recompute=recompute)
    layout = replace(layout, shape=MeshShape(data=1, tensor=2))
    assert elements_sent(layout) == pytest.approx(32 * (4 * 16 + 4 + more) * 64 * 64 / 2, rel=1e-6)
    alone = step_time(changed(placed(1), model__n_kv_heads=4)).compute_s
    matrices, again = step_time(layout).compute_s / alone, {"none": 1, "block": 4 / 3}[recompute]
    assert matrices == pytest.approx(again / 2, rel=0.01)


def test_step_time_of_context_ranks_counts_keys_and_values_and_a_reduction_in_each_round():
    sending = machine(2, within=network(2, exchange=flat(PER_ELEMENT), gather=flat(PER_ELEMENT)))
    layout = changed(placed(2, sending, context=2), model__n_kv_heads=4)
    layout = replace(layout, shape=MeshShape(data=1, context=2))
    of_heads = 32 * 8 * 2 * 4 * 64 * 64 / 2 / 2  # 32 microbatches, 8 blocks, forward and backward; half of the tokens
    of_gradients = 32 * (gradient_elements() + 8 * 2 * 3 * 16 * 64) / 2  # with 4 heads of keys and values, not 1
    assert elements_sent(layout) == pytest.approx(of_heads + of_gradients, rel=0.02)
    alone = step_time(changed(placed(1), model__n_kv_heads=4)).compute_s
    assert step_time(layout).compute_s / alone == pytest.approx(1 / 2, rel=0.05)


def test_step_time_of_expert_ranks_counts_tokens_and_the_gradients_of_each_round():
    sending = machine(2, within=network(2, exchange=flat(PER_ELEMENT), gather=flat(PER_ELEMENT)))
    changes = {"model__arch": "mixtral", "model__n_experts": 4, "model__d_ff": 96}
    layout = replace(changed(placed(2, sending, expert=2), **changes), shape=MeshShape(data=1, expert=2))
    of_tokens = 16 * 8 * 4 * 2 * 64 * 64 / 2  # 16 microbatches a rank, 8 blocks, there and back, in both directions, 2 experts
    experts = 8 * 4 * 3 * 64 * 96
    whole = stage_numel(layout.config.model, layout.vocab_size, 8)
    assert layout.numel(0) == whole - experts / 2
    assert elements_sent(layout) == pytest.approx(of_tokens + 16 * (whole - experts) / 2, rel=1e-6)
    alone = step_time(changed(placed(1), **changes)).compute_s
    assert step_time(layout).compute_s / alone == pytest.approx(1 / 2, rel=0.05)


def test_search_divides_experts():
    mixture = job(4, model__arch="mixtral", model__n_experts=4)
    assert {each.config.parallel.expert for each in search(mixture, 4)[0]} == {1, 2, 4}
    assert {each.config.parallel.expert for each in search(job(4), 4)[0]} == {1}


def test_search_divides_long_sequences():
    long = job(4, model__context_length=8192, train__global_batch=2)
    assert {each.config.parallel.context for each in search(long, 4)[0]} == {1, 2, 4}
    assert {each.config.parallel.context for each in search(job(4), 4)[0]} == {1}


def test_step_time_over_nodes_uses_the_network_between_them():
    slow = network(8, exchange=flat(PER_ELEMENT), gather=flat(PER_ELEMENT), shared=())
    layout = replace(placed(8, machine(4, across=slow), reduce="messages"), ranks_per_node=4)
    assert not layout.has_replicas_on_one_node
    assert elements_sent(layout) == pytest.approx(2 * 7 / 8 * gradient_elements(), rel=1e-6)
    shared = changed(layout, parallel__reduce="shared-memory")  # each node sends once
    assert elements_sent(shared) == pytest.approx(2 * 1 / 2 * gradient_elements() / 4 * 7 / 4, rel=1e-6)
    pipeline = replace(changed(layout, parallel__pipeline=2), shape=MeshShape(pipeline=2, data=4), cut=(4, 4))
    assert pipeline.has_replicas_on_one_node  # only activations travel between nodes
    assert elements_sent(pipeline) < 1


def test_step_time_of_a_pipeline_includes_transfers():
    step_s = step_time(placed(2, pipeline=2)).total_s
    slow = machine(2, within=network(2, latency_s=step_s))
    assert step_time(placed(2, slow, pipeline=2)).total_s > 2 * step_s


@pytest.mark.parametrize(("ranks_per_node", "expected"), [(1, 1), (2, 2), (3, 1), (4, 4), (5, 1), (8, 8), (16, 8)])
def test_replicas_sharing_memory_need_equal_nodes(ranks_per_node, expected):
    assert replace(placed(8), ranks_per_node=ranks_per_node).replicas_sharing_memory == expected


# The search.


def test_search_orders_by_time_then_simplicity():
    candidates, _ = search(job(4), 4)
    assert [each.time.total_s for each in candidates[1:]] == sorted(each.time.total_s for each in candidates[1:])
    assert candidates[0].label == "data 4, pipeline 1, zero 0"
    assert to_flags(candidates[0]) == "no settings: the default layout"
    slow = machine(4, within=network(4, exchange=flat(1e-3), gather=flat(1e-3), shared=()))
    assert search(job(4, slow), 4)[0][0].config.parallel.pipeline == 4


def test_search_keeps_fixed_settings():
    candidates, rejected = search(job(4, parallel__pipeline=2, parallel__zero=1), 4)
    assert {(each.config.parallel.pipeline, each.config.parallel.zero) for each in candidates} == {(2, 1)}
    assert {each.config.parallel.schedule for each in candidates} == {"1f1b", "gpipe", "interleaved", "zero-bubble"}
    assert not [label for label in rejected if "zero 0" in label]


def test_search_divides_matrices_within_a_node_and_as_the_model_admits():
    def tensor_sizes(job, ranks):
        return {each.config.parallel.tensor for each in search(job, ranks)[0]}

    assert tensor_sizes(job(4), 4) == {1}  # one head of keys and values
    assert tensor_sizes(job(4, model__n_kv_heads=4), 4) == {1, 2, 4}
    assert tensor_sizes(job(2, model__n_kv_heads=4), 4) == {1, 2}  # ranks of a node
    assert tensor_sizes(job(4, model__n_kv_heads=4, model__tensor_parts=2), 4) == {1, 2}
    assert tensor_sizes(job(4, model__n_kv_heads=4, parallel__tensor=4), 4) == {4}
    best = search(job(4, model__n_kv_heads=4, train__global_batch=1), 4)[0][0]
    assert (best.label, to_flags(best)) == ("data 1, pipeline 1, tensor 4, zero 0", "--parallel.tensor 4")


def test_search_covers_every_pipeline_or_gives_the_reason():
    candidates, rejected = search(job(16), 16)
    assert {each.config.parallel.pipeline for each in candidates} == {1, 2, 4, 8}
    assert "each stage needs a layer" in rejected["data 1, pipeline 16, 1f1b, zero 0"]


def test_search_without_memory_recomputes_or_rejects():
    roomy = search(job(2), 2)[0]
    assert all(each.config.train.recompute == "none" for each in roomy)
    most = max(each.memory_bytes for each in roomy)
    candidates, rejected = search(job(2, machine(2, memory_bytes=int(2 * (most - 1) / 0.95))), 2)
    assert all(each.memory_bytes < most for each in candidates)
    assert any("a rank needs" in reason and "MiB and has" in reason for reason in rejected.values())
    assert any(each.config.train.recompute == "block" for each in candidates)


def test_search_without_a_layout_raises_with_reasons():
    with pytest.raises(ConfigError, match=r"(?s)no layout of 512 ranks works:\n.* \(and \d+ more\): .*make the batch 512"):
        search(job(2), 512)


# Text.


def best_layouts(planned, counts):
    return [search(planned, ranks)[0][0] for ranks in counts]


def test_explain_scaling_names_what_limits():
    first, *_ = explain_scaling(best_layouts(job(1, machine(1, step_s=0.02)), [1, 2, 4, 8, 16, 32]))
    assert "the speed grows" in first
    assert "costs that ranks cannot share take" in first
    assert explain_scaling(best_layouts(job(1), [1, 2, 4])) == [
        "every rank up to 4 is worth having: it is 100% as fast as with 1"
    ]
    uneven = explain_scaling(best_layouts(job(64, train__global_batch=24, model__n_layers=1), [12, 20]))
    assert any("24 microbatches do not divide evenly over 20 replicas" in line for line in uneven)


def test_show_scaling_skips_impossible_numbers():
    lines = show_scaling(job(64), [1, 2, 512], 0.0)
    assert any(line.startswith("no layout of 512 ranks works") for line in lines)
    with pytest.raises(ConfigError, match="no layout of 512 ranks works"):
        show_scaling(job(64), [512], 0.0)


def test_show_ranking_of_many_ranks_lists_growing_costs(tmp_path):
    wide = Config(model=replace(SHAPE, d_model=512), train=TrainConfig(global_batch=200_000, micro_batch=1))
    large = PlannedJob(resolve_config(wide), 32_000, machine(32, across=network(64)))
    assert "costs that grow with the job, for 100,000 ranks:" in show_ranking(large, 100_000, 5, 1e12)
    rows = growth_rows(replace(placed(8), shape=MeshShape(data=100_000)))
    assert {row[0]: row[2] for row in rows}["hops of a small all-reduce"] == "17"
    plot_scaling(large, best_layouts(large, [1000, 2000]), str(tmp_path / "curve.svg"))
    assert (tmp_path / "curve.svg").read_text().count("<path") > 5


# The file.


def test_profile_round_trips_through_its_file(tmp_path):
    before = machine(4, across=network(8, latency_s=2.5e-5), step_s=0.0015)
    write_profile(tmp_path / "m.json", before)
    assert replace(read_profile(str(tmp_path / "m.json")), source=before.source) == before
    assert all(line.startswith(' "') for line in (tmp_path / "m.json").read_text().splitlines()[1:-1])  # a line for each key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("within__bandwidth", 0, "within.bandwidth is 0, not a number above zero"),
        ("within__exchange", [[1, -1]], "within.exchange[0][1] is -1"),
        ("within__exchange", [[1]], "within.exchange[0] has 1 entries, not 2"),
        ("within__exchange", 1, "within.exchange is not a list"),
        ("cores", None, "cores is missing"),
        ("cores", "two", "cores is 'two'"),
        ("cores", 1.5, "cores is 1.5, not a whole number above zero"),
        ("step_s", 10**400, "not a number above zero"),
        ("within__exchange", [[2, 1], [2, 1]], "within.exchange must hold entries of rising size"),
        ("memory", [], "memory must hold entries"),
        ("within", 3, "within is not a table"),
        ("mpilm", "0.0.9", "mpilm 0.0.9 made it"),
        ("format", 0, "not a machine profile of format 1"),
    ],
)
def test_read_profile_of_a_wrong_file_names_the_key(tmp_path, key, value, message):
    write_profile(tmp_path / "m.json", machine())
    content = json.loads((tmp_path / "m.json").read_text())
    *tables, last = key.split("__")
    part = content[tables[0]] if tables else content
    part[last] = value
    if value is None:
        del part[last]
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(FileError) as caught:
        read_profile(str(tmp_path / "m.json"))
    assert message in str(caught.value)
    assert "--calibrate" in str(caught.value)


def test_read_profile_without_a_file_or_json_says_how_to_make_one(tmp_path):
    with pytest.raises(FileError, match="cannot be used: No such file or directory; measure this machine: mpirun"):
        read_profile(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("cores: 2")
    with pytest.raises(FileError, match="cannot be used: it is not JSON: Expecting value"):
        read_profile(str(tmp_path / "text.json"))
