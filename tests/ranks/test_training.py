"""Training: the same losses and weights, bit for bit, on any number of ranks and however often interrupted."""

import json
import math
from pathlib import Path

import pytest
import torch
from text import tiny, write_tokens
from transformers import LlamaConfig, LlamaForCausalLM

import mpilm.trainer.loop as loop
from mpilm.checkpoint.format import checkpoints, folder_name
from mpilm.comm.base import SelfComm
from mpilm.comm.threads import run_ranks
from mpilm.comm.together import AgreedError
from mpilm.config import replaced
from mpilm.errors import NonFiniteError
from mpilm.model.huggingface import published_config, published_name
from mpilm.optim.rate import learning_rate
from mpilm.telemetry.metrics import read_rows
from mpilm.trainer.build import build
from mpilm.trainer.evaluate import evaluate
from mpilm.trainer.loop import train
from mpilm.trainer.step import total_loss, train_step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


def outcome(config, size):
    """Losses, norms, evaluation and the bytes of weights and moments, equal on all ranks."""

    def body(comm):
        run = build(config, comm)
        numbers = []
        for step in range(config.train.steps):
            result = train_step(run.model, run.batches, step)
            numbers += [result.loss, result.grad_norm]
        numbers.append(evaluate(run))
        flats = [run.flat.values, *run.optimizer.flat_moments.values()]
        return numbers, [flat.numpy().tobytes() for flat in flats]

    results = run_ranks(size, body)
    assert all(result == results[0] for result in results)
    assert all(map(math.isfinite, results[0][0]))
    return results[0]


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ([2, 3, 4, 6, 8], {}),
        ([2, 3, 8], {"model__tie_embeddings": False, "model__n_kv_heads": 4}),
        ([3, 4], {"model__dropout": 0.0, "train__dtype": "bfloat16"}),
        ([2, 5], {"train__clip_norm": 0.1, "train__global_batch": 22}),  # 11 microbatches
    ],
    ids=["tied", "untied", "bfloat16", "uneven"],
)
def test_the_bits_do_not_depend_on_the_ranks(tmp_path, data, sizes, changes):
    def config(size):
        return tiny(data, tmp_path / str(size), train__steps=3, run__eval_batches=2, **changes)

    alone = outcome(config(1), 1)
    for size in sizes:
        numbers, flats = outcome(config(size), size)
        assert numbers == alone[0], size
        assert flats == alone[1], size
    assert alone[0][0] != alone[0][2]  # it does learn


def test_the_library_sum_is_close_and_not_the_same(tmp_path, data):
    exact = outcome(tiny(data, tmp_path / "a", train__steps=3), 3)
    library = outcome(tiny(data, tmp_path / "b", train__steps=3, train__reproducible=False), 3)
    assert library[0] == pytest.approx(exact[0], rel=1e-5)
    assert library[1] != exact[1]


def test_it_is_the_plain_training_loop(tmp_path, data):
    """transformers' model, torch's AdamW and torch's clipping on the same batches."""
    config = tiny(data, tmp_path / "run", train__steps=20, model__dropout=0.0, train__clip_norm=0.5)
    settings = config.train
    run = build(config, SelfComm())
    reference = LlamaForCausalLM(LlamaConfig(**published_config(config.model, run.corpus.tokenizer.vocab_size, 256)))
    weights = {published_name(name): parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    reference.load_state_dict(weights)
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))
    clipped = 0
    for step in range(settings.steps):
        batches = [run.batches.train(step, m) for m in range(8)]
        tokens, targets = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("tokens", "targets"))
        loss = torch.nn.functional.cross_entropy(reference(tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.clip_norm))
        clipped += norm > settings.clip_norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        ours = train_step(run.model, run.batches, step)
        assert ours.loss == pytest.approx(loss.item(), rel=1e-5), step
        assert ours.grad_norm == pytest.approx(norm, rel=1e-3), step
    assert clipped > 0
    assert ours.loss < 5.0  # from ln 257 = 5.5


def test_evaluation_is_the_mean_over_the_held_out_text(tmp_path, data):
    """All of it, without dropout, and the last microbatch smaller than the others."""
    config = tiny(data, tmp_path / "run", run__eval_batches=0, train__micro_batch=4, data__eval_fraction=0.031)
    run = build(config, SelfComm())
    rows = [run.batches.evaluation(i) for i in range(run.batches.eval_microbatches())]
    assert rows[-1].tokens.shape[0] < 4
    with torch.no_grad():
        logits = [run.model(batch.tokens, batch.positions).flatten(0, 1) for batch in rows]
    targets = torch.cat([batch.targets.flatten() for batch in rows])
    expected = float(torch.nn.functional.cross_entropy(torch.cat(logits).double(), targets))
    assert evaluate(run) == pytest.approx(expected, rel=1e-6)


