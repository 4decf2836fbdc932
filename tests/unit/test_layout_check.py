"""Layouts that cannot work are refused, and the advice in the message works; the layers of each stage."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text import TINY

from mpilm.config.check import check_config
from mpilm.config.schema import microbatch_count, resolve_config
from mpilm.config.settings import override
from mpilm.errors import ConfigError
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import flops_by_part
from mpilm.ops.tree import block_of_rank
from mpilm.parallel.layout_check import partition_by_cost, replica_microbatch_count, resolve_mesh_shape
from mpilm.parallel.pipeline.schedules import SCHEDULES

HEADS = {
    "model__n_heads": 12, "model__n_kv_heads": 12, "model__d_model": 48, "model__d_ff": 96, "model__context_length": 24,
}  # fmt: skip
"""A shape that 1, 2, 3, 4, 6 and 12 tensor parts divide."""


def config_of(**changes):
    """8 layers, 8 microbatches of 1 sequence."""
    config = override(TINY, **{"model__n_layers": 8, "train__global_batch": 8, "train__micro_batch": 1, **changes})
    check_config(config)
    return config


def error_of(config, ranks):
    """Return the message of the refusal, "" if these ranks can run the config."""
    try:
        check_config(config)
        resolve_mesh_shape(config, ranks)
    except ConfigError as error:
        return str(error)
    return ""


def fits(config, ranks):
    """Return the same decision by a formula."""
    parallel, total = resolve_config(config).parallel, microbatch_count(config)
    data, rest = divmod(ranks, parallel.pipeline)
    if rest or data > total or (parallel.zero and data == 1):
        return False
    longest = max(len(range(*block_of_rank(rank, data, total))) for rank in range(data))
    if parallel.schedule == "interleaved":
        return parallel.chunks > 1 and longest % parallel.pipeline == 0
    return parallel.chunks == 1


@st.composite
def jobs(draw):
    """Draw a valid config and a number of ranks that may or may not run it."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    config = config_of(
        parallel__pipeline=draw(st.integers(1, 4)),
        parallel__schedule=name,
        parallel__chunks=draw(st.sampled_from([0, 0, 1, 2])),
        parallel__zero=draw(st.integers(0, 3)),
        train__micro_batch=draw(st.just(2)),
        train__global_batch=2 * draw(st.integers(1, 12)),
    )
    return config, draw(st.integers(1, 12))


