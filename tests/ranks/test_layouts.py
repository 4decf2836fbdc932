"""One answer for every layout: the bits of the serial run, and what a rank holds meanwhile. On random tokens."""

from itertools import combinations

import pytest
from pairwise import pairwise_cases
from runs import (
    FAMILIES,
    assert_equals_serial,
    build_train_model,
    eval_loss,
    layout,
    serial_config,
    small_buckets,
    small_config,
)
from thread_ranks import run_ranks

from mpilm.config.schema import GenerateConfig
from mpilm.engine.step import train_step
from mpilm.inference.generate import generate
from mpilm.kernels import linear_cross_entropy
from mpilm.model.flops import parameter_count
from mpilm.optim.optimizer import OPTIMIZERS
from mpilm.parallel.flat_layout import ALIGNMENT, BUCKET
from mpilm.parallel.layout import select_owned, select_stage
from mpilm.parallel.pipeline.schedules import SCHEDULES, lower, schedule
from mpilm.planner.simulate import simulate
from mpilm.verification.layouts import VOCAB_SIZE, RandomTokens

FACTORS = {
    "pipeline": [1, 2, 3, 4],
    "data": [1, 2, 3, 4],
    "tensor": [1, 2, 4],
    "parts": [1, 2, 4],
    "context": [1, 2],
    "sequence": [1, 2, 4],
    "expert": [1, 2, 3],
    "schedule": list(SCHEDULES),
    "chunks": [1, 2, 3],
    "zero": [0, 1, 2, 3],
    "reduce": ["shared-memory", "messages"],
    "recompute": ["none", "attention", "block"],
    "optimizer": list(OPTIMIZERS),
    "offload": ["none", "optimizer", "parameters"],
    "family": list(FAMILIES),
    "tie": [True, False],
    "dropout": [0.1, 0.0],
    "dtype": ["float32", "bfloat16"],
    "micro_batch": [1, 2],
    "batch": ["even", "uneven"],  # uneven: some replicas have one microbatch fewer
    "partition": ["balanced", "stated"],
    "bucket": [256, BUCKET],
    "checks_calls": [False, True],  # compare the communication calls of all ranks
}


def is_valid(case):
    """Return whether a partial case can be completed to a layout that works, on few ranks with few stages."""
    needs_replicas, interleaved = (
        case.get("zero", 0) > 0 or case.get("batch") == "uneven",
        case.get("schedule") == "interleaved",
    )
    expert = case.get("expert", 2 if needs_replicas and case.get("data") == 1 else 1)
    pipeline, data = case.get("pipeline", 1), case.get("data", 2 if needs_replicas and expert == 1 else 1)
    parts, tensor, context = case.get("parts", 4), case.get("tensor", 1), case.get("context", 1)
    chunks = case.get("chunks", 2 if interleaved else 1)
    return (
        pipeline * data * tensor * context * expert <= 8
        and case.get("sequence", 4) % context == 0
        and pipeline * data * chunks <= 9
        and parts % tensor == 0
        and (data * expert > 1 or not needs_replicas)
        and ("schedule" not in case or interleaved == (chunks > 1))
        and (case.get("family") != "bert" or case.get("tie", True))
        and not (
            case.get("checks_calls") and (case.get("bucket") == 256 or pipeline * data * tensor * context * expert > 4)
        )  # too many calls
        and not (case.get("offload") == "parameters" and case.get("reduce") == "shared-memory")
        and (expert == 1 or case.get("family", "mixtral") in {2: ["mixtral"], 3: ["mixtral", "qwen3-moe"]}[expert])
    )


CASES = pairwise_cases(FACTORS, is_valid)


def config_of(case):
    """Return the number of ranks and the config of a case."""
    pipeline, data, chunks = (case[name] for name in ("pipeline", "data", "chunks"))
    stages = pipeline * chunks
    is_stated = case["partition"] == "stated"
    layers = max(2, stages + is_stated)
    partition = (layers - stages + 1, *[1] * (stages - 1)) if is_stated else ()
    microbatches = data * case["expert"] * max(2, pipeline if case["schedule"] == "interleaved" else 2) - (
        case["batch"] == "uneven"
    )
    config = small_config(
        **layout(
            pipeline,
            case["schedule"],
            case["zero"],
            chunks=chunks,
            cut=partition,
            reduce=case["reduce"],
            tensor=case["tensor"],
            context=case["context"],
            expert=case["expert"],
        ),
        **{"model__n_heads": 4, **FAMILIES[case["family"]], "model__n_kv_heads": 4},
        model__tensor_parts=case["parts"],
        model__sequence_parts=case["sequence"],
        model__context_length=16 if case["sequence"] * case["parts"] > 8 else 8,
        model__n_layers=layers,
        model__tie_embeddings=case["tie"],
        model__dropout=case["dropout"],
        train__global_batch=microbatches * case["micro_batch"],
        train__micro_batch=case["micro_batch"],
        train__recompute=case["recompute"],
        train__dtype=case["dtype"],
        train__optimizer=case["optimizer"],
        train__offload=case["offload"],
    )
    return pipeline * data * case["tensor"] * case["context"] * case["expert"], config


