"""Bad steps, bad state and replicas that differ: skipped, rewound or refused alike on every layout."""

import contextlib
import json
import math
import re
import shutil
import socket
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import pytest
import torch
from helpers import read_metrics
from runs import layout, read_tensor_files, train_to_end
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint.format import checkpoint_name
from mpilm.checkpoint.save import PendingCheckpoint
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.settings import override
from mpilm.data.batch import Batches
from mpilm.engine.pipelined import PipelinedModel
from mpilm.engine.step import train_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import NonFiniteError, RanksDisagreeError
from mpilm.optim.optimizer import Optimizer
from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.trainer import loop
from mpilm.trainer.build import build_run
from mpilm.trainer.loop import train
from mpilm.trainer.recovery.elastic import train_elastic
from mpilm.trainer.run import collect_state

BATCH = {"train__global_batch": 8, "run__eval_every": 0}  # 4 microbatches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


# Steps that are not finite.

NONFINITE = {**BATCH, "train__steps": 4, "checkpoint__every": 1, "checkpoint__keep": 0, "model__n_layers": 4}


@contextlib.contextmanager
def nonfinite_gradient(step, microbatch, name, value=math.nan):
    """Make the gradient of one parameter in one microbatch not finite, whichever rank computes it, each time."""

    def init(stage, *arguments):
        original(stage, *arguments)
        for n, parameter in stage.model.named_parameters():
            if n == name:
                parameter.register_hook(partial(hook, stage))

    def hook(stage, gradient):
        current = stage.inputs.step, stage.inputs.microbatch_ids[stage.backward_microbatch]
        return gradient * value if current == (step, microbatch) else gradient

    original = ModelStage.__init__
    with mock.patch.object(ModelStage, "__init__", init):
        yield


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, data):
    """The checkpoint of a serial run whose second step is skipped."""
    folder = tmp_path_factory.mktemp("skipped")
    with nonfinite_gradient(1, 3, "blocks.1.attn_norm.weight"):
        found = train_to_end(tiny_config(data, folder / "run", **NONFINITE), 1)
    assert train_to_end(tiny_config(data, folder / "clean", **NONFINITE), 1) != found
    return found


@pytest.mark.parametrize(
    ("size", "settings", "value", "resumes"),
    [
        (1, layout(), math.inf, False), (2, layout(), math.nan, False), (2, layout(2), math.inf, False),
        (3, layout(zero=1), math.nan, True), (4, layout(2, "zero-bubble", 3), math.inf, True),
        (2, layout(2, "interleaved"), math.nan, False),
    ],
)  # fmt: skip
def test_nonfinite_step_is_skipped_and_its_microbatch_named(tmp_path, data, skipped, size, settings, value, resumes, capsys):
    """A run resumed before or after the step skips it too."""
    config, run = tiny_config(data, tmp_path / "run", **NONFINITE, **settings), tmp_path / "run"
    with nonfinite_gradient(1, 3, "blocks.1.attn_norm.weight", value):
        assert train_to_end(config, size) == skipped
        (row,) = [row for row in read_metrics(run / "metrics.jsonl") if row.get("event") == "skipped"]
        assert row["step"] == 2
        assert "microbatch 3: gradient of blocks.1.attn_norm.weight)" in row["why"]
        assert "microbatch 3" in capsys.readouterr().out
        assert json.loads((run / "checkpoints" / checkpoint_name(4) / "trainer.json").read_text())["skipped"] == [2]
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == [checkpoint_name(step) for step in (1, 3, 4)]  # a skipped step is not saved: it changed nothing
        for removed in ((3, 4), (4,)) if resumes else ():
            for step in removed:
                shutil.rmtree(run / "checkpoints" / checkpoint_name(step))
            assert train_to_end(tiny_config(data, run, **NONFINITE), 1) == skipped


@pytest.mark.parametrize(
    ("size", "settings", "kind"),
    [(2, layout(), "weights"), (2, layout(2), "moments"), (3, layout(zero=1), "weights"), (4, layout(2, zero=3), "moments")],
)
def test_nonfinite_state_ends_the_run_and_is_not_saved(tmp_path, data, size, settings, kind):
    """With bad weights every loss is bad; with bad moments one loss is still good, but the weights after it are not."""

    def build_broken(config, comm, *more):
        run = build_run(config, comm, *more)
        if comm.rank == 1 or not run.model.zero:
            slices = run.model.owned_slices() if kind == "weights" else run.model.optimizer.state_slices()["exp_avg"]
            for values in slices.values():
                values.fill_(math.nan)
        run.model.all_gather_parameters()
        return run

    message = {
        "weights": r"step 4: loss nan, .*rank \d, microbatch \d: loss.*not finite: 4, and --fault.max-bad-steps allows 3",
        "moments": r"after step 1 \S+( \(exp_avg\))? of rank \d is not finite, although loss and gradient were",
    }[kind]
    config = tiny_config(data, tmp_path / "run", fault__max_bad_steps=3, checkpoint__every=1, **BATCH, **settings)
    with mock.patch.object(loop, "build_run", build_broken), pytest.raises(CollectiveError, match=message) as caught:
        run_ranks(size, lambda comm: train(config, comm))
    assert isinstance(caught.value.error, NonFiniteError)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "lock.json").exists()


