"""Local SGD with an outer optimizer: replicas that train independently, synchronize, are saved and resumed."""

from unittest import mock

import pytest
from runs import (
    CPU,
    assemble,
    build_train_model,
    differing,
    newest_tensors,
    small_config,
    train_on_threads,
    train_to_end,
    train_until_killed,
)
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint.format import checkpoint_step, list_checkpoints
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import microbatch_count, resolve_config, result_settings
from mpilm.config.settings import override
from mpilm.engine.step import train_step
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import ParamLayout
from mpilm.parallel.reduce.diloco import OUTER_BETA, OUTER_LR, OUTER_MOMENTUM, DiLoCo
from mpilm.trainer import loop
from mpilm.verification.layouts import RandomTokens

QUIET = {"checkpoint__every": 0, "run__eval_every": 0}  # neither has to fit the synchronizations


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


def values_of(model):
    return {"value": {item: x.clone() for item, x in model.owned_slices().items()}}


def test_synchronization_is_a_step_of_the_outer_optimizer():
    def body(comm):
        flat = FlatParameters({name: ParamLayout(name, shape) for name, shape in {"a": (24, 40), "b": (40,)}.items()}, CPU)
        diloco = DiLoCo({(0, False): flat}, comm, every=2)
        x = flat.values.tensor.fill_(1.0)
        positions = []
        for sync in range(2):
            diloco.begin_step()
            x.sub_(0.1 * (comm.rank + 1) * (sync + 1))
            diloco.sync()
            positions.append(float(x[0]))
        return positions, float(diloco.owned_slices()[next(iter(diloco.owned_slices()))][0])

    found = run_ranks(3, body)
    assert all(theirs == found[0] for theirs in found)
    momentum, position, expected = 0.0, 1.0, []
    for delta in (0.2, 0.4):
        momentum = OUTER_BETA * momentum + delta
        position -= OUTER_LR * (delta + OUTER_BETA * momentum)
        expected.append(position)
    assert found[0][0] == pytest.approx(expected)
    assert found[0][1] == pytest.approx(momentum)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_replica_between_synchronizations_is_a_run_of_its_own(pipeline):
    """Its weights are those of one rank that trains on these microbatches alone."""
    config = small_config(
        parallel__sync_every=3, parallel__pipeline=pipeline, train__clip_norm=0.0, model__dropout=0.0, train__steps=100,
        **QUIET,
    )  # fmt: skip

    def body(comm):
        model = build_train_model(config, comm)
        for step in range(2):
            train_step(model, RandomTokens(config), step)
        assert not model.are_replicas_in_sync(2)
        return model.replicas.rank, model.owned_slices()

    class Half:
        """The microbatches of one replica."""

        def __init__(self, r, each):
            self.inner, self.first = RandomTokens(config), r * each

        def training_batch(self, step, m):
            return self.inner.training_batch(step, m + self.first)

        def target_tokens(self, step):
            return self.inner.target_tokens(step) // 2

    each = microbatch_count(config) // 2
    alone = override(config, parallel__sync_every=0, parallel__pipeline=1, train__global_batch=each * config.train.micro_batch)

    def train_alone(r):
        def one(comm):
            model = build_train_model(resolve_config(alone), comm)
            for step in range(2):
                train_step(model, Half(r, each), step)
            return {"value": model.owned_slices()}

        return assemble(run_ranks(1, one))

    found, references = run_ranks(2 * pipeline, body), [train_alone(0), train_alone(1)]
    for r in range(2):
        replica = assemble([{"value": slices} for data, slices in found if data == r])
        assert differing(replica, references[r]) == []
    assert differing(*references) != []


def test_replicas_are_equal_after_a_synchronization_and_at_the_end():
    config = small_config(parallel__sync_every=2, train__steps=3, **QUIET)

    def body(comm):
        model, found = build_train_model(config, comm), []
        for step in range(3):
            train_step(model, RandomTokens(config), step)
            found.append(values_of(model))
            assert model.are_replicas_in_sync(step + 1) == (step > 0)
        return found

    found = run_ranks(4, body)
    with pytest.raises(AssertionError, match="replicas differ"):
        assemble([theirs[0] for theirs in found])
    for step in (1, 2):
        assemble([theirs[step] for theirs in found])  # equal on all


def test_single_replica_takes_outer_steps_too():
    def values(**changes):
        _, tensors = train_on_threads(1, small_config(**QUIET, **changes))
        return {name: x for name, x in tensors.items() if name.startswith("value")}

    assert differing(values(parallel__sync_every=2), values()) != []
    assert differing(values(parallel__sync_every=100, train__steps=100), values(train__steps=100)) == []