def test_cases_cover_every_pair_of_choices():
    for a, b in combinations(FACTORS, 2):
        pairs = {(x, y) for x in FACTORS[a] for y in FACTORS[b] if is_valid({a: x, b: y})}
        assert pairs == {(case[a], case[b]) for case in CASES}, (a, b)
    assert len(CASES) <= 58


@pytest.mark.parametrize("number", range(len(CASES)))
def test_layout_has_the_bits_of_the_serial_run(number):
    case = CASES[number]
    size, config = config_of(case)
    with small_buckets(case["bucket"]):
        assert_equals_serial(size, config, checks_calls=case["checks_calls"])


def test_queued_weight_gradients_outlive_the_buffers_of_their_messages():
    """Without dropout a received gradient is itself what the last matrix of a stage has queued."""
    assert_equals_serial(4, small_config(**layout(4, "zero-bubble"), model__dropout=0.0, train__global_batch=10))


@pytest.mark.parametrize(
    ("size", "settings"), [(4, layout()), (4, layout(zero=3)), (4, layout(2, zero=2)), (6, layout(3, zero=3)), (2, layout(2))]
)
def test_evaluation_with_fewer_microbatches_than_replicas_equals_serial(size, settings):
    def losses(comm, config):
        model = build_train_model(config, comm)
        return [eval_loss(model, total) for total in (1, 2, 3)]

    (expected,) = run_ranks(1, lambda comm: losses(comm, small_config()))
    assert run_ranks(size, lambda comm: losses(comm, small_config(**settings))) == [expected] * size


@pytest.mark.parametrize(
    ("size", "settings", "tie"),
    [
        (2, layout(zero=3), True), (3, layout(zero=1), False), (2, layout(2), False), (4, layout(2, "interleaved", 2), True),
        (4, layout(4, "zero-bubble"), True), (4, layout(2, "gpipe", 3), False),
    ],
)  # fmt: skip
def test_model_in_training_generates_the_same_tokens_on_all_ranks(size, settings, tie):
    """As for the sample at the end of a run, for which ZeRO-3 gathers parameters."""

    def sample(comm, config):
        model = build_train_model(config, comm)
        train_step(model, RandomTokens(config), 0)
        return generate(model, {0: [1, 2, 3]}, GenerateConfig(max_tokens=9, temperature=1.0), eos=-1)

    config = small_config(**settings, model__tie_embeddings=tie, train__global_batch=4)
    (expected,) = run_ranks(1, lambda comm: sample(comm, serial_config(config)))
    assert run_ranks(size, lambda comm: sample(comm, config)) == [expected] * size
    assert len(expected[0]) == 9


# What a rank holds meanwhile.


def count_in_flight(stages):
    """Return the number of microbatches, counted for each stage, of which a rank holds something for backward."""
    return sum(len({*stage._graphs, *stage.weight_grads._pending}) for stage in stages.values())


def call_after(thing, name, action):
    """Call `action` after each call of a method."""
    method = getattr(thing, name)

    def wrapper(*arguments):
        result = method(*arguments)
        action()
        return result

    setattr(thing, name, wrapper)