def test_losses_are_added_in_the_order_of_microbatches():
    losses = [1e16, 1.0, -1e16, 3.0, 1e-3]
    owned = [{1: losses[1]}, {0: losses[0], 4: losses[4]}, {}, {2: losses[2], 3: losses[3]}]
    assert run_ranks(4, lambda comm: total_loss(owned[comm.rank], 5, comm)) == [sum(losses)] * 4
    assert sum(losses) != sum(reversed(losses))


def test_a_loss_that_is_not_finite_stops_all_ranks_and_changes_nothing(tmp_path, data):
    def body(comm):
        run = build(tiny(data, tmp_path / "run"), comm)
        run.flat.by_name["norm.weight"].fill_(math.nan if comm.rank == 1 else 1.0)
        before = run.flat.values.clone()
        with pytest.raises(AgreedError, match=r"step 1: loss nan, gradient norm") as caught:
            train_step(run.model, run.batches, 0)
        assert isinstance(caught.value.error, NonFiniteError)
        assert torch.equal(run.flat.values, before) or comm.rank == 1  # nan is not equal to itself
        assert not any(moment.any() for moment in run.optimizer.flat_moments.values())

    run_ranks(2, body)


# Stopping and going on.


def trained(config, size):
    run_ranks(size, lambda comm: train(config, comm))
    folder = checkpoints(Path(config.run.dir) / "checkpoints")[-1]
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def losses(config):
    """The rows of metrics.jsonl without times and starts."""
    rows = read_rows(Path(config.run.dir) / "metrics.jsonl")
    return [
        {k: row[k] for k in ("step", "tokens", "loss", "grad_norm", "lr", "eval_loss") if k in row}
        for row in rows
        if "event" not in row
    ]


def stopped(config, size, at, monkeypatch):
    """Train as if all ranks had died after step `at`, whatever it had written by then."""

    def step_or_die(run, step):
        if step == at:
            raise KeyboardInterrupt
        return train_step(run.model, run.batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_or_die)
        with pytest.raises(KeyboardInterrupt):
            run_ranks(size, lambda comm: train(config, comm))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    config = tiny(data, tmp_path_factory.mktemp("whole") / "run")
    return trained(config, 1), losses(config)


@pytest.mark.parametrize(("first", "then", "at"), [(1, 1, 3), (1, 3, 5), (2, 3, 4), (4, 1, 2), (3, 8, 5)])
def test_going_on_is_as_if_never_stopped(tmp_path, data, uninterrupted, monkeypatch, first, then, at):
    config = tiny(data, tmp_path / "run", checkpoint__every=2)
    stopped(config, first, at, monkeypatch)
    saved = at // 2 * 2
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # the row that was being written
    kept = b"".join(line for line in metrics.read_bytes().splitlines(keepends=True)[:-1] if json.loads(line)["step"] <= saved)
    (tmp_path / "run" / "checkpoints" / ".writing-step-00000006").mkdir()
    assert trained(config, then) == uninterrupted[0]
    assert metrics.read_bytes().startswith(kept)
    assert b'"lo{' not in metrics.read_bytes()
    starts = [row for row in read_rows(metrics) if "event" in row]
    assert [(row["step"], row["ranks"]) for row in starts] == [(0, first), (saved, then)]
    with_saves = [row for row in losses(config) if "loss" in row]
    assert with_saves == [row for row in uninterrupted[1] if "loss" in row]
    assert [row for row in losses(config) if row["step"] == 6] == [row for row in uninterrupted[1] if row["step"] == 6]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, data, uninterrupted, monkeypatch, capsys):
    config = tiny(data, tmp_path / "run", checkpoint__every=2)
    stopped(config, 1, 5, monkeypatch)
    newest = tmp_path / "run" / "checkpoints" / folder_name(4)
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


def test_one_checkpoint_starts_a_branch(tmp_path, data, uninterrupted, monkeypatch):
    config = tiny(data, tmp_path / "run", checkpoint__every=2)
    stopped(config, 2, 5, monkeypatch)
    start = tmp_path / "run" / "checkpoints" / folder_name(4)
    branch = tiny(data, tmp_path / "branch", checkpoint__resume=str(start))
    assert trained(branch, 1) == uninterrupted[0]
    assert trained(replaced(branch, run__dir=str(tmp_path / "other")), 3) == uninterrupted[0]
    assert start.exists()