@settings(max_examples=300)
@given(jobs())
def test_resolve_mesh_shape_refuses_exactly_what_does_not_fit(job):
    config, ranks = job
    assert (error_of(config, ranks) == "") == fits(config, ranks)
    if fits(config, ranks):
        pipeline = config.parallel.pipeline
        assert resolve_mesh_shape(config, ranks) == MeshShape(pipeline=pipeline, data=ranks // pipeline)


@pytest.mark.parametrize("data", range(1, 9))
@pytest.mark.parametrize("total", [1, 2, 7, 8, 24, 25])
def test_replica_microbatch_count_is_that_of_the_fullest_replica(data, total):
    config = config_of(train__global_batch=3 * total, train__micro_batch=3)
    for of_rank in (lambda rank: range(*block_of_rank(rank, data, total)), lambda rank: range(rank, total, data)):
        longest = max(len(of_rank(rank)) for rank in range(data))
        assert replica_microbatch_count(config, MeshShape(data=data)) == longest
        assert replica_microbatch_count(config, MeshShape(data=data, pipeline=3)) == longest


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (
            6, {"parallel__pipeline": 4},
            "--parallel.pipeline 4 does not divide 6 ranks; the nearest that does: 3, or start 8 ranks",
        ),
        (
            1, {"parallel__pipeline": 2},
            "--parallel.pipeline 2 does not divide 1 rank; the nearest that does: 1, or start 2 ranks",
        ),
        (
            12, {"parallel__pipeline": 5},
            "--parallel.pipeline 5 does not divide 12 ranks; the nearest that does: 4, or start 15 ranks",
        ),
        (
            9, {},
            "9 ranks, but a step has only 8 microbatches (--train.global-batch 8 over --train.micro-batch 1); "
            "start 8 ranks or fewer, or make the batch 9",
        ),
        (
            10, {"parallel__pipeline": 2, "train__micro_batch": 2},
            "10 ranks make 5 replicas of the pipeline, but a step has only 4 microbatches (--train.global-batch 8 over "
            "--train.micro-batch 2); start 8 ranks or fewer, or make the batch 10",
        ),
        (
            4, {"parallel__pipeline": 4, "parallel__zero": 2},
            "--parallel.zero 2 shards over the data-parallel ranks, and 4 ranks with --parallel.pipeline 4 leave 1; "
            "write --parallel.zero 0, or start 8 ranks",
        ),
        (
            6, {"parallel__tensor": 4, **HEADS},
            "--parallel.tensor 4 does not divide 6 ranks; the nearest that does: 3, or start 8 ranks",
        ),
        (
            4, {"parallel__tensor": 4, "model__tensor_parts": 6, **HEADS},
            "--parallel.tensor 4 does not divide --model.tensor-parts 6; the nearest that divides it and 4 ranks: 2, "
            "or start 6 ranks with --parallel.tensor 3",
        ),
        (
            3, {"parallel__tensor": 3, "model__tensor_parts": 4, **HEADS},
            "--parallel.tensor 3 does not divide --model.tensor-parts 4; the nearest that divides it and 3 ranks: 1, "
            "or start 4 ranks with --parallel.tensor 4",
        ),
        (
            6, {"model__arch": "mixtral", "parallel__expert": 4, "train__global_batch": 12, "train__micro_batch": 1},
            "--parallel.expert 4 does not divide the 6 data-parallel ranks; the nearest that does: 2, or start 8 ranks",
        ),
        (
            4, {"model__arch": "mixtral", "parallel__pipeline": 4, "parallel__expert": 2},
            "--parallel.expert 2 does not divide the 1 data-parallel rank; the nearest that does: 1, or start 8 ranks",
        ),
        (
            6, {"parallel__context": 4, **HEADS},
            "--parallel.context 4 does not divide 6 ranks; the nearest that does: 3, or start 8 ranks",
        ),
        (
            3, {"parallel__context": 3, "model__sequence_parts": 4},
            "--parallel.context 3 does not divide --model.sequence-parts 4; the nearest that divides it and 3 ranks: 1, "
            "or start 4 ranks with --parallel.context 4",
        ),
        (
            4, {"parallel__context": 2, "model__sequence_parts": 6, "model__context_length": 24},
            "--parallel.context 2 gives each rank 3 of 6 sequence parts, and their number must be a power of two; the nearest "
            "that works: 1, or write --model.sequence-parts 4",
        ),
        (
            4, {"parallel__context": 4, "parallel__context_method": "ulysses", "model__n_kv_heads": 2},
            "--parallel.context-method ulysses: --parallel.context 4 does not divide the 2 key and value heads; write "
            "--parallel.context-method ring, or auto",
        ),
        (
            2, {"parallel__context": 2, "parallel__context_method": "ulysses", "model__n_kv_heads": 2, "model__dropout": 0.1},
            "--parallel.context-method ulysses: with --model.dropout 0.1 the bits would depend on the number of ranks; write "
            "--parallel.context-method ring, or auto",
        ),
        (
            2, {"parallel__context": 2, "parallel__tensor": 1, "model__context_length": 25},
            "--model.context-length 25 is not divisible by 4 sequence parts; the nearest that works: 24",
        ),
        (
            2, {"parallel__tensor": 2, **HEADS, "model__context_length": 25},
            "--model.context-length 25 is not divisible by 2 tensor parts; the nearest that works: 24",
        ),
        (
            8, {"parallel__tensor": 2, "parallel__pipeline": 3, **HEADS},
            "--parallel.pipeline 3 times --parallel.tensor 2 does not divide 8 ranks; the nearest that does: 2, "
            "or start 12 ranks",
        ),
        (
            4, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__zero": 3, **HEADS},
            "--parallel.zero 3 shards over the data-parallel ranks, and 4 ranks with --parallel.pipeline 2 and "
            "--parallel.tensor 2 leave 1; write --parallel.zero 0, or start 8 ranks",
        ),
        (
            20, {"parallel__tensor": 2, **HEADS},
            "20 ranks make 10 replicas of the model, but a step has only 8 microbatches (--train.global-batch 8 over "
            "--train.micro-batch 1); start 16 ranks or fewer, or make the batch 10",
        ),
        (
            2, {"parallel__schedule": "zero-bubble", "parallel__chunks": 2},
            "--parallel.chunks 2 needs --parallel.schedule interleaved; zero-bubble has 1 chunk a rank",
        ),
        (
            2, {"parallel__schedule": "interleaved", "parallel__chunks": 1},
            "--parallel.schedule interleaved needs --parallel.chunks 2 or more, not 1; one chunk a rank is 1f1b",
        ),
        (
            4, {"parallel__pipeline": 4, "parallel__schedule": "interleaved", "train__global_batch": 6},
            "--parallel.schedule interleaved needs a multiple of --parallel.pipeline 4 microbatches on each replica, not 6; "
            "the nearest: 4 or 8; --train.global-batch 8",
        ),
        (
            5, {"parallel__pipeline": 5, "model__n_layers": 4},
            "--parallel.pipeline 5 with 1 stage per rank makes 5 stages, and --model.n-layers is 4: each stage needs a layer; "
            "--parallel.pipeline 1 is the largest that fits 5 ranks, or --model.n-layers 5",
        ),
        (
            4, {"parallel__pipeline": 4, "model__n_layers": 7, "parallel__schedule": "interleaved"},
            "--parallel.pipeline 4 with 2 stages per rank makes 8 stages, and --model.n-layers is 7: each stage needs a layer; "
            "--parallel.pipeline 2 is the largest that fits 4 ranks, or --model.n-layers 8",
        ),
        (
            2, {"parallel__pipeline": 2, "model__n_layers": 5, "parallel__schedule": "interleaved", "parallel__chunks": 3},
            "--parallel.pipeline 2 with 3 stages per rank makes 6 stages, and --model.n-layers is 5: each stage needs a layer; "
            "--parallel.chunks 2, or --parallel.pipeline 1 is the largest that fits 2 ranks, or --model.n-layers 6",
        ),
        (
            4, {"parallel__pipeline": 2, "parallel__cut": (3, 6)},
            "--parallel.cut 3 6 adds up to 9 layers, but --model.n-layers is 8; the balanced one is 4 4",
        ),
        (
            2, {"parallel__pipeline": 2, "parallel__schedule": "interleaved", "parallel__cut": (4, 4)},
            "--parallel.cut 4 4 has 2 stages, but --parallel.pipeline times --parallel.chunks is 4; "
            "the balanced one is 2 2 2 2",
        ),
    ],
)  # fmt: skip
def test_resolve_mesh_shape_names_settings_that_work(ranks, changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve_mesh_shape(config_of(**changes), ranks)
    assert str(caught.value) == message


def advised(config, ranks):
    """Return the alternatives that the message names, each as settings and ranks."""
    message = error_of(config, ranks)
    for pattern, follow in (
        (r"nearest that does: (\d+)", lambda value: (override(config, parallel__pipeline=value), ranks)),
        (r"start (\d+) ranks", lambda value: (config, value)),
        (r"make the batch (\d+)", lambda value: (override(config, train__global_batch=value), ranks)),
        (r"write --parallel.zero (\d)", lambda value: (override(config, parallel__zero=value), ranks)),
    ):
        yield from (follow(int(found[1])) for found in re.finditer(pattern, message))


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_resolve_mesh_shape_advice_works(pipeline, ranks, count, zero):
    """One thing is wrong: stages that do not divide the ranks, too many replicas, or a single one to shard over."""
    for size, changes in (
        (ranks, {"train__global_batch": 12}),
        (pipeline * ranks, {"train__global_batch": 2 * count, "train__micro_batch": 2}),
        (pipeline, {"parallel__zero": zero}),
    ):
        config = config_of(parallel__pipeline=pipeline, **changes)
        assert bool(list(advised(config, size))) == bool(error_of(config, size))
        assert [error_of(*advice) for advice in advised(config, size) if error_of(*advice)] == []


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (5, {"model__n_layers": 4, "parallel__pipeline": 4}),
        (3, {"parallel__pipeline": 2, "train__global_batch": 1}),
        (6, {"parallel__pipeline": 2, "parallel__schedule": "interleaved", "train__global_batch": 2}),
        (2, {"parallel__pipeline": 2, "parallel__zero": 1, "train__global_batch": 1}),
        (6, {"parallel__pipeline": 4, "parallel__cut": (2, 2, 2, 2)}),
    ],
    ids=["as many layers as stages", "one microbatch", "interleaved", "one microbatch to shard over", "a stated cut"],
)
def test_resolve_mesh_shape_advice_is_not_refused_for_another_reason(ranks, changes):
    config = config_of(**changes)
    assert error_of(config, ranks)
    assert [error_of(*advice) for advice in advised(config, ranks) if error_of(*advice)] == []


