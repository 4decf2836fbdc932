"""Training over a corpus: the mathematics of the plain loop, the same bits on any ranks and however often interrupted.

tests/ranks/test_layouts.py has every layout, on random tokens.
"""

import contextlib
import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from checkpoints import write_hf_model
from runs import FAMILIES, differing, held, joined, on, stopped, tensors_of, trained, whole_batch, whole_model
from text import tiny, write_tokens
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from mpilm.checkpoint.format import checkpoint_name
from mpilm.checkpoint.pretrained import read_pretrained_config
from mpilm.checkpoint.save import save_checkpoint
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import DataConfig, override
from mpilm.data.batch import Batches
from mpilm.data.prepare import prepare_tokens
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.engine import hardware as machine
from mpilm.engine.step import total_loss, train_step, validation_loss
from mpilm.errors import NonFiniteError, RanksDisagreeError
from mpilm.model.loss import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.optim.schedule import learning_rate
from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.telemetry.metrics import read_metrics
from mpilm.testing.threads import run_ranks
from mpilm.trainer import loop
from mpilm.trainer.build import build_run
from mpilm.trainer.loop import train
from mpilm.trainer.run import collect_state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


def outcome(config, size):
    """Losses, norms and evaluation, on which all ranks agree, and the bits of weights and moments."""

    def body(comm):
        run = build_run(config, comm)
        results = [train_step(run.model, run.batches, step) for step in range(config.train.steps)]
        numbers = [number for result in results for number in (result.loss, result.grad_norm)]
        return [*numbers, validation_loss(run)], held(run.model)

    left = run_ranks(size, body)
    numbers = left[0][0]
    assert all(theirs == numbers for theirs, _ in left)
    assert all(map(math.isfinite, numbers))
    return numbers, joined([pieces for _, pieces in left])


@pytest.mark.parametrize(
    ("size", "layout", "changes"),
    [
        (3, on(), {}),
        (5, on(), {"train__clip_norm": 0.1, "train__global_batch": 22}),  # 11 microbatches
        (2, on(2), {"model__tie_embeddings": False, "model__n_kv_heads": 4}),
        (8, on(2, "zero-bubble", 3), {}),
        (4, on(zero=1), {"model__dropout": 0.0, "train__dtype": "bfloat16"}),
    ],
    ids=["replicas", "uneven", "stages", "shards of stages", "shards"],
)
def test_the_bits_do_not_depend_on_the_ranks(tmp_path, data, size, layout, changes):
    changes = {"train__steps": 3, "run__eval_batches": 2, **changes}
    alone = outcome(tiny(data, tmp_path / "alone", **changes), 1)
    together = outcome(tiny(data, tmp_path / "together", **layout, **changes), size)
    assert together[0] == alone[0]
    assert differing(together[1], alone[1]) == []
    assert alone[0][0] > alone[0][4]  # it does learn


