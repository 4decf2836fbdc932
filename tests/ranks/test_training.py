"""Training over a corpus: the mathematics of the plain loop, and runs that are stopped and resumed on other layouts.

tests/ranks/test_layouts.py has every layout, on random tokens; tests/golden the stored loss curves.
"""

import json
import re
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from checkpoints import write_hf_model
from helpers import read_metrics
from runs import FAMILIES, assemble, differing, full_batch, full_model, layout, owned_state, train_to_end, train_until_killed
from text import make_text, tiny_config, write_tokens
from thread_ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from mpilm.checkpoint.format import checkpoint_name
from mpilm.checkpoint.pretrained import read_pretrained_config
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import DataConfig
from mpilm.config.settings import override
from mpilm.data.corpus import open_corpus
from mpilm.data.prepare import prepare_tokens
from mpilm.data.tokenizer import bytes_tokenizer, load_tokenizer
from mpilm.engine import hardware
from mpilm.engine.step import total_loss, train_step, validation_loss
from mpilm.kernels.base import loss_sum
from mpilm.launch.stop_request import BY_FILE, StopRequest
from mpilm.model.sequence_info import SequenceInfo
from mpilm.optim.optimizer import learning_rate
from mpilm.parallel.reduce.step import StepReducer
from mpilm.trainer import hooks
from mpilm.trainer.build import build_run
from mpilm.trainer.loop import train

BATCH = {"train__global_batch": 8}  # 4 microbatches
FIRST = "checkpoints/step-00000001"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# Against transformers and torch.


@pytest.mark.parametrize(
    ("family", "tensor"),
    [*((family, 1) for family in FAMILIES), *((family, 2 + 2 * (i % 2)) for i, family in enumerate(FAMILIES))],
)
def test_training_equals_the_plain_loop_of_transformers_and_torch(tmp_path, data, family, tensor):
    """transformers' model, torch's AdamW and clipping, on the same batches."""
    changes = {"train__steps": 30, "model__dropout": 0.0, "train__clip_norm": 0.5, "model__router_loss": 0.0, **BATCH}
    heads = {"model__n_heads": 4, "model__n_kv_heads": 4} if tensor > 1 else {}
    config = tiny_config(data, tmp_path / "run", **{**changes, **FAMILIES[family], **heads})
    settings = config.train
    run = build_run(config, SelfComm())
    write_hf_model(tmp_path / "start", run.model.stages[0].model, config.model, run.model.vocab_size)
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    reference = auto.from_pretrained(tmp_path / "start")
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))
    clipped, expected = 0, []
    for step in range(settings.steps):
        tokens, targets = full_batch(run.batches, step, 4)
        loss = torch.nn.functional.cross_entropy(reference(tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.clip_norm))
        clipped += norm > settings.clip_norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        expected.append((loss.item(), norm))

    def body(comm):
        run = build_run(override(config, parallel__tensor=tensor, run__dir=str(tmp_path / "split")), comm)
        return [train_step(run.model, run.batches, step) for step in range(settings.steps)]

    for found in run_ranks(tensor, body):
        for step, (result, (loss, norm)) in enumerate(zip(found, expected, strict=True)):
            assert result.loss == pytest.approx(loss, rel=1e-5), step
            assert result.grad_norm == pytest.approx(norm, rel=1e-3), step
    assert clipped > 0
    assert expected[-1][0] < 5.3  # from ln 257 = 5.5


LAYOUTS = [(1, layout()), (3, layout(zero=3)), (2, layout(2))]


@pytest.mark.parametrize(("family", "size", "settings"), [(family, *LAYOUTS[i % 3]) for i, family in enumerate(FAMILIES)])
def test_run_started_from_a_folder_has_its_model(tmp_path, data, family, size, settings):
    """The first loss is that of the model in the folder, and the checkpoint keeps its shape and its vocabulary."""
    shape = {"model__dropout": 0.0, "model__vocab_size": 300, **FAMILIES[family], **BATCH}
    config = tiny_config(data, tmp_path / "run", train__steps=1, **shape, **settings)
    torch.manual_seed(0)
    model, _ = full_model(config.model, 300, torch.device("cpu"))
    for p in model.parameters():
        p.data.normal_(0.0, 0.1)
    write_hf_model(tmp_path / "start", model, config.model, 300)
    config = override(config, model__init_from=str(tmp_path / "start"))
    run_ranks(size, lambda comm: train(config, comm))
    run = build_run(tiny_config(data, tmp_path / "other", **shape), SelfComm())
    batches = [run.batches.training_batch(0, m) for m in range(4)]
    with torch.no_grad():
        losses = [float(loss_sum(model(batch.tokens, SequenceInfo(batch.positions)), batch.targets)) for batch in batches]
    row = next(row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("step") == 1)
    assert row["loss"] == pytest.approx(sum(losses) / run.batches.target_tokens(0), rel=1e-6)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert read_pretrained_config(checkpoint) == replace(config.model, init_from="")
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    assert auto.from_pretrained(checkpoint).config.vocab_size == 300