# Layers to stages.


def costs(cut, model, vocabulary):
    """Return the FLOPs of each stage."""
    part = flops_by_part(model, vocabulary)
    flops = [layers * part["block"] for layers in cut]
    flops[0] += part["embed"]
    flops[-1] += part["head"]
    return flops


def every_cut(layers, stages):
    for ends in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *ends, layers)))


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5000), st.sampled_from([8, 32, 64]),
    st.sampled_from([4, 512]),
)  # fmt: skip
def test_partition_by_cost_has_the_smallest_largest_stage(layers, pipeline, chunks, vocabulary, width, length):
    changes = {"parallel__schedule": "interleaved" if chunks > 1 else "1f1b", "parallel__chunks": chunks}
    config = override(
        config_of(model__n_layers=27, parallel__pipeline=pipeline, **changes),
        model__n_layers=layers, model__d_model=width, model__context_length=length,
    )  # fmt: skip
    stages, model = pipeline * chunks, resolve_config(config).model
    if stages > layers:
        message = rf"{layers} layers cannot be divided into {stages} stages \(--parallel.pipeline times --parallel.chunks\)"
        with pytest.raises(ConfigError, match=f"^{message}: each needs one; at most {layers}$"):
            partition_by_cost(config, vocabulary)
        return
    cut = partition_by_cost(config, vocabulary)
    assert cut in every_cut(layers, stages)
    assert max(costs(cut, model, vocabulary)) == min(max(costs(c, model, vocabulary)) for c in every_cut(layers, stages))


def test_partition_by_cost_large_vocabulary_takes_layers_from_the_last_stage():
    config = config_of(parallel__pipeline=2, model__n_layers=8)
    assert partition_by_cost(config, vocab_size=1) == (4, 4)
    assert partition_by_cost(config, vocab_size=100_000) == (7, 1)


def test_partition_by_cost_keeps_a_cut_that_is_set():
    config = config_of(parallel__pipeline=2, parallel__schedule="interleaved", parallel__cut=(1, 5, 1, 1))
    assert partition_by_cost(config, vocab_size=100_000) == (1, 5, 1, 1)
    with pytest.raises(ConfigError) as caught:
        partition_by_cost(override(config, parallel__cut=(1, 6, 0, 1)), vocab_size=1)
    assert str(caught.value) == "--parallel.cut 1 6 0 1 leaves stage 2 without a layer; the balanced one is 2 2 2 2"