# Spikes of the loss.

STEPS, SPIKES = 22, (17, 19)  # steps counted from 0
SPIKED = {
    **BATCH, "train__steps": STEPS, "checkpoint__every": 8, "checkpoint__keep": 0, "train__warmup_steps": 2, "train__lr": 1e-2,
    "train__spike_factor": 1.5,
}  # fmt: skip
TRAINED = {  # the steps that change the model: a rewind returns to the checkpoint of 16, then to the one saved after it
    "skip": [step for step in range(STEPS) if step not in SPIKES],
    "rewind": [*range(16), 20, 21],
}


@contextlib.contextmanager
def random_tokens_in(*steps):
    """Let these steps read random tokens."""

    def read(batches, step, m):
        batch = original(batches, step, m)
        generator = torch.Generator().manual_seed(1000 * step + m)
        tokens = torch.randint(0, 256, batch.tokens.shape, generator=generator)
        return replace(batch, tokens=tokens, targets=tokens.roll(-1, 1)) if step in steps else batch

    original = Batches.training_batch
    with mock.patch.object(Batches, "training_batch", read):
        yield


@pytest.fixture(scope="module")
def train_by_hand(tmp_path_factory, data):
    """A function that returns the checkpoint of a serial run of the steps in TRAINED."""

    @cache
    def train_steps(on_spike):
        folder = tmp_path_factory.mktemp(on_spike)
        run = build_run(tiny_config(data, folder / "run", **SPIKED), SelfComm())
        for step in TRAINED[on_spike]:
            train_step(run.model, run.batches, step)
        PendingCheckpoint(folder, STEPS, collect_state(run, STEPS, None), SelfComm()).finalize()
        return read_tensor_files(folder / checkpoint_name(STEPS))

    return train_steps