def test_validation_loss_is_the_mean_over_the_held_out_text(tmp_path, data):
    """Over all of it, without dropout, with a last microbatch that is smaller than the others."""
    config = tiny_config(data, tmp_path / "run", run__eval_batches=0, train__micro_batch=4, data__eval_fraction=0.031)
    run = build_run(config, SelfComm())
    batches = [run.batches.evaluation_batch(i) for i in range(run.batches.eval_microbatches())]
    assert batches[-1].tokens.shape[0] < 4
    with torch.no_grad():
        model = run.model.stages[0].model
        logits = [model(batch.tokens, SequenceInfo(batch.positions)).flatten(0, 1) for batch in batches]
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    expected = float(torch.nn.functional.cross_entropy(torch.cat(logits).double(), targets))
    assert validation_loss(run.model, run.batches, run.config.run.eval_batches) == pytest.approx(expected, rel=1e-6)


def test_total_loss_adds_in_the_order_of_microbatches():
    losses = [1e16, 1.0, -1e16, 3.0, 1e-3]
    owned = [{1: losses[1]}, {0: losses[0], 4: losses[4]}, {}, {2: losses[2], 3: losses[3]}]
    assert run_ranks(4, lambda comm: total_loss(owned[comm.rank], 5, comm)) == [sum(losses)] * 4
    assert sum(losses) != sum(reversed(losses))


def test_ranks_with_different_programs_do_not_train(tmp_path, data):
    versions = iter(["2.12.0", "2.13.0", "2.13.0"])
    refused = pytest.raises(CollectiveError, match=r"the ranks were started with different programs:\n  torch: ")
    fake = mock.patch.object(
        hardware, "software_versions", side_effect=lambda _: {"mpilm": 1, "torch": next(versions), "mpi": 0}
    )
    with refused, fake:
        run_ranks(3, lambda comm: train(tiny_config(data, tmp_path / "run"), comm))
    assert not (tmp_path / "run").exists()


# Stopped and resumed.

RESUMED = {**BATCH, "model__n_layers": 4, "checkpoint__every": 2}