def test_the_library_sum_is_close_and_not_the_same(tmp_path, data):
    exact = outcome(tiny(data, tmp_path / "a", train__steps=3), 3)
    library = outcome(tiny(data, tmp_path / "b", train__steps=3, train__reproducible=False), 3)
    assert library[0] == pytest.approx(exact[0], rel=1e-5)
    assert differing(library[1], exact[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_plain_training_loop(tmp_path, data, family):
    """transformers' model, torch's AdamW and torch's clipping on the same batches."""
    changes = {"train__steps": 50, "model__dropout": 0.0, "train__clip_norm": 0.5, "model__router_loss": 0.0}
    config = tiny(data, tmp_path / "run", **changes, **FAMILIES[family])
    settings = config.train
    run = build_run(config, SelfComm())
    write_hf_model(tmp_path / "start", run.model.stages[0].model, config.model, run.model.vocab_size)
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    reference = auto.from_pretrained(tmp_path / "start")
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))
    clipped = 0
    for step in range(settings.steps):
        tokens, targets = whole_batch(run.batches, step, 8)
        loss = torch.nn.functional.cross_entropy(reference(tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.clip_norm))
        clipped += norm > settings.clip_norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        result = train_step(run.model, run.batches, step)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5), step
        assert result.grad_norm == pytest.approx(norm, rel=1e-3), step
    assert clipped > 0
    assert result.loss < 5.0  # from ln 257 = 5.5


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (3, on(zero=3)), (2, on(2))])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_a_folder(tmp_path, data, family, size, layout):
    """The first loss is that of the model in the folder, and the checkpoint keeps its shape and its vocabulary."""
    shape = {"model__dropout": 0.0, "model__vocab_size": 300, **FAMILIES[family]}
    config = tiny(data, tmp_path / "run", train__steps=1, **shape, **layout)
    torch.manual_seed(0)
    model, _ = whole_model(config.model, 300, torch.device("cpu"))
    for p in model.parameters():
        p.data.normal_(0.0, 0.1)
    write_hf_model(tmp_path / "start", model, config.model, 300)
    config = override(config, model__init_from=str(tmp_path / "start"))
    run_ranks(size, lambda comm: train(config, comm))
    run = build_run(tiny(data, tmp_path / "other", **shape), SelfComm())
    batches = [run.batches.training_batch(0, m) for m in range(8)]
    with torch.no_grad():
        losses = [float(loss_sum(model(batch.tokens, SequenceInfo(batch.positions)), batch.targets)) for batch in batches]
    row = next(row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("step") == 1)
    assert row["loss"] == pytest.approx(sum(losses) / run.batches.target_tokens(0), rel=1e-6)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert read_pretrained_config(checkpoint) == replace(config.model, init_from="")
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    assert auto.from_pretrained(checkpoint).config.vocab_size == 300


def test_evaluation_is_the_mean_over_the_held_out_text(tmp_path, data):
    """All of it, without dropout, and the last microbatch smaller than the others."""
    config = tiny(data, tmp_path / "run", run__eval_batches=0, train__micro_batch=4, data__eval_fraction=0.031)
    run = build_run(config, SelfComm())
    rows = [run.batches.evaluation_batch(i) for i in range(run.batches.eval_microbatches())]
    assert rows[-1].tokens.shape[0] < 4
    with torch.no_grad():
        logits = [run.model.stages[0].model(batch.tokens, SequenceInfo(batch.positions)).flatten(0, 1) for batch in rows]
    targets = torch.cat([batch.targets.flatten() for batch in rows])
    expected = float(torch.nn.functional.cross_entropy(torch.cat(logits).double(), targets))
    assert validation_loss(run) == pytest.approx(expected, rel=1e-6)


def test_losses_are_added_in_the_order_of_microbatches():
    losses = [1e16, 1.0, -1e16, 3.0, 1e-3]
    owned = [{1: losses[1]}, {0: losses[0], 4: losses[4]}, {}, {2: losses[2], 3: losses[3]}]
    assert run_ranks(4, lambda comm: total_loss(owned[comm.rank], 5, comm)) == [sum(losses)] * 4
    assert sum(losses) != sum(reversed(losses))


BAD_LAYOUTS = [(1, on()), (2, on()), (2, on(2)), (3, on(zero=1)), (4, on(2, "zero-bubble", 3)), (2, on(2, "interleaved"))]


@contextlib.contextmanager
def poisoned(at, name, value=math.nan):
    """The gradient of one parameter in one microbatch (step, number) is not finite, on whichever rank computes it, always."""

    def made(stage, *arguments):
        plain(stage, *arguments)
        for n, parameter in stage.model.named_parameters():
            if n == name:
                parameter.register_hook(partial(poison, stage))

    def poison(stage, gradient):
        here = stage.inputs.step, stage.inputs.numbers[stage.in_backward]
        return gradient * value if here == at else gradient

    plain = ModelStage.__init__
    with mock.patch.object(ModelStage, "__init__", made):
        yield


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("size", "layout"), BAD_LAYOUTS, ids=str)
def test_a_step_that_is_not_finite_is_left_out_and_the_microbatch_named(tmp_path, data, size, layout, value, capsys):
    """And a run that meets it again does the same, also from a checkpoint between."""
    asked = {"train__steps": 4, "checkpoint__every": 1, "checkpoint__keep": 0, "model__n_layers": 4, "run__eval_every": 0}
    with poisoned((1, 5), "blocks.1.attn_norm.weight", value):
        whole = trained(tiny(data, tmp_path / "whole", **asked), 1)
        config = tiny(data, tmp_path / "run", **asked, **layout)
        assert trained(config, size) == whole
        rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "skipped"]
        assert [row["step"] for row in rows] == [2]
        assert "microbatch 5: gradient of blocks.1.attn_norm.weight)" in rows[0]["why"]
        assert "microbatch 5" in capsys.readouterr().out
        names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert names == [checkpoint_name(step) for step in (1, 3, 4)]  # nothing is saved of a step that changed nothing
        for later in (3, 4):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint_name(later))
        assert trained(tiny(data, tmp_path / "run", **asked), 1) == whole
        shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint_name(4))
        assert trained(tiny(data, tmp_path / "run", **asked), 1) == whole
        saved = json.loads((tmp_path / "run" / "checkpoints" / checkpoint_name(4) / "trainer.json").read_text())
        assert saved["skipped"] == [2]
    assert trained(tiny(data, tmp_path / "clean", **asked), 1) != whole


