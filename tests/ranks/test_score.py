"""Scores of a text: each token once, the same number on any ranks, and what transformers and plain torch give."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from checkpoints import write_published
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import FAMILIES, full_model, small_config
from text import make_text, tiny_config, write_text, write_tokens
from transformers import AutoModelForCausalLM

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.config import Data
from mpilm.data.prepare import prepare
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.inference.evaluate import EvaluateOptions, cut_windows, evaluate_model, group_windows
from mpilm.model.init import initial_value
from mpilm.telemetry.metrics import read_metrics
from mpilm.trainer.loop import train
from mpilm.usage import Compute, Folder, Stages, used

T = 16
ALL = EvaluateOptions(documents=False, held_out=False, context_length=0, run_dir="auto")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in ("llama", "gpt2", "bert"):
        tokenizer = bytes_tokenizer().with_mask() if family == "bert" else bytes_tokenizer()
        shape = small_config(**FAMILIES[family], model__context_length=T, model__dropout=0.0).model
        model, _ = full_model(shape, tokenizer.vocab_size, torch.device("cpu"))
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.data.copy_(initial_value(2, name, tuple(p.shape), 0.1) + mean)
        made[family] = tmp_path_factory.mktemp(family)
        write_published(made[family], model, shape, tokenizer.vocab_size)
        (made[family] / "tokenizer.json").write_text(tokenizer.json)
    return made


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def scored(folder, path, out, size=1, pipeline=1, micro_batch=3, **asked):
    import dataclasses

    def body(comm):
        compute = dataclasses.replace(Compute(device="cpu", threads=1))
        config = used(Folder(str(folder)), Stages(pipeline), compute, data=Data(path=(str(path),)))
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, micro_batch=micro_batch, global_batch=micro_batch)
        )
        evaluate_model(config, dataclasses.replace(ALL, run_dir=str(out), **asked), comm)

    run_ranks(size, body)
    return json.loads((out / "evaluation.json").read_text())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.booleans())
def test_windows_predict_every_token_but_the_first_once(lengths, context, ahead):
    segments = np.cumsum([3, *lengths])
    cut = cut_windows(segments, context, ahead)
    predicted = [(d, t) for a, b, d in zip(cut.start, cut.stop, cut.document) for t in range(a + ahead, b)]
    assert predicted == [(d, t) for d, (a, b) in enumerate(pairwise(segments.tolist())) for t in range(a + ahead, b)]
    assert all(0 < b - a - ahead <= context for a, b in zip(cut.start, cut.stop))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=30), st.integers(1, 5))
def test_windows_of_one_size_are_read_together(sizes, most):
    groups = group_windows(np.array(sizes, dtype=np.int64), most)
    assert [n for first, stop in groups for n in range(first, stop)] == list(range(len(sizes)))
    assert all(1 <= stop - first <= most and len(set(sizes[first:stop])) == 1 for first, stop in groups)


def plain(folder, tokens, length):
    """Losses of all tokens but the first, by transformers, one window at a time."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for start in range(0, len(tokens) - 1, length):
        piece = torch.tensor(tokens[start : start + length + 1])
        with torch.no_grad():
            logits = theirs(piece[None, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none").tolist()
    return losses


@pytest.mark.parametrize("length", [0, 5, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_what_transformers_gives(folders, tmp_path, family, length):
    words = text(20)
    (tmp_path / "x.txt").write_text(words)
    found = scored(folders[family], tmp_path / "x.txt", tmp_path / "out", context_length=length)
    tokens = list(words.encode())  # no token is added
    losses = plain(folders[family], tokens, length or T)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / len(tokens), rel=1e-6)
    assert (found["tokens"], found["targets"]) == (len(tokens), len(tokens) - 1)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_number_does_not_depend_on_the_ranks(folders, tmp_path, family):
    (tmp_path / "x.txt").write_text(text(30))
    alone = scored(folders[family], tmp_path / "x.txt", tmp_path / "1")
    for size, pipeline in [(2, 1), (3, 1), (2, 2), (4, 2), (8, 1)]:
        assert scored(folders[family], tmp_path / "x.txt", tmp_path / f"{size}-{pipeline}", size, pipeline) == alone


def test_of_a_bert_only_masked_tokens_count(folders, tmp_path):
    words = text(30)
    (tmp_path / "x.txt").write_text(words)
    found = scored(folders["bert"], tmp_path / "x.txt", tmp_path / "out")
    n = len(words.encode())
    assert found["targets"] == sum(max(1, round(0.15 * min(T, n - at))) for at in range(0, n, T))
    assert 0 <= found["masked_accuracy"] <= 1
    assert "bits_per_byte" not in found


def test_documents_are_scored_by_themselves(folders, tmp_path):
    parts = [text(3), "x", text(5)[:37], "yz"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    found = scored(folders["llama"], tmp_path / "x.jsonl", tmp_path / "out", size=2, documents=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [len(part.encode()) for part in parts]
    losses = [plain(folders["llama"], list(part.encode()), T) for part in parts]
    for row, expected in zip(rows, losses, strict=True):
        assert row["targets"] == len(expected)
        assert row["loss"] == (pytest.approx(sum(expected) / len(expected), rel=1e-5) if expected else None)
    assert found["targets"] == sum(map(len, losses))
    assert found["loss"] == pytest.approx(sum(map(sum, losses)) / sum(map(len, losses)), rel=1e-6)


def test_a_text_of_one_token_is_refused(folders, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(CollectiveError, match="1 tokens are too few"):
        scored(folders["llama"], tmp_path / "x.txt", tmp_path / "out")


def test_another_tokenizer_with_more_ids_is_refused(folders, tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(CollectiveError, match="has no \\[MASK\\] token"):
        scored(without_mask(folders["bert"], tmp_path), tmp_path / "x.txt", tmp_path / "out")


def without_mask(folder, parent):
    import shutil

    copy = shutil.copytree(folder, parent / "copy")
    (copy / "tokenizer.json").write_text(bytes_tokenizer().json)
    config = json.loads((copy / "config.json").read_text())
    assert config["vocab_size"] == 258
    return shrink(copy)


def shrink(folder):
    """A vocabulary without a row for a mask."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    small = {n: t[:257].clone() if t.shape[0] == 258 else t for n, t in tensors.items()}
    save_file(small, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 257}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# What a run has held out.


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("prepared", [True, False])
def test_the_held_out_part_of_a_run(tmp_path, family, prepared):
    """All of it, of the run's own text with the run's own tokenizer, whatever that was: the loss of its last evaluation."""
    source = write_tokens(tmp_path / "data") if prepared else write_text(tmp_path / "data")
    config = tiny_config(
        source, tmp_path / "run", **FAMILIES[family], data__tokenizer="auto" if prepared else "bpe:300",
        data__eval_fraction=0.2, train__steps=2, run__eval_batches=0, model__dropout=0.0,
    )  # fmt: skip
    run_ranks(2, lambda comm: train(config, comm))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"

    def body(comm):
        asked = EvaluateOptions(documents=False, held_out=True, context_length=0, run_dir="auto")
        evaluate_model(used(Folder(str(checkpoint)), Stages(), Compute(device="cpu", threads=1)), asked, comm)

    run_ranks(2, body)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    if family == "bert":  # other masks
        assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=0.02)
    else:
        whole = found["targets"] // 16 * 16  # while training, a last sample that is not whole is left out
        assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=2e-3)
        assert found["targets"] - whole < 16


def test_tokens_of_another_tokenizer_are_refused(folders, tmp_path):
    prepare(Data(path=(str(write_text(tmp_path)),), tokenizer="bpe:257"), tmp_path / "tokens", SelfComm("world"))
    with pytest.raises(CollectiveError, match="was tokenized with another tokenizer than that of"):
        scored(folders["llama"], tmp_path / "tokens", tmp_path / "out")


def test_more_stages_than_layers(folders, tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(CollectiveError, match=r"--parallel\.pipeline 5: the model has 4 layers, at least one a rank"):
        scored(folders["llama"], tmp_path / "x.txt", tmp_path / "out", size=5, pipeline=5)


def test_more_ranks_than_windows(folders, tmp_path):
    (tmp_path / "x.txt").write_text("ab")
    alone = scored(folders["llama"], tmp_path / "x.txt", tmp_path / "1")
    assert alone["targets"] == 1
    assert scored(folders["llama"], tmp_path / "x.txt", tmp_path / "3", size=3) == alone
    assert scored(folders["llama"], tmp_path / "x.txt", tmp_path / "4", size=4, pipeline=2) == alone
