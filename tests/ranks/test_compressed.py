"""Fewer bytes for slow networks: what compressing and training apart do to the numbers, and that nothing is lost for good."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from runs import differing, joined, newest_tensors, run_threads, sharded, small, stopped, trained
from text import tiny, write_tokens

from mpilm.checkpoint.format import checkpoints, step_of
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.threads import run_ranks
from mpilm.config import mathematics, microbatches, replaced, resolve
from mpilm.engine.hardware import detect_hardware
from mpilm.engine.step import train_step
from mpilm.errors import ConfigError
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.diloco import OUTER_BETA, OUTER_LR, OUTER_MOMENTUM, DiLoCo
from mpilm.parallel.reduce.powersgd import PowerSGDReducer
from mpilm.trainer import build, loop
from mpilm.validation import validate
from mpilm.verification.layouts import RandomTokens

CPU = torch.device("cpu")
SHAPES = {"a": (24, 40), "b": (40,), "c": (3, 2)}


def flat_of(shapes=SHAPES):
    return FlatParameters({name: ParamLayout(name, shape) for name, shape in shapes.items()}, CPU)


def low_rank(rank, number):
    """A matrix of this rank, another one for each number, all with the same row space."""
    right = torch.randn(rank, 40, generator=torch.Generator().manual_seed(1))
    return torch.randn(24, rank, generator=torch.Generator().manual_seed(number + 10)) @ right


def compressed(size, rank, steps, gradient):
    """The sums of each step as all ranks have them; `gradient(r, step)` is that of "a" on a rank."""

    def body(comm):
        flat = flat_of()
        sums = FlatVector.zeros([(0, flat.layout.numel)], CPU)
        way = PowerSGDReducer(comm, flat, sums, rank, seed=0)
        found = []
        for step in range(steps):
            flat.parameter("a", sums).copy_(gradient(comm.rank, step))
            flat.parameter("b", sums).fill_(comm.rank + step)
            flat.parameter("c", sums).fill_(1.0)
            way.finish()
            found.append({name: flat.parameter(name, sums).clone() for name in SHAPES})
        return found

    found = run_ranks(size, body)
    for theirs in found[1:]:
        assert all(torch.equal(mine[name], other[name]) for mine, other in zip(found[0], theirs) for name in SHAPES)
    return found[0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sum_of_few_directions_is_whole(size):
    (step,) = compressed(size, 4, 1, lambda r, step: low_rank(4, r))
    assert torch.allclose(step["a"], sum(low_rank(4, r) for r in range(size)), atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vectors_and_small_matrices_travel_whole(size):
    found = compressed(size, 4, 2, lambda r, step: low_rank(4, r))
    assert [float(step["b"][0]) for step in found] == [sum(r + step for r in range(size)) for step in range(2)]
    assert torch.equal(found[0]["c"], torch.full((3, 2), float(size)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_left_out_comes_later(size):
    """Of a constant gradient the mean over the steps goes to the gradient as 1/steps, with rank 1 of 24."""
    full = [torch.randn(24, 40, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    errors = {}
    for steps in (40, 160):
        found = compressed(size, 1, steps, lambda r, step: full[r])
        mean = sum(step["a"] for step in found) / steps
        errors[steps] = float((mean - sum(full)).norm() / sum(full).norm())
    assert errors[40] < 0.7
    assert errors[160] < errors[40] / 2


def test_thin_matrices_are_fewer_bytes():
    def body(comm, rank):
        traced = InstrumentedComm(comm)
        config = small(model__d_model=64, parallel__compress=rank, parallel__reduce="sent")
        model = sharded(config, traced)
        train_step(model, RandomTokens(config), 0)
        return sum(model.data.sent_bytes.values())

    whole, thin = (run_ranks(2, lambda comm, rank=rank: body(comm, rank))[0] for rank in (0, 2))
    assert thin < whole / 4


# Training apart.


def test_a_meeting_is_a_step_of_the_outer_optimizer():
    def body(comm):
        flat = flat_of()
        outer = DiLoCo({0: flat}, comm, every=2)
        x = flat.values.tensor.fill_(1.0)
        places = []
        for meeting in range(2):
            outer.begin_step()
            x.sub_(0.1 * (comm.rank + 1) * (meeting + 1))
            outer.sync()
            places.append(float(x[0]))
        return places, float(outer.owned_slices()[next(iter(outer.owned_slices()))][0])

    found = run_ranks(3, body)
    assert all(theirs == found[0] for theirs in found)
    moved, momentum, place, want = [0.2, 0.4], 0.0, 1.0, []
    for delta in moved:
        momentum = OUTER_BETA * momentum + delta
        place -= OUTER_LR * (delta + OUTER_BETA * momentum)
        want.append(place)
    assert found[0][0] == pytest.approx(want)
    assert found[0][1] == pytest.approx(momentum)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_between_meetings_each_replica_is_a_run_of_its_own(pipeline):
    """With as many steps as a meeting is away: the weights are those of one rank with these microbatches alone."""
    config = small(
        parallel__sync_every=3, parallel__pipeline=pipeline, train__clip_norm=0.0, checkpoint__every=0, run__eval_every=0,
        model__dropout=0.0, train__steps=100,
    )  # fmt: skip

    def body(comm):
        model = sharded(config, comm)
        for step in range(2):
            train_step(model, RandomTokens(config), step)
        assert not model.are_replicas_in_sync(2)
        return model.data.rank, model.owned_slices()

    class Half:
        """The microbatches of one replica."""

        def __init__(self, r, each):
            self.inner, self.first = RandomTokens(config), r * each

        def train(self, step, m):
            return self.inner.train(step, m + self.first)

        def target_tokens(self, step):
            return self.inner.target_tokens(step) // 2

    each = microbatches(config) // 2
    alone = replaced(config, parallel__sync_every=0, parallel__pipeline=1, train__global_batch=each * config.train.micro_batch)

    def serial(r):
        def one(comm):
            model = sharded(resolve(alone), comm)
            for step in range(2):
                train_step(model, Half(r, each), step)
            return {"value": model.owned_slices()}

        return joined(run_ranks(1, one))

    found = run_ranks(2 * pipeline, body)
    for r in range(2):
        mine = joined([{"value": pieces} for data, pieces in found if data == r])
        assert differing(mine, serial(r)) == []
    assert differing(serial(0), serial(1)) != []


def test_replicas_are_one_after_a_meeting_and_at_the_end():
    config = small(parallel__sync_every=2, checkpoint__every=0, run__eval_every=0, train__steps=3)

    def body(comm):
        model, seen = sharded(config, comm), []
        for step in range(3):
            train_step(model, RandomTokens(config), step)
            seen.append({"value": {piece: x.clone() for piece, x in model.owned_slices().items()}})
            assert model.are_replicas_in_sync(step + 1) == (step > 0)
        return seen

    found = run_ranks(4, body)
    with pytest.raises(AssertionError, match="replicas differ"):
        joined([theirs[0] for theirs in found])
    for step in (1, 2):
        joined([theirs[step] for theirs in found])  # the same on all


def test_one_replica_that_meets_nobody_still_takes_outer_steps():
    def values(**changes):
        _, held = run_threads(1, small(checkpoint__every=0, run__eval_every=0, **changes))
        return {name: x for name, x in held.items() if name.startswith("value")}

    assert differing(values(parallel__sync_every=2), values()) != []
    assert differing(values(parallel__sync_every=100, train__steps=100), values(train__steps=100)) == []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_apart_is_saved_and_taken_up(size, tmp_path):
    """Its outer momentum is in the checkpoint. With one replica the run goes on to the bits of one that was never stopped; with
    more, the checkpoint has the inner moments of one replica."""
    tokens = write_tokens(tmp_path)
    settings = {"parallel__sync_every": 2, "checkpoint__every": 2, "run__eval_every": 2, "train__steps": 4}
    once = trained(tiny(tokens, tmp_path / "whole", **settings), size)
    part = tiny(tokens, tmp_path / "part", **settings)
    stopped(part, size, at=2)
    assert any(
        OUTER_MOMENTUM.encode() in content for name, content in newest_tensors(part).items() if name.startswith("optimizer")
    )
    again = trained(part, size)
    assert again.keys() == once.keys()
    if size == 1:
        assert again == once


def test_a_run_that_was_together_goes_on_apart_and_the_other_way(tmp_path):
    tokens = write_tokens(tmp_path)
    settings = {"checkpoint__every": 2, "run__eval_every": 2, "checkpoint__allow_change": ("parallel.sync-every",)}
    run_ranks(2, lambda comm: loop.train(tiny(tokens, tmp_path / "run", train__steps=2, **settings), comm))
    run_ranks(
        2, lambda comm: loop.train(tiny(tokens, tmp_path / "run", train__steps=4, parallel__sync_every=2, **settings), comm)
    )
    run_ranks(2, lambda comm: loop.train(tiny(tokens, tmp_path / "run", train__steps=6, **settings), comm))


@pytest.mark.parametrize("key", ["parallel__compress", "parallel__sync_every"])
def test_another_result_is_another_run(tmp_path, key):
    """The folder that a run finds for itself is another one, and a resume with another value is refused."""
    assert mathematics(small()) != mathematics(small(checkpoint__every=0, run__eval_every=0, **{key: 4}))
    assert mathematics(small()) == mathematics(small(parallel__wire_dtype="bfloat16", parallel__zero=1))
    tokens = write_tokens(tmp_path)
    trained(tiny(tokens, tmp_path / "run", train__steps=2), 1)
    changed = tiny(tokens, tmp_path / "run", train__steps=4, checkpoint__every=0, run__eval_every=0, **{key: 4})
    with pytest.raises(CollectiveError, match=key.replace("__", ".")):
        trained(changed, 1)


class Poisoned:
    """Microbatches of a model that has one bad step: a weight is infinite for as long as it lasts."""

    def __init__(self, config, model, at):
        self.inner, self.model, self.at = RandomTokens(config), model, at

    def train(self, step, m):
        for flat in self.model.flats.values():
            flat.values.tensor[-1] = float("inf") if step == self.at else 1.0
        return self.inner.train(step, m)

    def target_tokens(self, step):
        return self.inner.target_tokens(step)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"parallel__wire_dtype": "bfloat16", "parallel__reduce": "sent"}),
        (2, {"parallel__wire_dtype": "bfloat16", "parallel__zero": 2}),
        (2, {"parallel__compress": 2}),
        (3, {"parallel__compress": 2, "parallel__pipeline": 1}),
    ],
)
def test_a_step_that_is_left_out_spoils_none_that_come(size, changes):
    config = small(model__d_model=32, model__n_heads=2, **changes)

    def body(comm):
        model = sharded(config, comm)
        source = Poisoned(config, model, at=1)
        return [train_step(model, source, step).updated for step in range(4)]

    assert all(found == [True, False, True, True] for found in run_ranks(size, body))


def test_replicas_meet_also_after_a_step_that_is_left_out():
    config = small(parallel__sync_every=2, checkpoint__every=0, run__eval_every=0, train__steps=100)

    def body(comm):
        model = sharded(config, comm)
        source = Poisoned(config, model, at=1)
        updated = [train_step(model, source, step).updated for step in range(2)]
        return updated, {"value": {piece: x.clone() for piece, x in model.owned_slices().items()}}

    found = run_ranks(2, body)
    assert found[0][0] == found[1][0] == [True, False]
    joined([values for _, values in found])  # the same on both


def test_a_run_that_is_stopped_apart_meets_first(tmp_path):
    tokens = write_tokens(tmp_path)
    config = tiny(tokens, tmp_path / "run", train__steps=50, parallel__sync_every=25, checkpoint__every=25, run__eval_every=25)
    (tmp_path / "run").mkdir()

    def step_and_ask(model, source, step, *more):
        if step == 2 and model.mesh.rank == 0:
            (tmp_path / "run" / "stop").touch()
        return train_step(model, source, step, *more)

    with mock.patch.object(loop, "train_step", step_and_ask), pytest.raises(CollectiveError, match="stopped after step"):
        run_ranks(2, lambda comm: loop.train(config, comm))
    (folder,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert step_of(folder) < 25


def test_the_inner_moments_of_a_checkpoint_are_one_replicas(tmp_path):
    config = small(parallel__sync_every=2, checkpoint__every=0, run__eval_every=0)
    held = run_ranks(3, lambda comm: {name: sharded(config, comm).shard_owners(name) for name in sharded(config, comm).shapes})
    assert {ranks[0] for of in held[0].values() for _, _, ranks in of} == {0}
    assert all(len(ranks) == 1 for of in held[0].values() for _, _, ranks in of)


def test_ranks_with_unequal_threads_cannot_compress(tmp_path):
    config = tiny(write_tokens(tmp_path), tmp_path / "run", parallel__compress=2)

    def detect_unequal(train, world):
        return replace(detect_hardware(train, world), threads=1 + world.rank)

    with (
        mock.patch.object(build, "detect_hardware", detect_unequal),
        pytest.raises(CollectiveError, match="with unequal threads or processors"),
    ):
        run_ranks(2, lambda comm: loop.train(config, comm))


def test_where_nothing_is_worth_compressing_all_travels_whole():
    config = small(parallel__compress=500)
    left, same = run_threads(2, config), run_threads(2, small(train__reproducible=False))
    assert left[0] == pytest.approx(same[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__compress": 4, "parallel__zero": 2}, "--parallel.compress 4 goes with --parallel.zero 0 or 1, not 2"),
        ({"parallel__compress": 4, "parallel__wire_dtype": "bfloat16"}, "--parallel.compress 4 sends float32"),
        ({"parallel__compress": 4, "parallel__sync_every": 20}, "between meetings no gradient travels; write one"),
        ({"parallel__compress": -1}, "--parallel.compress must not be negative"),
        ({"parallel__sync_every": 20, "parallel__zero": 1}, "--parallel.sync-every 20 goes with --parallel.zero 0, not 1"),
        (
            {"parallel__sync_every": 30},
            "--checkpoint.every 100: replicas are together after a multiple of --parallel.sync-every 30",
        ),
        ({"parallel__sync_every": 50}, "--run.eval-every 60: .* the nearest: 50"),
        ({"parallel__sync_every": 20, "fault__elastic": True}, "leave --parallel.sync-every out"),
        ({"parallel__wire_dtype": "bfloat16", "train__reproducible": False}, "cannot add it"),
        ({"parallel__wire_dtype": "float16"}, "--parallel.wire-dtype must be one of float32, bfloat16, not 'float16'"),
        ({"parallel__reduce": "fast"}, "--parallel.reduce must be one of auto, shared, sent, not 'fast'"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(replaced(tiny("", ""), **{"checkpoint__every": 100, "run__eval_every": 60, **changes}))