@pytest.mark.parametrize("size", [1, 3])
def test_local_sgd_run_is_saved_with_outer_momentum_and_resumed(size, tmp_path, data):
    """One replica resumes to the bits of an uninterrupted run; of more, the checkpoint has the inner moments of one."""
    settings = {"parallel__sync_every": 2, "checkpoint__every": 2, "run__eval_every": 2, "train__steps": 4}
    uninterrupted = train_to_end(tiny_config(data, tmp_path / "uninterrupted", **settings), size)
    config = tiny_config(data, tmp_path / "resumed", **settings)
    train_until_killed(config, size, 2)
    saved = newest_tensors(config)
    assert any(OUTER_MOMENTUM.encode() in content for name, content in saved.items() if name.startswith("optimizer"))
    resumed = train_to_end(config, size)
    assert resumed.keys() == uninterrupted.keys()
    if size == 1:
        assert resumed == uninterrupted


def test_resumed_run_may_switch_to_local_sgd_and_back(tmp_path, data):
    settings = {"checkpoint__every": 2, "run__eval_every": 2, "checkpoint__allow_change": ("parallel.sync-every",)}
    for steps, sync_every in ((2, 0), (4, 2), (6, 0)):
        train_to_end(tiny_config(data, tmp_path / "run", train__steps=steps, parallel__sync_every=sync_every, **settings), 2)
    (newest,) = list_checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert checkpoint_step(newest) == 6


@pytest.mark.parametrize("key", ["parallel__powersgd_rank", "parallel__sync_every"])
def test_resume_with_another_way_to_reduce_is_refused(tmp_path, data, key):
    assert result_settings(small_config()) != result_settings(small_config(**QUIET, **{key: 4}))
    assert result_settings(small_config()) == result_settings(small_config(parallel__wire_dtype="bfloat16", parallel__zero=1))
    train_to_end(tiny_config(data, tmp_path / "run", train__steps=1), 1)
    changed = tiny_config(data, tmp_path / "run", train__steps=4, **QUIET, **{key: 4})
    with pytest.raises(CollectiveError, match=key.replace("__", ".")):
        train_to_end(changed, 1)


class InfiniteWeight:
    """Microbatches of a model with one bad step, during which a weight is infinite."""

    def __init__(self, config, model, bad_step):
        self.inner, self.model, self.bad_step = RandomTokens(config), model, bad_step

    def training_batch(self, step, m):
        for flat in self.model.flats.values():
            flat.values.tensor[-1] = float("inf") if step == self.bad_step else 1.0
        with self.model.digests.recording():  # as if an update had written it
            pass
        return self.inner.training_batch(step, m)

    def target_tokens(self, step):
        return self.inner.target_tokens(step)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"parallel__wire_dtype": "bfloat16", "parallel__reduce": "messages"}),
        (2, {"parallel__wire_dtype": "bfloat16", "parallel__zero": 2}),
        (3, {"parallel__powersgd_rank": 2}),
    ],
)
def test_skipped_step_leaves_no_bad_residuals(size, changes):
    config = small_config(model__d_model=32, model__n_heads=2, **changes)

    def body(comm):
        model = build_train_model(config, comm)
        source = InfiniteWeight(config, model, bad_step=1)
        return [train_step(model, source, step).updated for step in range(4)]

    assert all(found == [True, False, True, True] for found in run_ranks(size, body))


def test_replicas_synchronize_after_a_skipped_step_too():
    config = small_config(parallel__sync_every=2, train__steps=100, **QUIET)

    def body(comm):
        model = build_train_model(config, comm)
        source = InfiniteWeight(config, model, bad_step=1)
        return [train_step(model, source, step).updated for step in range(2)], values_of(model)

    found = run_ranks(2, body)
    assert found[0][0] == found[1][0] == [True, False]
    assemble([values for _, values in found])  # equal on both


def test_run_stopped_between_synchronizations_synchronizes_first(tmp_path, data):
    settings = {"parallel__sync_every": 25, "checkpoint__every": 25, "run__eval_every": 25}
    config = tiny_config(data, tmp_path / "run", train__steps=50, **settings)
    (tmp_path / "run").mkdir()

    def step_then_request_stop(model, source, step, *more):
        if step == 2 and model.mesh.rank == 0:
            (tmp_path / "run" / "stop").touch()
        return train_step(model, source, step, *more)

    with (
        mock.patch.object(loop, "train_step", step_then_request_stop),
        pytest.raises(CollectiveError, match="stopped after step"),
    ):
        run_ranks(2, lambda comm: loop.train(config, comm))
    (folder,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint_step(folder) < 25


def test_checkpoint_takes_inner_moments_from_one_replica():
    def owners(comm):
        model = build_train_model(small_config(parallel__sync_every=2, **QUIET), comm)
        return [ranks for name in model.shapes for _, _, ranks in model.shard_owners[name]]

    assert all(ranks == [0] for ranks in run_ranks(3, owners)[0])