@pytest.mark.parametrize(("size", "layout"), [(2, on()), (2, on(2)), (3, on(zero=1)), (4, on(2, zero=3))])
@pytest.mark.parametrize("what", ["weights", "moments"])
def test_a_state_that_is_not_finite_ends_the_run_and_nothing_is_saved(tmp_path, data, size, layout, what):
    """With bad weights every loss is bad; with bad moments one loss is still good, and the weights after it are not."""

    def broken(config, comm, *more):
        run = build_run(config, comm)
        if comm.rank == 1 or not run.model.zero:
            pieces = run.model.owned_slices() if what == "weights" else run.model.optimizer.state_slices()["exp_avg"]
            for values in pieces.values():
                values.fill_(math.nan)
        run.model.all_gather_parameters()
        return run

    said = {
        "weights": r"step 4: loss nan, .*rank \d, microbatch \d: loss.*not finite: 4, and --fault.max-bad-steps allows 3",
        "moments": r"after step 1 \S+ is not finite \(on rank \d\), although loss and gradient were; nothing is saved",
    }[what]
    config = tiny(data, tmp_path / "run", fault__max_bad_steps=3, checkpoint__every=1, **layout)
    with mock.patch.object(loop, "build", broken), pytest.raises(CollectiveError, match=said) as caught:
        run_ranks(size, lambda comm: train(config, comm))
    assert isinstance(caught.value.error, NonFiniteError)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "lock.json").exists()


@contextlib.contextmanager
def nonsense(*steps):
    """These steps read random tokens."""

    def read(batches, step, m):
        batch = plain(batches, step, m)
        draw = torch.Generator().manual_seed(1000 * step + m)
        wrong = torch.randint(0, 256, batch.tokens.shape, generator=draw)
        return replace(batch, tokens=wrong, targets=wrong.roll(-1, 1)) if step in steps else batch

    plain = Batches.training_batch
    with mock.patch.object(Batches, "training_batch", read):
        yield