def numbers_of(config):
    """Return the rows of metrics.jsonl without times and events."""
    names = ("step", "tokens", "loss", "grad_norm", "lr", "eval_loss")
    rows = [row for row in read_metrics(Path(config.run.dir) / "metrics.jsonl") if "event" not in row]
    return [{name: row[name] for name in names if name in row} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """A function that returns the checkpoint and the numbers of a serial run with an optimizer."""

    @cache
    def train_serially(optimizer):
        config = tiny_config(data, tmp_path_factory.mktemp(optimizer) / "run", train__optimizer=optimizer, **RESUMED)
        return train_to_end(config, 1), numbers_of(config)

    return train_serially


@pytest.mark.parametrize(
    ("first", "second", "step", "optimizer"),
    [
        ((1, layout()), (4, layout(2, "interleaved", 3)), 3, "adamw"),
        ((4, layout(2, "interleaved", 3)), (3, layout(zero=1)), 5, "sgd"),
        ((3, layout(zero=2)), (4, layout(4, "zero-bubble")), 4, "adafactor"),
        ((4, layout(2, zero=3)), (4, layout(2, "gpipe", 1)), 2, "muon"),
        ((3, layout(zero=3)), (1, layout()), 5, "adamw"),
    ],
)
def test_run_resumed_on_another_layout_equals_one_never_stopped(tmp_path, data, uninterrupted, first, second, step, optimizer):
    changes = {**RESUMED, "train__optimizer": optimizer}
    before, after = (tiny_config(data, tmp_path / "run", **changes, **settings) for _, settings in (first, second))
    train_until_killed(before, first[0], step)
    saved = step // 2 * 2
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # the row that was being written
    lines = metrics.read_bytes().splitlines(keepends=True)[:-1]
    (tmp_path / "run" / "checkpoints" / ".writing-step-00000006").mkdir()
    tensors, rows = uninterrupted(optimizer)
    assert train_to_end(after, second[0]) == tensors
    assert metrics.read_bytes().startswith(b"".join(line for line in lines if json.loads(line)["step"] <= saved))
    assert b'"lo{' not in metrics.read_bytes()
    starts = [row for row in read_metrics(metrics) if row.get("event") == "start"]
    assert [(row["step"], row["ranks"]) for row in starts] == [(0, first[0]), (saved, second[0])]
    assert [row["layout"]["pipeline"] for row in starts] == [before.parallel.pipeline, after.parallel.pipeline]
    assert [row for row in numbers_of(after) if "loss" in row] == [row for row in rows if "loss" in row]
    assert [row for row in numbers_of(after) if row["step"] == 6] == [row for row in rows if row["step"] == 6]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


SIXTHS = {
    "model__n_heads": 6, "model__d_model": 24, "model__context_length": 24, "train__steps": 4, "checkpoint__every": 2, **BATCH,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "optimizer", "first", "second"),
    [
        ("llama", "adamw", (4, layout(tensor=2, zero=1)), (2, layout(2))),
        ("gpt2", "adafactor", (1, layout()), (4, layout(tensor=2, zero=3))),
        ("bert", "muon", (2, layout(tensor=2)), (1, layout())),
        ("mixtral", "adafactor", (4, layout(2, tensor=2)), (3, layout(tensor=3))),
        ("mixtral", "muon", (6, layout(expert=3, tensor=2, zero=3)), (2, layout(expert=2))),
    ],
)
def test_run_resumed_with_other_tensor_and_expert_ranks_equals_one_never_stopped(
    tmp_path, data, family, optimizer, first, second
):
    changes = {**SIXTHS, **FAMILIES[family], "model__n_kv_heads": 0, "model__tensor_parts": 6, "train__optimizer": optimizer}
    expected = train_to_end(tiny_config(data, tmp_path / "whole", **changes), 1)
    train_until_killed(tiny_config(data, tmp_path / "run", **changes, **first[1]), first[0], 3)
    assert train_to_end(tiny_config(data, tmp_path / "run", **changes, **second[1]), second[0]) == expected


def test_run_resumed_with_other_context_ranks_equals_one_never_stopped(tmp_path, data):
    changes = {**SIXTHS, "model__n_kv_heads": 0, "model__sequence_parts": 4}
    expected = train_to_end(tiny_config(data, tmp_path / "whole", **changes), 1)
    train_until_killed(tiny_config(data, tmp_path / "run", **changes, **layout(context=2)), 2, 3)
    assert "sequence_parts = 4" in (tmp_path / "run" / "config.toml").read_text()
    config = tiny_config(data, tmp_path / "run", **SIXTHS, model__n_kv_heads=0)  # the parts are not stated
    assert train_to_end(override(config, parallel__context=4, parallel__zero=1), 4) == expected


def test_tensor_parts_that_are_not_stated_are_those_of_the_checkpoint(tmp_path, data):
    expected = train_to_end(tiny_config(data, tmp_path / "whole", **SIXTHS, model__n_kv_heads=0, model__tensor_parts=2), 1)
    config = tiny_config(data, tmp_path / "run", **SIXTHS, model__n_kv_heads=0)
    train_until_killed(override(config, parallel__tensor=2), 2, 3)
    assert "tensor_parts = 2" in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(
        CollectiveError, match=r"--parallel.tensor 3 does not divide 2 tensor parts of the run; write 1, 2, or choose"
    ):
        run_ranks(3, lambda comm: train(override(config, parallel__tensor=3), comm))
    with pytest.raises(CollectiveError, match=r"(?s)model\.tensor_parts: was 2, now 1.*allow-change model.tensor_parts"):
        train(override(config, model__tensor_parts=1), SelfComm())
    assert train_to_end(config, 1) == expected
    assert json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "config.json").read_text())["tensor_parts"] == 2


def test_run_with_a_damaged_checkpoint_resumes_from_the_one_before(tmp_path, data, uninterrupted, capsys):
    config = tiny_config(data, tmp_path / "run", **RESUMED)
    train_until_killed(config, 1, 5)
    path = tmp_path / "run" / "checkpoints" / checkpoint_name(4) / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert train_to_end(config, 2) == uninterrupted("adamw")[0]
    assert "optimizer.safetensors is damaged" in capsys.readouterr().out


