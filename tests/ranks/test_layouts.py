"""One answer for every layout: the bits of the serial run, however the work is shared out, stopped and taken up again."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import FAMILIES, differing, evaluated, on, run_threads, serial, sharded, small, small_buckets, stopped, trained
from text import tiny, write_tokens

from mpilm.comm.threads import run_ranks
from mpilm.config import Generate
from mpilm.engine.step import train_step
from mpilm.inference.generate import generate
from mpilm.model.flops import parameter_count
from mpilm.optim.optimizer import OPTIMIZERS
from mpilm.parallel.flat_layout import ALIGNMENT, BUCKET
from mpilm.parallel.layout import select_owned, select_stage
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import SCHEDULES, schedule
from mpilm.parallel.pipeline.simulate import simulate
from mpilm.verification.layouts import VOCAB_SIZE, RandomTokens

SIZES = [1, 2, 3, 4, 6, 8]


def layouts(size):
    """Every layout of so many ranks; of many ranks, not every schedule with every ZeRO."""
    for pipeline in (p for p in range(1, size + 1) if size % p == 0):
        for number, name in enumerate(SCHEDULES if pipeline > 1 or size == 1 else ["1f1b"]):
            for zero in (0, 1, 2, 3) if size > pipeline else (0,):
                if size <= 4 or pipeline in (1, size) or (number + zero + pipeline) % 4 == 0:
                    yield pipeline, name, zero


def cases():
    """Each layout with another choice of all else."""
    number = 0
    for size in SIZES:
        for pipeline, name, zero in layouts(size):
            data, stages = size // pipeline, pipeline * (2 if name == "interleaved" else 1)
            microbatches = data * (pipeline if pipeline > 2 else 2)
            changes = {
                "model__n_layers": max(3, stages + number % 2),
                "model__tie_embeddings": number % 2 == 0,
                "model__dropout": 0.0 if number % 5 == 0 else 0.1,
                "train__global_batch": microbatches - (data > 1 and number % 3 == 0),  # uneven: some replicas have one fewer
                "train__recompute": ("none", "attention", "block")[number % 7 % 3],
                "parallel__reduce": "sent" if number % 3 == 1 else "shared",
                "train__dtype": "bfloat16" if number % 11 == 3 else "float32",
            }
            said = f"{size} ranks, {pipeline} stages, {name}, ZeRO-{zero}"
            yield pytest.param(size, on(pipeline, name, zero), changes, id=said)
            number += 1


@cache
def alone(config, **options):
    return run_threads(1, config, **options)


def assert_serial(size, config, check=False, **options):
    """Numbers, weights and moments are those of the serial run."""
    numbers, tensors = run_threads(size, config, check=check, **options)
    expected = alone(serial(config), **options)
    assert numbers == expected[0]
    assert differing(tensors, expected[1]) == []


@pytest.mark.parametrize(("size", "layout", "changes"), list(cases()))
def test_every_layout_has_the_bits_of_the_serial_run(size, layout, changes):
    assert_serial(size, small(**layout, **changes))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", [3, 4])
def test_a_weight_gradient_that_waits_is_that_of_its_own_microbatch(size, tie):
    """Without dropout the gradient that is received is itself what the last matrix of a stage waits with."""
    changes = {"model__dropout": 0.0, "model__tie_embeddings": tie, "train__global_batch": 10}
    assert_serial(size, small(**on(size, "zero-bubble"), **changes))


@st.composite
def jobs(draw):
    """A layout, a model and a batch that go together, and the size of buckets."""
    size = draw(st.integers(1, 6))
    pipeline = draw(st.sampled_from([p for p in range(1, size + 1) if size % p == 0]))
    data, name = size // pipeline, draw(st.sampled_from(list(SCHEDULES)))
    chunks = draw(st.integers(2, 3)) if name == "interleaved" else 1
    rounds = draw(st.integers(1, 2)) * pipeline if name == "interleaved" else draw(st.integers(1, 5))
    cut = tuple(draw(st.lists(st.integers(1, 2), min_size=pipeline * chunks, max_size=pipeline * chunks)))
    micro_batch = draw(st.integers(1, 2))
    config = small(
        **on(pipeline, name, draw(st.integers(0, 3)) if data > 1 else 0, chunks=chunks, cut=cut if draw(st.booleans()) else ()),
        **(family := draw(st.sampled_from(list(FAMILIES.values())))),
        model__n_layers=sum(cut),
        model__tie_embeddings=family.get("model__arch") == "bert" or draw(st.booleans()),
        model__dropout=draw(st.sampled_from([0.0, 0.1])),
        train__global_batch=micro_batch * draw(st.integers(max(data, (rounds - 1) * data + 1), rounds * data)),
        train__micro_batch=micro_batch,
        train__recompute=draw(st.sampled_from(["none", "attention", "block"])),
        train__dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        train__optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        parallel__reduce=draw(st.sampled_from(["shared", "sent"])),
    )
    return size, config, draw(st.sampled_from([64, 1024, BUCKET]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
@pytest.mark.parametrize(
    ("size", "layout", "recompute"),
    [
        (1, on(schedule="zero-bubble"), "none"), (3, on(zero=3), "block"), (2, on(2, "zero-bubble"), "attention"),
        (4, on(2, "interleaved", 2), "none"), (4, on(2, "zero-bubble", 3), "block"), (4, on(4, "gpipe"), "none"),
    ],
    ids=str,
)  # fmt: skip
def test_so_has_every_family(family, size, layout, recompute):
    assert_serial(size, small(**layout, **FAMILIES[family], train__recompute=recompute))


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
@pytest.mark.parametrize(
    ("size", "layout", "tie"),
    [
        (1, on(schedule="zero-bubble"), True), (3, on(zero=1), True), (3, on(zero=3), False), (8, on(zero=2), True),
        (2, on(2), True), (4, on(2, zero=3), True), (4, on(2, "interleaved", 1), False), (6, on(3, "zero-bubble", 2), True),
    ],
    ids=str,
)  # fmt: skip
def test_so_has_every_optimizer(size, layout, tie, optimizer):
    assert_serial(size, small(**layout, model__tie_embeddings=tie, train__optimizer=optimizer, train__lr=0.02))


@settings(max_examples=12, deadline=None)
@given(jobs())
def test_so_has_any_other_choice(job):
    size, config, bucket = job
    with small_buckets(bucket):
        assert_serial(size, config)


@pytest.mark.parametrize(
    ("size", "layout"), [(3, on(zero=1)), (2, on(2, "zero-bubble")), (4, on(2, "interleaved", 3, cut=(1, 1, 1, 1)))]
)
def test_fifty_steps(size, layout):
    assert_serial(size, small(**layout, train__global_batch=4), steps=50)


@pytest.mark.parametrize(
    ("size", "layout", "batch"),
    [
        (3, on(zero=1), 4), (3, on(zero=3), 5), (4, on(2, "interleaved", 2), 7), (4, on(2, "zero-bubble", 3), 7),
        (4, on(2, "gpipe", 0), 5),
    ],
)  # fmt: skip
def test_all_ranks_make_the_same_calls_in_the_same_order(size, layout, batch):
    """Also those that have no microbatch in a round; each call is compared, and the bits are those of the serial run."""
    assert_serial(size, small(**layout, train__global_batch=batch), check=True)


LAYOUTS = [
    (2, on(zero=3)), (3, on(zero=1)), (2, on(2)), (4, on(2, "interleaved", 2)), (4, on(4, "zero-bubble")),
    (4, on(2, "gpipe", 3)),
]  # fmt: skip


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize(("size", "layout"), [(4, on()), (4, on(zero=3)), (4, on(2, zero=2)), (6, on(3, zero=3)), (2, on(2))])
def test_an_evaluation_may_have_fewer_microbatches_than_replicas(size, layout, total):
    found = run_ranks(size, lambda comm: evaluated(sharded(small(**layout), comm), total))
    (expected,) = run_ranks(1, lambda comm: evaluated(sharded(small(), comm), total))
    assert found == [expected] * size


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_a_model_in_training_writes_the_same_on_all_ranks(size, layout, tie):
    """As the sample at the end of a run: every replica writes it, also where parameters are gathered for it."""

    def written(comm, config):
        model = sharded(config, comm)
        train_step(model, RandomTokens(config), 0)
        return generate(model, {0: [1, 2, 3]}, Generate(max_tokens=9, temperature=1.0), eos=-1)

    config = small(**layout, model__tie_embeddings=tie)
    (expected,) = run_ranks(1, lambda comm: written(comm, serial(config)))
    assert run_ranks(size, lambda comm: written(comm, config)) == [expected] * size
    assert len(expected[0]) == 9


# Stopped on one layout, taken up on another.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


def job(data, folder, **layout):
    return tiny(data, folder, model__n_layers=4, train__steps=4, checkpoint__every=2, run__eval_every=2, **layout)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    return trained(job(data, tmp_path_factory.mktemp("whole") / "run"), 1)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((1, on()), (4, on(2, "interleaved", 3))),
        ((4, on(2, "interleaved", 3)), (3, on(zero=1))),
        ((3, on(zero=2)), (4, on(4, "zero-bubble"))),
        ((4, on(4, "gpipe")), (1, on())),
        ((6, on(2, zero=3)), (6, on(3, zero=1))),
    ],
)
def test_a_run_goes_on_on_another_layout(tmp_path, data, uninterrupted, first, then):
    stopped(job(data, tmp_path / "run", **first[1]), first[0], at=3)
    assert trained(job(data, tmp_path / "run", **then[1]), then[0]) == uninterrupted


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_so_it_does_with_every_optimizer(tmp_path, data, optimizer):
    own = {"train__optimizer": optimizer}
    whole = trained(job(data, tmp_path / "whole", **own), 1)
    stopped(job(data, tmp_path / "run", **on(2, zero=3), **own), 6, at=3)
    assert trained(job(data, tmp_path / "run", **on(2, zero=1), **own), 4) == whole


# What is held meanwhile.


def alive(stages):
    """Microbatches of which a rank holds something for backward, counted for each stage."""
    return sum(len({*stage._graphs, *stage.weight_grads._pending, *stage.weight_grads._completed}) for stage in stages.values())


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, on()), (2, on(2, "gpipe")), (4, on(4)), (4, on(4, "zero-bubble")), (2, on(2, "interleaved")), (4, on(2, zero=2))],
)
def test_a_rank_keeps_as_many_microbatches_as_the_simulator_says(size, layout):
    config = small(**layout, train__global_batch=8)
    parallel, replicas = config.parallel, size // config.parallel.pipeline
    most = []

    def body(comm):
        model = sharded(config, comm)
        seen = []
        for stage in model.stages.values():
            for name in ("forward", "backward", "backward_input", "backward_weight"):
                watch(stage, name, lambda: seen.append(alive(model.stages)))
        train_step(model, RandomTokens(config), 0)
        assert alive(model.stages) == 0
        return model.pipeline.rank, max(seen)

    actions = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, 8 // replicas)
    timeline = simulate([lower(each, parallel.pipeline * parallel.chunks) for each in actions], lambda kind, stage: 1.0)
    most = run_ranks(size, body)
    assert most == [(rank, timeline.peak_in_flight(rank)) for rank, _ in most]


def watch(thing, name, look):
    """Call `look` after each call of a method."""
    method = getattr(thing, name)

    def watched(*arguments):
        result = method(*arguments)
        look()
        return result

    setattr(thing, name, watched)


def whole_bytes(model):
    """Memory of parameters that are whole for a while; pages that were given back read as zeros."""
    units = [unit for stage in model.stages.values() for unit in stage.parameters.units]
    return sum(unit.buffer.nbytes for unit in units if unit.pending is not None or unit.full.any())


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    ("size", "layout"), [(2, on(zero=3)), (3, on(zero=3)), (4, on(2, "zero-bubble", 3)), (4, on(2, "interleaved", 3))]
)
def test_zero_3_lets_parameters_go_and_holds_two_units_at_most(size, layout, recompute):
    config = small(**layout, train__recompute=recompute, train__global_batch=7)

    def body(comm):
        model = sharded(config, comm)
        seen = []
        for stage in model.stages.values():
            for unit in stage.parameters.units:
                watch(unit, "prefetch", lambda: seen.append(whole_bytes(model)))
            for name in ("forward", "backward", "backward_input", "backward_weight"):
                watch(stage, name, lambda: gone.append(whole_bytes(model)))
        gone = []
        assert whole_bytes(model) == 0
        train_step(model, RandomTokens(config), 0)
        evaluated(model, 1)
        generate(model, {0: [1, 2, 3]}, Generate(max_tokens=2), eos=-1)
        assert gone
        assert not any(gone)
        assert max(seen) <= max(stage.parameters.memory_bytes for stage in model.stages.values())

    run_ranks(size, body)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("size", "pipeline"), [(2, 1), (3, 1), (8, 1), (4, 2), (6, 3)])
def test_a_rank_holds_its_shard_of_what_is_sharded(size, pipeline, zero):
    config = small(**on(pipeline, zero=zero))

    def body(comm):
        model = sharded(config, comm)
        ((stage, flat),) = model.flats.items()
        moments = [sum(x.numel() for x in of.values()) for of in model.optimizer.state_slices().values()]
        assert moments[0] == moments[1]
        held = {1: moments[0], 2: model.sums[stage].tensor.numel(), 3: flat.values.tensor.numel()}  # from which ZeRO on
        for sharded_from, numel in held.items():
            if zero >= sharded_from:
                assert numel <= flat.layout.numel / model.data.size + len(flat.layout.groups) * ALIGNMENT
            else:
                assert numel >= sum(layout.numel for layout in select_owned(select_stage(model.layouts, stage)))
        return model.local_numel

    copy = VOCAB_SIZE * config.model.d_model if pipeline > 1 or zero == 3 else 0  # of the embedding, for the head
    once = parameter_count(config.model, VOCAB_SIZE) + copy
    assert sum(run_ranks(size, body)) == once * (1 if zero == 3 else size // pipeline)