SPIKED = {
    "train__steps": 30, "checkpoint__every": 8, "train__warmup_steps": 2, "train__lr": 1e-2, "run__eval_every": 0,
    "train__spike_factor": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("way", ["skip", "rewind"])
@pytest.mark.parametrize(("size", "layout"), [(1, on()), (2, on()), (2, on(2)), (3, on(zero=1)), (4, on(2, zero=3))])
def test_a_loss_that_leaps_is_left_out(tmp_path, data, size, layout, way, capsys):
    """Steps 26 and 28; back to the checkpoint of 24, and then to the one made on coming back to it."""
    config = tiny(data, tmp_path / "run", train__on_spike=way, checkpoint__keep=0, **SPIKED, **layout)
    kept = [*range(24), 28, 29] if way == "rewind" else [step for step in range(30) if step not in (25, 27)]
    with nonsense(25, 27):
        left = trained(config, size)
        by_hand = build_run(tiny(data, tmp_path / "hand", **SPIKED), SelfComm())
        for step in kept:
            train_step(by_hand.model, by_hand.batches, step)
        save_checkpoint(tmp_path / "hand", 30, collect_state(by_hand, 30, None), SelfComm())
        assert left == tensors_of(tmp_path / "hand" / checkpoint_name(30))
        said = capsys.readouterr().out
        assert re.search(r"step 26: loss \d\.\d+, gradient norm \d+\.\d+ \(a spike: above \d\.\d+\); ", said)
        assert ("steps 25 to 26 are left out" in said) == (way == "rewind")
        folder = tmp_path / "run" / "checkpoints" / checkpoint_name(30)
        saved = json.loads((folder / "trainer.json").read_text())
        assert saved["bad"] == [26, 28]
        assert saved["skipped"] == [step + 1 for step in range(30) if step not in kept]
        shutil.rmtree(folder)
        assert trained(override(config, parallel__pipeline=1, parallel__zero=0), 1 if size > 1 else 3) == left
        for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[3:]:
            shutil.rmtree(path)
        if way == "rewind":  # from 24, which knows nothing of what comes
            assert trained(config, size) == left


def test_a_leap_is_what_the_setting_says(tmp_path, data):
    with nonsense(25, 27):
        config = tiny(data, tmp_path / "run", **SPIKED)
        ignored = trained(config, 1)
        far = override(config, train__on_spike="skip", train__spike_factor=1e6, run__dir=str(tmp_path / "far"))
        assert trained(far, 1) == ignored
        near = override(config, train__on_spike="skip", fault__max_bad_steps=1, run__dir=str(tmp_path / "near"))
        with pytest.raises(CollectiveError, match=r"not finite, or spikes: 2, and --fault.max-bad-steps allows 1") as caught:
            trained(near, 1)
        assert isinstance(caught.value.error, NonFiniteError)


OF_THREE = "on all 3 replicas, and rank 1 differs from most"


@pytest.mark.parametrize(
    ("size", "layout", "said"),
    [(3, on(), OF_THREE), (2, on(), "on all 2 replicas, and the two differ"), (3, on(zero=2), OF_THREE), (6, on(2), OF_THREE)],
)
def test_a_replica_that_drifts_is_named(tmp_path, data, size, layout, said):
    """One weight, by one bit, on one rank, in step 3; it is looked for after every second step."""
    name = "blocks.1.mlp.up.weight" if layout.get("parallel__pipeline") == 1 else "embed.weight"

    def step_and_drift(model, source, step, *more):
        result = train_step(model, source, step, *more)
        if (model.mesh.rank, step) == (1, 2):
            flat = next(flat for flat in model.flats.values() if name in flat.layout.spans)
            flat.parameter(name).view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return result

    config = tiny(data, tmp_path / "run", fault__check_every=2, **layout)
    with mock.patch.object(loop, "train_step", step_and_drift), pytest.raises(CollectiveError, match=said) as caught:
        run_ranks(size, lambda comm: train(config, comm))
    assert isinstance(caught.value.error, RanksDisagreeError)
    assert f"after step 5: {name}" in str(caught.value) or f"after step 3: {name}" in str(caught.value)


def test_ranks_with_other_programs_do_not_train(tmp_path, data):
    versions = iter(["2.12.0", "2.13.0", "2.13.0"])
    said = pytest.raises(CollectiveError, match=r"the ranks were started with different programs:\n  torch: ")
    with said, mock.patch.object(machine, "versions", side_effect=lambda _: {"mpilm": 1, "torch": next(versions), "mpi": 0}):
        run_ranks(3, lambda comm: train(tiny(data, tmp_path / "run"), comm))
    assert not (tmp_path / "run").exists()


# Stopping and going on.


def losses(config):
    """The rows of metrics.jsonl without times and starts."""
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [
        {k: row[k] for k in ("step", "tokens", "loss", "grad_norm", "lr", "eval_loss") if k in row}
        for row in rows
        if "event" not in row
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    config = tiny(data, tmp_path_factory.mktemp("whole") / "run")
    return trained(config, 1), losses(config)


@pytest.mark.parametrize(
    ("first", "then", "at"),
    [
        ((1, on()), (1, on()), 3),
        ((1, on()), (3, on()), 5),
        ((2, on(2)), (3, on(zero=2)), 4),
        ((4, on(2, zero=3)), (1, on()), 2),
        ((3, on()), (8, on()), 5),
    ],
)
def test_going_on_is_as_if_never_stopped(tmp_path, data, uninterrupted, first, then, at):
    before, after = (tiny(data, tmp_path / "run", checkpoint__every=2, **layout) for _, layout in (first, then))
    stopped(before, first[0], at)
    saved = at // 2 * 2
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # the row that was being written
    kept = b"".join(line for line in metrics.read_bytes().splitlines(keepends=True)[:-1] if json.loads(line)["step"] <= saved)
    (tmp_path / "run" / "checkpoints" / ".writing-step-00000006").mkdir()
    assert trained(after, then[0]) == uninterrupted[0]
    assert metrics.read_bytes().startswith(kept)
    assert b'"lo{' not in metrics.read_bytes()
    starts = [row for row in read_metrics(metrics) if row.get("event") == "start"]
    assert [(row["step"], row["ranks"]) for row in starts] == [(0, first[0]), (saved, then[0])]
    assert [row["layout"]["pipeline"] for row in starts] == [before.parallel.pipeline, after.parallel.pipeline]
    rows = losses(after)
    assert [row for row in rows if "loss" in row] == [row for row in uninterrupted[1] if "loss" in row]
    assert [row for row in rows if row["step"] == 6] == [row for row in uninterrupted[1] if row["step"] == 6]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, data, uninterrupted, capsys):
    config = tiny(data, tmp_path / "run", checkpoint__every=2)
    stopped(config, 1, at=5)
    newest = tmp_path / "run" / "checkpoints" / checkpoint_name(4)
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    trained(config, 2)
    assert "optimizer.safetensors has been altered" in capsys.readouterr().out
    assert losses(config)[-1] == uninterrupted[1][-1]


def test_a_longer_run_goes_on_where_the_rate_does_not_depend_on_the_length(tmp_path, data):
    def config(name, steps):
        return tiny(data, tmp_path / name, train__steps=steps, train__lr_schedule="constant", run__eval_every=0)

    whole = trained(config("whole", 6), 1)
    trained(config("parts", 3), 2)
    assert trained(config("parts", 6), 3) == whole
    assert losses(config("parts", 6)) == losses(config("whole", 6))


def test_a_complete_run_is_left_as_it_is(tmp_path, data, capsys):
    config = tiny(data, tmp_path / "run")
    before = trained(config, 1)
    rows = losses(config)
    capsys.readouterr()
    assert trained(config, 2) == before
    assert losses(config) == rows
    assert "this run is complete; a larger --train.steps goes on from step 6" in capsys.readouterr().out


def test_one_checkpoint_starts_a_branch(tmp_path, data, uninterrupted):
    config = tiny(data, tmp_path / "run", checkpoint__every=2)
    stopped(config, 2, at=5)
    start = tmp_path / "run" / "checkpoints" / checkpoint_name(4)
    branch = tiny(data, tmp_path / "branch", checkpoint__resume=str(start))
    assert trained(branch, 1) == uninterrupted[0]
    assert trained(override(branch, run__dir=str(tmp_path / "other"), **on(2)), 2) == uninterrupted[0]
    assert start.exists()


# Several corpora.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three parts of one text and two of another, prepared with one tokenizer and not prepared at all."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "b.txt").write_text("".join(f"{i} mal {i % 7} ist {i * (i % 7)}.\n" for i in range(900)))
    return str(write_tokens(folder / "a")), "3", str(folder / "b.txt"), "2"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize(("size", "layout"), [(3, on(zero=3)), (2, on(2))])
def test_a_mixture_has_the_same_bits_on_any_ranks(tmp_path, mixed, size, layout):
    changes = {"train__steps": 3, "run__eval_batches": 2}
    alone = outcome(tiny(mixed, tmp_path / "alone", **changes), 1)
    together = outcome(tiny(mixed, tmp_path / "together", **layout, **changes), size)
    assert together[0] == alone[0]
    assert differing(together[1], alone[1]) == []


def test_a_mixture_is_taken_up_again_where_it_stopped(tmp_path, mixed, capsys):
    changes = {"train__steps": 6, "checkpoint__every": 2}
    whole = trained(tiny(mixed, tmp_path / "whole", **changes), 1)
    assert re.search(r"data .*b\.txt: [\d,]+ tokens of bytes, 1 document, 40\.0% of the samples,", capsys.readouterr().out)
    config = tiny(mixed, tmp_path / "stopped", **changes)
    stopped(config, 3, at=3)
    assert trained(config, 2) == whole
    other = override(config, data__path=(*mixed[:3], "3"), train__steps=7)
    with pytest.raises(CollectiveError, match=r"data\.path: was content"):
        trained(other, 1)


def test_corpora_of_different_tokenizers_do_not_mix(tmp_path, mixed):
    prepare_tokens(DataConfig(path=(mixed[2],), tokenizer="bpe:300"), tmp_path / "b", SelfComm())
    config = tiny((mixed[0], "1", str(tmp_path / "b"), "1"), tmp_path / "run", data__tokenizer="auto")
    with pytest.raises(CollectiveError, match=r"was made with another one|was made with another tokenizer"):
        build_run(config, SelfComm())


# Conversations.

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Conversations of different lengths, and the folder of a model that has a chat template."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}+{i % 7}"},
                {"role": "assistant", "content": f"={i + i % 7}" * (i % 4 + 1)},
            ]
        }
        for i in range(120)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = tiny("", "", model__context_length=40).model
    model, _ = whole_model(shape, 257, torch.device("cpu"))
    for p in model.parameters():
        p.data.normal_(0.0, 0.05)
    write_hf_model(folder / "model", model, shape, 257)
    (folder / "model" / "tokenizer.json").write_text(bytes_tokenizer().json)
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ bos_token }}" + TEMPLATE, "bos_token": "B"})
    )
    return folder


