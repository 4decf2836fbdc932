"""What a step will take: against closed forms on machines of one rate, and what is refused."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.config import Config, Model, Parallel, Train, replaced, resolve
from mpilm.errors import ConfigError, FileError
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import attention_flops_per_token, block_matrices, flops_per_token, parameter_count
from mpilm.parallel.feasible import cut_by_cost
from mpilm.parallel.pipeline.schedules import analytic_bubble
from mpilm.planner import cost
from mpilm.planner.cost import Setting, step_time
from mpilm.planner.growth import growth
from mpilm.planner.machine import at, on, read, write
from mpilm.planner.scaling import curve, in_words
from mpilm.planner.search import Job, adopted, best, flags, search
from mpilm.planner.show import plot, ranking, scaling
from tests.machines import RATE, flat, machine, network

SHAPE = Model(n_layers=8, n_heads=4, d_model=64, context_length=64)
VOCABULARY = 1  # so small that the ends weigh nothing


def job(ranks_per_node=2, on_machine=None, **changes):
    config = replaced(Config(model=SHAPE, train=Train(global_batch=32, micro_batch=1)), **changes)
    return Job(resolve(config), VOCABULARY, on_machine or machine(ranks_per_node))


def setting(ranks, on_machine=None, **parallel):
    config = resolve(Config(model=SHAPE, train=Train(global_batch=32, micro_batch=1), parallel=Parallel(**parallel)))
    pipeline = config.parallel.pipeline
    shape = MeshShape(pipeline=pipeline, data=ranks // pipeline)
    return Setting(config, VOCABULARY, on_machine or machine(ranks), shape, ranks, cut_by_cost(config, VOCABULARY))


# Curves.


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6), st.floats(1.0, 1e7))
def test_a_curve_runs_between_its_points(values, size):
    curve_ = [(10.0**i, value) for i, value in enumerate(values)]
    found = at(curve_, size)
    assert min(values) * (1 - 1e-9) <= found <= max(values) * (1 + 1e-9)
    assert all(at(curve_, x) == pytest.approx(y) for x, y in curve_)
    assert at(curve_, 0.1) == values[0]
    assert at(curve_, 1e9) == values[-1]


def test_between_two_points_a_power_law_is_exact():
    curve_ = [(4.0, 2.0 * 4.0**-0.5), (4096.0, 2.0 * 4096.0**-0.5)]
    assert at(curve_, 100.0) == pytest.approx(2.0 * 100.0**-0.5)
    assert on([(1.0, curve_), (100.0, [(x, 10 * y) for x, y in curve_])], 10.0, 100.0) == pytest.approx(
        math.sqrt(10) * 2.0 * 100.0**-0.5
    )


# Steps.


def test_one_rank_computes_all_operations():
    said, config = step_time(setting(1)), setting(1).config
    operations = 32 * 64 * flops_per_token(config.model, VOCABULARY)
    assert said.compute_s == pytest.approx(operations * RATE, rel=1e-9)
    assert said.total_s == pytest.approx(said.compute_s, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 8, 32])
def test_replicas_share_the_microbatches(ranks):
    assert step_time(setting(ranks)).total_s == pytest.approx(step_time(setting(1)).total_s / ranks)


def test_uneven_replicas_wait_for_the_fullest():
    assert step_time(setting(3)).total_s == pytest.approx(step_time(setting(1)).total_s * 11 / 32)


@pytest.mark.parametrize(
    ("schedule", "pipeline", "chunks"),
    [("gpipe", 2, 1), ("1f1b", 4, 1), ("1f1b", 8, 1), ("interleaved", 2, 2), ("interleaved", 4, 2)],
)
def test_the_bubble_of_even_stages_is_that_of_the_formula(schedule, pipeline, chunks):
    said = step_time(setting(pipeline, pipeline=pipeline, schedule=schedule, chunks=chunks))
    assert said.bubble_s / said.total_s == pytest.approx(analytic_bubble(schedule, pipeline, chunks, 32), abs=0.002)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("count", [32, 48, 44])
def test_long_steps_are_prolonged_as_they_would_have_been_simulated(schedule, count):
    chunks = 2 if schedule == "interleaved" else 1
    where = setting(4, pipeline=4, schedule=schedule, chunks=chunks)
    where = dataclasses.replace(where, config=replaced(where.config, train__global_batch=count))
    whole = cost.simulated_s(where, count)
    assert sum(step_time(where).parts.values()) == pytest.approx(whole, rel=1e-9)


def test_recomputation_is_another_forward():
    where = setting(1)
    again = dataclasses.replace(where, config=replaced(where.config, train__recompute="block"))
    assert step_time(again).compute_s == pytest.approx(4 / 3 * step_time(where).compute_s, rel=1e-3)


def test_weight_gradients_are_half_of_what_matrices_take_in_backward():
    where = setting(1)
    operations = 64 * 2 * sum(a * b for a, b, _ in block_matrices(where.model))
    assert where.block["W"] == pytest.approx(operations * RATE)
    assert where.block["B"] == pytest.approx(2 * operations * RATE + 64 * attention_flops_per_token(where.model) * 2 / 3 * RATE)


def test_ranks_that_share_a_core_take_turns():
    crowded = setting(8, machine(2))
    assert step_time(crowded).compute_s == pytest.approx(4 * step_time(setting(8)).compute_s)
    roomy = dataclasses.replace(setting(2, machine(8)), ranks_per_node=2)  # of eight that were measured: four cores each
    assert step_time(roomy).compute_s == pytest.approx(step_time(setting(2)).compute_s / 4)


# Messages: of a model of n elements, one to the sum, one to each gather.

PER_ELEMENT = 1e-9


def talk(ranks, on_machine, **parallel):
    said = step_time(setting(ranks, on_machine, **parallel))
    return said.communication_s / PER_ELEMENT


def elements():
    model = setting(1).model
    return parameter_count(model, VOCABULARY) + VOCABULARY * model.d_model  # a tied matrix has two gradients


def sending(ranks=4):
    rates = flat(PER_ELEMENT)
    return machine(ranks, within=network(ranks, exchange=rates, gather=rates, shared=()))


@pytest.mark.parametrize(
    ("zero", "passes"),
    [
        (0, 2),  # the sums of all slices, gathered
        (1, 2),  # the sums of one slice; the weights gathered
        (2, 8 + 1),  # a sum each round of microbatches
        (3, 8 * 3),  # and the weights gathered before each forward and backward
    ],
)
def test_what_travels(zero, passes):
    assert talk(4, sending(), zero=zero) == pytest.approx(passes * 3 / 4 * elements(), rel=1e-6)


def test_shared_memory_is_read_and_written_by_all():
    shared = machine(4, within=network(4, shared=flat(PER_ELEMENT)))
    assert talk(4, shared) == pytest.approx(elements(), rel=1e-6)
    assert talk(4, dataclasses.replace(shared, within=network(4, shared=flat(PER_ELEMENT), gather=flat(1e-30))), zero=1) == (
        pytest.approx(elements() * 1.25 / 2.75, rel=1e-6)  # each rank reads a slice of all, and nobody all slices
    )
    assert talk(4, shared, reduce="sent") < 1


def test_replicas_on_several_nodes_talk_across():
    slow = network(8, exchange=flat(PER_ELEMENT), gather=flat(PER_ELEMENT), shared=())
    where = dataclasses.replace(setting(8, machine(4, across=slow), reduce="sent"), ranks_per_node=4)
    assert not where.data_within
    assert step_time(where).communication_s / PER_ELEMENT == pytest.approx(2 * 7 / 8 * elements(), rel=1e-6)
    at_home = dataclasses.replace(where, config=replaced(where.config, parallel__reduce="shared"))
    assert step_time(at_home).communication_s / PER_ELEMENT == pytest.approx(2 * 1 / 2 * elements() / 4 * 7 / 4, rel=1e-6)
    split = dataclasses.replace(where, shape=MeshShape(pipeline=2, data=4), cut=(4, 4),
                                config=replaced(where.config, parallel__pipeline=2))  # fmt: skip
    assert split.data_within  # stages lie on nodes of their own, and only activations travel
    assert split.pipeline_network == slow


def test_activations_take_their_time():
    at_once = step_time(setting(2, pipeline=2)).total_s
    slow = machine(2, within=network(2, latency_s=at_once))
    assert step_time(setting(2, slow, pipeline=2)).total_s > 2 * at_once


# The search.


def test_the_fastest_layout_comes_first_and_the_simplest_of_equals():
    found, _ = search(job(4), 4)
    assert [each.time.total_s for each in found[1:]] == sorted(each.time.total_s for each in found[1:])
    assert found[0].words == "data 4, pipeline 1, zero 0"
    assert flags(found[0]) == "no settings: it is the default"
    dear = machine(4, within=network(4, exchange=flat(1e-3), gather=flat(1e-3), shared=()))
    assert search(job(4, dear), 4)[0][0].config.parallel.pipeline == 4


def test_what_is_stated_is_not_varied():
    found, rejected = search(job(4, parallel__pipeline=2, parallel__zero=1), 4)
    assert {(each.config.parallel.pipeline, each.config.parallel.zero) for each in found} == {(2, 1)}
    assert {each.config.parallel.schedule for each in found} == {"1f1b", "gpipe", "interleaved", "zero-bubble"}
    assert not [each for each in rejected if "zero 0" in each.words]


def test_every_layout_is_there_or_has_its_reason():
    found, rejected = search(job(16), 16)
    assert {each.config.parallel.pipeline for each in found} == {1, 2, 4, 8}
    reasons = {each.words: each.reason for each in rejected}
    assert "each stage needs a layer" in reasons["data 1, pipeline 16, 1f1b, zero 0"]


@pytest.mark.parametrize(("ranks_per_node", "expected"), [(1, 1), (2, 2), (3, 1), (4, 4), (5, 1), (8, 8), (16, 8)])
def test_replicas_are_together_where_each_node_has_as_many(ranks_per_node, expected):
    assert dataclasses.replace(setting(8), ranks_per_node=ranks_per_node).together == expected


def test_what_has_no_room_is_left_out_and_recomputation_is_for_what_needs_it():
    roomy = search(job(2), 2)[0]
    assert all(each.config.train.recompute == "none" for each in roomy)
    most = max(each.memory_bytes for each in roomy)
    tight = machine(2, memory_bytes=int(2 * (most - 1) / 0.95))
    found, rejected = search(job(2, tight), 2)
    assert all(each.memory_bytes < most for each in found)
    assert any("GiB on a rank, and has" in each.reason for each in rejected)
    assert any(each.config.train.recompute == "block" for each in found)


def test_more_ranks_than_the_batch_can_feed_are_told_the_batch_that_would():
    with pytest.raises(ConfigError, match=r"no layout of 512 ranks works: .*make the batch 512"):
        best(job(2), 512)
    with pytest.raises(ConfigError, match="at least one rank"):
        search(job(2), 0)


def test_the_layout_that_is_adopted_is_the_one_that_was_planned():
    for each in search(job(8), 8)[0]:
        assert adopted(job(8).config, each) == each.config


# More ranks.


def test_it_says_where_more_ranks_stop_helping_and_why():
    fixed = machine(1, step_s=0.02)
    points = curve(job(1, fixed), [1, 2, 4, 8, 16, 32])
    said, *_ = in_words(points)
    assert "the speed grows" in said
    assert "nothing is done that more ranks could share" in said
    assert in_words(curve(job(1), [1, 2, 4])) == ["every rank up to 4 is worth having: 100% of the speed a rank has at 1"]


def test_a_batch_that_does_not_share_out_is_said():
    points = curve(job(64, train__global_batch=24, model__n_layers=1), [12, 20])
    assert any("24 microbatches do not share out over 20 replicas" in line for line in in_words(points))


def test_the_curve_goes_on_where_some_numbers_cannot_be():
    lines = scaling(job(64), curve(job(64), [1, 2, 512]), 0.0)
    assert any(line.strip().startswith("512 ranks: no layout of 512 ranks works") for line in lines)


def test_a_hundred_thousand_ranks_are_planned_in_seconds_and_their_costs_named(tmp_path):
    wide = Config(model=dataclasses.replace(SHAPE, n_layers=8, d_model=512), train=Train(global_batch=200_000, micro_batch=1))
    large = Job(resolve(wide), 32_000, machine(32, across=network(64)))
    lines = ranking(large, 100_000, 5, 1e12)
    text = "\n".join(lines)
    assert "what 100,000 ranks cost each of them" in text
    assert "heights of small sums" in text
    rows = growth(dataclasses.replace(setting(8), shape=MeshShape(data=100_000)))
    assert {row[0]: row[2] for row in rows}["heights of small sums"] == "17"
    plot(large, curve(large, [1000, 2000]), str(tmp_path / "curve.svg"))
    assert (tmp_path / "curve.svg").read_text().count("<path") > 5


# The file.


def test_a_machine_comes_back_from_its_file(tmp_path):
    before = machine(4, across=network(8, latency_s=2.5e-5), step_s=0.0015)
    write(tmp_path / "m.json", before)
    after = read(str(tmp_path / "m.json"))
    assert dataclasses.replace(after, source=before.source) == before


def changed(tmp_path, **changes):
    write(tmp_path / "m.json", machine())
    content = json.loads((tmp_path / "m.json").read_text())
    for path, value in changes.items():
        *where, last = path.split("__")
        part = content
        for key in where:
            part = part[key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    (tmp_path / "m.json").write_text(json.dumps(content))
    return str(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"within__bandwidth": 0}, "within.bandwidth is 0, where a number above zero belongs"),
        ({"within__exchange": [[1, -1]]}, "within.exchange is -1"),
        ({"cores": None}, "cores is missing"),
        ({"cores": "two"}, "cores is 'two'"),
        ({"within": 3}, "within is no table"),
        ({"mpilm": "0.0.9"}, "was made by mpilm 0.0.9"),
        ({"format": 0}, "is not of this format"),
    ],
)
def test_a_file_that_is_not_right(tmp_path, changes, message):
    with pytest.raises(FileError) as caught:
        read(changed(tmp_path, **changes))
    assert message in str(caught.value)
    assert "--calibrate" in str(caught.value)


def test_a_file_that_is_not_there_or_no_json(tmp_path):
    with pytest.raises(FileError, match="no such file; measure this machine first"):
        read(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("cores: 2")
    with pytest.raises(FileError, match="cannot be read"):
        read(str(tmp_path / "text.json"))