@pytest.mark.parametrize(
    ("on_spike", "size", "settings", "resumes"),
    [
        ("skip", 1, layout(), True), ("rewind", 2, layout(), False), ("skip", 2, layout(2), False),
        ("rewind", 3, layout(zero=1), False), ("rewind", 4, layout(2, zero=3), True),
    ],
)  # fmt: skip
def test_spike_of_the_loss_is_skipped_or_rewound(tmp_path, data, train_by_hand, on_spike, size, settings, resumes, capsys):
    config = tiny_config(data, tmp_path / "run", train__on_spike=on_spike, **SPIKED, **settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    with random_tokens_in(*SPIKES):
        found = train_to_end(config, size)
        output = capsys.readouterr().out
        trainer = json.loads((checkpoints / checkpoint_name(STEPS) / "trainer.json").read_text())
        if resumes:
            shutil.rmtree(checkpoints / checkpoint_name(STEPS))
            assert train_to_end(override(config, parallel__pipeline=1, parallel__zero=0), 1 if size > 1 else 3) == found
        if resumes and on_spike == "rewind":  # from the checkpoint of 16, which knows of no spike
            for path in sorted(checkpoints.iterdir())[2:]:
                shutil.rmtree(path)
            assert train_to_end(config, size) == found
    assert found == train_by_hand(on_spike)
    assert re.search(r"step 18: loss \d\.\d+, gradient norm \d+\.\d+ \(a spike: above \d\.\d+\); ", output)
    assert ("steps 17 to 18 are skipped" in output) == (on_spike == "rewind")
    assert trainer["bad"] == [step + 1 for step in SPIKES]
    assert trainer["skipped"] == [step + 1 for step in range(STEPS) if step not in TRAINED[on_spike]]


# Memory that flips bits.

FLIPPED = {**BATCH, "train__steps": 5, "checkpoint__every": 1, "checkpoint__keep": 1}


@pytest.fixture(scope="module")
def clean(tmp_path_factory, data):
    """The checkpoint of a serial run without a fault."""
    return train_to_end(tiny_config(data, tmp_path_factory.mktemp("clean") / "run", **FLIPPED), 1)


@contextlib.contextmanager
def flipped_weight(owner, method, rank, part, after=False):
    """Flip a bit of a weight on `rank` once, when `method` is called in the third step or, with `after`, when it returns.
    `part`: of StateDigests. Yields a list for the parameter's name."""

    def call(model, *arguments, **options):
        flips = model.mesh.rank == rank and model.mesh.recorder.step == 2 and not names
        if flips and not after:
            flip(model)
        result = original(model, *arguments, **options)
        if flips and after:
            flip(model)
        return result

    def flip(model):
        name, values = getattr(model.digests, part)[0]
        values[:1].view(torch.int32).bitwise_xor_(1 << 30)
        names.append(name)

    names, original = [], getattr(owner, method)
    with mock.patch.object(owner, method, call):
        yield names


@pytest.mark.parametrize(
    ("size", "settings", "rank", "part", "when"),
    [
        (1, layout(), 0, "moments", "save"), (2, layout(), 1, "owned", "save"), (4, layout(2), 2, "owned", "gather"),
        (2, layout(zero=1), 0, "owned", "gather"), (2, layout(zero=1), 1, "received", "save"),
        (4, layout(zero=2), 3, "owned", "save"), (2, layout(zero=2), 0, "received", "forward"),
        (2, layout(zero=3), 1, "owned", "save"), (4, layout(2, zero=3), 2, "moments", "forward"),
    ],
)  # fmt: skip
def test_flipped_weight_is_named_and_not_saved_and_the_run_resumes(tmp_path, data, clean, size, settings, rank, part, when):
    owner, method, after, done = {
        "forward": (TrainModel, "forward_backward", False, 2),
        "gather": (PipelinedModel, "all_gather_parameters", False, 3),
        "save": (loop, "train_step", True, 3),
    }[when]
    config = tiny_config(data, tmp_path / "run", checkpoint__asynchronous=size < 4, **FLIPPED, **settings)
    with flipped_weight(owner, method, rank, part, after) as names, pytest.raises(CollectiveError) as caught:
        run_ranks(size, lambda comm: train(config, comm))
    assert isinstance(caught.value.error, RanksDisagreeError)
    where = rf"{re.escape(names[0])} on rank {rank} \({socket.gethostname()}\)"
    assert re.match(rf"after step {done}: {where} changed since the last update \(bit 30 of an element\): ", str(caught.value))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [checkpoint_name(2)]
    assert train_to_end(config, size) == clean


@pytest.mark.parametrize(
    ("size", "settings", "kind", "message"),
    [
        (3, layout(), "value", r"on rank 1 \(\S+\) differed from most of the 3 replicas"),
        (2, layout(), "value", r"on ranks 0, 1 \(\S+\) differed from the other replica"),
        (6, layout(2), "value", r"on rank 1 \(\S+\) differed from most of the 3 replicas"),
        (3, layout(), "exp_avg", r"\(exp_avg\) on rank 1 \(\S+\) differed from most of the 3 replicas"),
    ],
)
def test_replica_that_updates_otherwise_is_named(tmp_path, data, size, settings, kind, message):
    """Wrong weights are found in the next step, wrong moments before they are saved."""

    def step(optimizer, gradients, lr):
        original(optimizer, gradients, lr)
        flat = next(iter(optimizer.optimizers[0].flats.values()))
        if flat.comm.rank == 1 and gradients.keys() & {(0, False)} and optimizer.optimizers[0].count == 3:
            slices = flat.owned_slices(flat.values) if kind == "value" else optimizer.state_slices()[kind]
            next(iter(slices.values()))[:1].view(torch.int32).bitwise_xor_(1)

    original = Optimizer.step
    every = 0 if kind == "value" else 3
    config = tiny_config(data, tmp_path / "run", fault__check_every=0, checkpoint__every=every, **BATCH, **settings)
    with mock.patch.object(Optimizer, "step", step), pytest.raises(CollectiveError, match=f"after step 3: .*{message}"):
        run_ranks(size, lambda comm: train(config, comm))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_parameter_that_tensor_ranks_share_is_compared_in_the_next_step(tmp_path, data):
    def step(optimizer, gradients, lr):
        original(optimizer, gradients, lr)
        flat = optimizer.optimizers[0].flats[0, False]
        if any("parts.1" in name for name in flat.layout.spans) and optimizer.optimizers[0].count == 3:
            flat.parameter("norm.weight", flat.values)[:1].view(torch.int32).bitwise_xor_(1)

    original = Optimizer.step
    heads = {"model__n_heads": 4, "model__n_kv_heads": 4}
    config = tiny_config(
        data, tmp_path / "run", fault__check_every=0, checkpoint__every=0, **BATCH, **heads, **layout(tensor=2)
    )
    message = r"after step 3: norm.weight on ranks 0, 1 \(\S+\) differed from the other replica"
    with mock.patch.object(Optimizer, "step", step), pytest.raises(CollectiveError, match=message):
        run_ranks(2, lambda comm: train(config, comm))


# Ranks that no pipeline needs.


def test_spare_rank_ends_with_the_error_of_the_others(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", train__steps=50, run__time_limit=1e-3, **BATCH, **layout(2))

    def train_with_spare(comm):
        comm.is_fault_tolerant = True
        with pytest.raises(CollectiveError, match="stopped after step 1 of 50"):
            train_elastic(config, comm)
        comm.barrier()

    run_ranks(3, train_with_spare)