def chat(chats, folder, **changes):
    return tiny(
        chats / "chats.jsonl", folder, data__format="chat", data__tokenizer=str(chats / "model"),
        model__init_from=str(chats / "model"), model__vocab_size=257, model__context_length=40, train__steps=4, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("packing", ["concat", "documents"])
@pytest.mark.parametrize(("size", "layout"), [(3, on(zero=3)), (2, on(2))])
def test_conversations_give_the_same_bits_on_any_ranks(tmp_path, chats, size, layout, packing):
    alone = outcome(chat(chats, tmp_path / "alone", data__packing=packing), 1)
    together = outcome(chat(chats, tmp_path / "together", data__packing=packing, **layout), size)
    assert together[0] == alone[0]
    assert differing(together[1], alone[1]) == []


def test_the_loss_of_a_conversation_is_that_of_its_answers(tmp_path, chats):
    """Against transformers, one conversation at a time, and the labels as its own documentation makes them."""
    config = chat(chats, tmp_path / "run", model__dropout=0.0, data__eval_fraction=0.0, data__packing="documents")
    run = build_run(config, SelfComm())
    reference = AutoModelForCausalLM.from_pretrained(chats / "model")
    numbers = np.arange(run.batches.examples.train_samples)
    losses, count = 0.0, 0
    for line in (chats / "chats.jsonl").read_text().splitlines():
        user, answer = (message["content"] for message in json.loads(line)["messages"])
        prompt, response = f"B<user>{user}".encode(), f"{answer}".encode()
        ids = [*prompt, 256, *b"<assistant>", *response, 256][: 40 + 1]
        begin = len(prompt) + 1 + len(b"<assistant>")
        with torch.no_grad():
            logits = reference(torch.tensor([ids[:-1]])).logits[0]
        losses += float(torch.nn.functional.cross_entropy(logits[begin - 1 :], torch.tensor(ids[begin:]), reduction="sum"))
        count += len(ids) - begin
    examples = run.batches.examples.make_batch(numbers, 0)
    rows = SequenceInfo(examples.positions, documents=examples.documents)
    with torch.no_grad():
        ours = loss_sum(run.model.stages[0].model(examples.tokens, rows), examples.targets)
    assert examples.target_tokens == count
    assert float(ours) == pytest.approx(losses, rel=1e-5)


def test_the_template_goes_with_the_checkpoint(tmp_path, chats, capsys):
    trained(chat(chats, tmp_path / "run"), 2)
    said = capsys.readouterr().out
    assert "120 conversations, " in said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000004")
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "B<user>hi<|endoftext|><assistant>"