COMPUTATIONS = ("forward", "backward", "backward_input", "backward_weight")


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (1, layout()), (2, layout(2, "gpipe")), (4, layout(4)), (4, layout(4, "zero-bubble")), (2, layout(2, "interleaved")),
        (4, layout(2, zero=2)),
    ],
)  # fmt: skip
def test_rank_has_as_many_microbatches_in_flight_as_simulated(size, settings):
    config = small_config(**settings, train__global_batch=8)
    parallel, replicas = config.parallel, size // config.parallel.pipeline

    def body(comm):
        model = build_train_model(config, comm)
        counts = []
        for stage in model.stages.values():
            for name in COMPUTATIONS:
                call_after(stage, name, lambda: counts.append(count_in_flight(model.stages)))
        train_step(model, RandomTokens(config), 0)
        assert count_in_flight(model.stages) == 0
        return model.pipeline.rank, max(counts)

    actions = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, 8 // replicas)
    timeline = simulate([lower(each, parallel.pipeline * parallel.chunks) for each in actions], lambda kind, stage: 1.0)
    for rank, count in run_ranks(size, body):
        assert count == timeline.peak_in_flight(rank)


def gathered_bytes(model):
    """Return the memory of gathered parameters; released pages read as zeros."""
    units = [unit for stage in model.stages.values() for unit in stage.parameters.units]
    return sum(unit.buffer.nbytes for unit in units if unit.pending is not None or unit.buffer.tensor.any())


@pytest.mark.parametrize(
    ("size", "settings", "recompute"),
    [
        (2, layout(zero=3), "block"), (3, layout(zero=3), "none"), (4, layout(2, "zero-bubble", 3), "none"),
        (4, layout(2, "interleaved", 3), "block"),
    ],
)  # fmt: skip
def test_zero_3_gathers_two_units_at_most_and_releases_them(size, settings, recompute):
    config = small_config(**settings, train__recompute=recompute, train__global_batch=7)

    def body(comm):
        model = build_train_model(config, comm)
        gathered, after_computation = [], []
        for stage in model.stages.values():
            for unit in stage.parameters.units:
                call_after(unit, "prefetch", lambda: gathered.append(gathered_bytes(model)))
            for name in COMPUTATIONS:
                call_after(stage, name, lambda: after_computation.append(gathered_bytes(model)))
        assert gathered_bytes(model) == 0
        train_step(model, RandomTokens(config), 0)
        eval_loss(model, 1)
        generate(model, {0: [1, 2, 3]}, GenerateConfig(max_tokens=2), eos=-1)
        assert after_computation
        assert not any(after_computation)
        assert 0 < max(gathered) <= max(stage.parameters.memory_bytes for stage in model.stages.values())

    run_ranks(size, body)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("size", "pipeline"), [(2, 1), (3, 1), (8, 1), (4, 2), (6, 3)])
def test_rank_holds_its_shard_of_what_zero_shards(size, pipeline, zero):
    config = small_config(**layout(pipeline, zero=zero))

    def body(comm):
        model = build_train_model(config, comm)
        ((stage, flat),) = model.flats.items()
        moments = [sum(x.numel() for x in of.values()) for of in model.optimizer.state_slices().values()]
        assert moments[0] == moments[1]
        held = {1: moments[0], 2: model.sums[stage].tensor.numel(), 3: flat.values.tensor.numel()}  # by the first ZeRO
        for sharded_from, numel in held.items():
            if zero >= sharded_from:
                assert numel <= flat.layout.numel / model.replicas.size + len(flat.layout.groups) * ALIGNMENT
            else:
                assert numel >= sum(x.numel for x in select_owned(select_stage(model.layouts, stage)))
        return model.local_numel

    copy = VOCAB_SIZE * config.model.d_model if pipeline > 1 or zero == 3 else 0  # of the embedding, for the head
    once = parameter_count(config.model, VOCAB_SIZE) + copy
    assert sum(run_ranks(size, body)) == once * (1 if zero == 3 else size // pipeline)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, layout(zero=1)),
        (3, layout(zero=2)),
        (2, layout(zero=3)),
        (4, layout(2, zero=3)),
        (3, {**layout(zero=3), "model__arch": "gpt2"}),
        (4, {**layout(2, "zero-bubble", zero=3), "model__tie_embeddings": False}),
        (2, {**layout(zero=3), "model__arch": "bert"}),
    ],
)
def test_loss_in_blocks_of_words_has_the_same_bits_in_every_layout(monkeypatch, size, changes, dtype):
    """Every head defers its logits to the loss, and the last replica lacks a microbatch."""
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 0)
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_BLOCK", 500)
    calls, apply = [], linear_cross_entropy.LinearCrossEntropySum.apply
    monkeypatch.setattr(linear_cross_entropy.LinearCrossEntropySum, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    config = small_config(**changes, train__global_batch=7, train__micro_batch=1, train__dtype=dtype, train__seed=77)
    assert_equals_serial(size, config, checks_calls=True)
    assert calls