def test_run_extended_with_a_constant_rate_equals_a_longer_run(tmp_path, data):
    def config(name, steps):
        changes = {"train__steps": steps, "train__lr_schedule": "constant", "run__eval_every": 0}
        return tiny_config(data, tmp_path / name, **changes, **BATCH)

    longer = train_to_end(config("longer", 4), 1)
    train_to_end(config("extended", 2), 2)
    assert train_to_end(config("extended", 4), 3) == longer
    assert numbers_of(config("extended", 4)) == numbers_of(config("longer", 4))


def test_complete_run_is_left_unchanged(tmp_path, data, capsys):
    config = tiny_config(data, tmp_path / "run", train__steps=2)
    before, rows = train_to_end(config, 1), numbers_of(config)
    capsys.readouterr()
    assert train_to_end(config, 2) == before
    assert numbers_of(config) == rows
    assert "this run is complete; a larger --train.steps continues it from step 2" in capsys.readouterr().out


def test_run_branched_from_a_checkpoint_equals_one_never_stopped(tmp_path, data, uninterrupted):
    config = tiny_config(data, tmp_path / "run", **RESUMED)
    train_until_killed(config, 2, 5)
    start = tmp_path / "run" / "checkpoints" / checkpoint_name(4)
    branch = tiny_config(data, tmp_path / "branch", checkpoint__resume=str(start), **RESUMED, **layout(2))
    assert train_to_end(branch, 2) == uninterrupted("adamw")[0]
    assert start.exists()


# Several corpora.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three parts of one prepared text and two of another that is not prepared."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "b.txt").write_text("".join(f"{i} mal {i % 7} ist {i * (i % 7)}.\n" for i in range(900)))
    return str(write_tokens(folder / "a")), "3", str(folder / "b.txt"), "2"


def test_mixture_resumed_on_other_ranks_equals_one_never_stopped(tmp_path, mixed, capsys):
    changes = {"train__steps": 4, "checkpoint__every": 2, "run__eval_every": 2, **BATCH}
    expected = train_to_end(tiny_config(mixed, tmp_path / "uninterrupted", **changes), 1)
    assert re.search(r"data .*b\.txt: [\d,]+ tokens of bytes, 1 document, 40\.0% of the samples,", capsys.readouterr().out)
    train_until_killed(tiny_config(mixed, tmp_path / "run", **changes, **layout(zero=3)), 3, 3)
    config = tiny_config(mixed, tmp_path / "run", **changes, **layout(2))
    assert train_to_end(config, 2) == expected
    other = override(config, data__path=(*mixed[:3], "3"), train__steps=5)
    with pytest.raises(CollectiveError, match=r"data\.path: was text or folder with digest"):
        train_to_end(other, 2)


def test_mixture_of_corpora_with_different_tokenizers_is_refused(tmp_path, mixed):
    prepare_tokens(DataConfig(path=(mixed[2],), tokenizer="bpe:300"), tmp_path / "b", SelfComm())
    config = tiny_config((mixed[0], "1", str(tmp_path / "b"), "1"), tmp_path / "run", data__tokenizer="auto")
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
    shape = tiny_config("", "", model__context_length=40).model
    model, _ = full_model(shape, 257, torch.device("cpu"))
    for p in model.parameters():
        p.data.normal_(0.0, 0.05)
    write_hf_model(folder / "model", model, shape, 257)
    (folder / "model" / "tokenizer.json").write_text(bytes_tokenizer().json)
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ bos_token }}" + TEMPLATE, "bos_token": "B"})
    )
    return folder


def chat_config(chats, folder, **changes):
    return tiny_config(
        chats / "chats.jsonl", folder, data__format="chat", data__tokenizer=str(chats / "model"),
        model__init_from=str(chats / "model"), model__vocab_size=257, model__context_length=40, train__steps=3, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("packing", "size", "settings"), [("concat", 3, layout(zero=3)), ("documents", 2, layout(2))])
def test_conversations_give_the_same_bits_on_any_layout(tmp_path, chats, packing, size, settings):
    def outcome(name, size, **settings):
        def body(comm):
            run = build_run(chat_config(chats, tmp_path / name, data__packing=packing, **settings), comm)
            results = [train_step(run.model, run.batches, step) for step in range(3)]
            numbers = [number for result in results for number in (result.loss, result.grad_norm)]
            return [*numbers, validation_loss(run.model, run.batches, 1)], owned_state(run.model)

        numbers, states = zip(*run_ranks(size, body))
        assert all(theirs == numbers[0] for theirs in numbers)
        return numbers[0], assemble(states)

    serial, distributed = outcome("serial", 1), outcome("distributed", size, **settings)
    assert distributed[0] == serial[0]
    assert differing(distributed[1], serial[1]) == []


def test_loss_of_conversations_counts_the_answers_alone(tmp_path, chats):
    """Against transformers, one conversation at a time, with labels made as its documentation describes."""
    config = chat_config(chats, tmp_path / "run", model__dropout=0.0, data__eval_fraction=0.0, data__packing="documents")
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
    info = SequenceInfo(examples.positions, documents=examples.documents)
    with torch.no_grad():
        ours = loss_sum(run.model.stages[0].model(examples.tokens, info), examples.targets)
    assert examples.target_tokens == count
    assert float(ours) == pytest.approx(losses, rel=1e-5)


def test_checkpoint_has_the_chat_template_of_its_model(tmp_path, chats, capsys):
    train_to_end(chat_config(chats, tmp_path / "run"), 2)
    assert "120 conversations, " in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000003")
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "B<user>hi<|endoftext|><assistant>"


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokenizer_is_read_by_transformers(tmp_path, family):
    """Token by token, on text whose words depend on the splitter: digits, code, contractions, accents of two characters."""
    text = (make_text(50) + "def step_2024(x):\n\n\n\treturn x['a']  # it's the 1234567th cafe\u0301, isn't it?\r\n") * 9
    (tmp_path / "text.txt").write_text(text)
    changes = {"data__tokenizer": "bpe:500", "train__steps": 1, **FAMILIES[family], **BATCH}
    train_to_end(tiny_config(tmp_path / "text.txt", tmp_path / "run", **changes), 1)
    checkpoint = tmp_path / "run" / FIRST
    ours, theirs = load_tokenizer(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.eos_token_id == ours.eos
    prepared = open_corpus(DataConfig(path=(str(tmp_path / "text.txt"),), tokenizer="bpe:500"), SelfComm(), arch=family[:4])
    assert prepared.tokens[:-1].tolist() == ours.encode(text).tolist()


@pytest.mark.parametrize("size", [1, 2])
def test_stop_at_a_checkpoint_step_evaluates_as_a_run_that_is_not_stopped(tmp_path, data, size):
    config = tiny_config(data, tmp_path / "run", checkpoint__every=1, run__eval_every=5, **BATCH)
    stop = mock.patch.object(StopRequest, "stop_reason", return_value=BY_FILE)
    with stop, pytest.raises(CollectiveError, match="stopped after step 1 of 6"):
        run_ranks(size, lambda comm: train(config, comm))
    train_to_end(override(config, train__steps=2, run__dir=str(tmp_path / "other")), 1)
    stopped, other = (json.loads((tmp_path / run / FIRST / "trainer.json").read_text()) for run in ("run", "other"))
    assert stopped["eval_loss"] == other["eval_loss"] != None  # noqa: E711


def test_time_for_an_evaluation_is_kept_before_a_time_limit(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", run__eval_every=1, train__steps=3, **BATCH)
    clock = mock.patch.object(hooks, "time", mock.Mock(perf_counter=mock.Mock(side_effect=count(0, 1000))))
    with clock, mock.patch.object(StopRequest, "stop_reason", return_value=0) as asked:
        train(config, SelfComm())
    needed_s = [call.args[0] for call in asked.call_args_list]
    assert needed_s[0] < 1000 < needed_s[1]


@pytest.mark.parametrize(("least_gain", "how"), [(-1e9, "while backward computes"), (1.0, "after backward")])
def test_sums_that_travel_beside_backward_have_the_same_bits(tmp_path, data, monkeypatch, least_gain, how):
    """Both ways are tried, and one is chosen."""
    settings = {"train__steps": 16, "run__eval_every": 0}
    expected = train_to_end(tiny_config(data, tmp_path / "shared", **settings), 2)
    monkeypatch.setattr(hooks, "LEAST_GAIN_OF_OVERLAP", least_gain)
    config = tiny_config(data, tmp_path / "run", **settings, parallel__reduce="messages")
    begin, seen = StepReducer.begin_microbatch, []

    def begin_and_see(reducer, i):
        seen.append(reducer.overlap)
        begin(reducer, i)

    monkeypatch.setattr(StepReducer, "begin_microbatch", begin_and_see)
    assert train_to_end(config, 2) == expected
    assert {*seen} == {True, False}
    assert seen[-1] == (least_gain < 0)
    events = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row.get("event") == "overlap"]
    assert [(row["step"], row["why"].partition(" from here on")[0]) for row in events] == [(13, f"gradients are summed {how}")]
    assert not [row for row in read_metrics(tmp_path / "shared/metrics.jsonl") if row.get("event") == "overlap"]
