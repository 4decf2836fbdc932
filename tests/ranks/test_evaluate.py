"""Evaluation of a text: each token once, the same loss on any ranks, and the loss that transformers computes."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from checkpoints import write_hf_model
from helpers import read_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import FAMILIES, full_model, small_config
from safetensors.torch import load_file, save_file
from text import make_text, tiny_config, write_text, write_tokens
from thread_ranks import run_ranks
from transformers import AutoModelForCausalLM

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import DataConfig
from mpilm.config.settings import override
from mpilm.data.prepare import prepare_tokens
from mpilm.data.tokenizer import EOS, bytes_tokenizer
from mpilm.inference.arguments import EvaluateArguments, EvaluateCompute, EvaluateModel, EvaluateOutput, EvaluateParallel
from mpilm.inference.evaluate import cut_windows, evaluate_model, group_windows
from mpilm.model.families import initial_value
from mpilm.trainer.loop import train

T = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random models, with a context of 16 tokens."""
    made = {}
    for family in ("llama", "gpt2", "bert"):
        tokenizer = bytes_tokenizer().with_mask() if family == "bert" else bytes_tokenizer()
        shape = small_config(
            **{"model__n_heads": 4, "model__n_kv_heads": 2, **FAMILIES[family]}, model__context_length=T, model__dropout=0.0
        ).model
        model, _ = full_model(shape, tokenizer.vocab_size, torch.device("cpu"))
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.data.copy_(initial_value(2, name, tuple(p.shape), 0.1) + mean)
        made[family] = tmp_path_factory.mktemp(family)
        write_hf_model(made[family], model, shape, tokenizer.vocab_size)
        (made[family] / "tokenizer.json").write_text(tokenizer.json)
    return made


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def evaluate_on_threads(folder, path, out, size=1, pipeline=1, context_length=0, documents=False, tensor=1, context=1):
    """Return evaluation.json of a model folder and a text."""
    arguments = EvaluateArguments(
        EvaluateModel(str(folder), context_length=context_length),
        DataConfig(path=(str(path),)),
        EvaluateParallel(pipeline, tensor, context=context),
        EvaluateCompute(device="cpu", threads=1, micro_batch=3),
        EvaluateOutput(str(out)),
        documents,
    )
    run_ranks(size, lambda comm: evaluate_model(arguments, comm))
    return json.loads((out / "evaluation.json").read_text())


@settings(max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.booleans())
def test_windows_predict_every_token_but_the_first_once(lengths, context, causal):
    segments = np.cumsum([3, *lengths])
    windows = cut_windows(segments, context, causal)
    predicted = [
        (document, token)
        for start, stop, document in zip(windows.start, windows.stop, windows.document)
        for token in range(start + causal, stop)
    ]
    assert predicted == [(d, t) for d, (a, b) in enumerate(pairwise(segments.tolist())) for t in range(a + causal, b)]
    assert all(0 < stop - start - causal <= context for start, stop in zip(windows.start, windows.stop))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 3), max_size=30), st.integers(1, 5))
def test_windows_of_equal_size_are_grouped(sizes, most):
    groups = group_windows(np.array(sizes, dtype=np.int64), most)
    assert [n for first, stop in groups for n in range(first, stop)] == list(range(len(sizes)))
    assert all(1 <= stop - first <= most and len(set(sizes[first:stop])) == 1 for first, stop in groups)


def transformers_losses(folder, tokens, length):
    """Return the losses of all tokens but the first, by transformers, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = torch.tensor(tokens[start : start + length + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    return losses


@pytest.mark.parametrize(("family", "length"), [("llama", 0), ("llama", 5), ("gpt2", 16)])
def test_loss_equals_transformers(folders, tmp_path, family, length):
    text = make_text(20)
    (tmp_path / "x.txt").write_text(text)
    found = evaluate_on_threads(folders[family], tmp_path / "x.txt", tmp_path / "out", context_length=length)
    tokens = list(text.encode())  # no token is added
    losses = transformers_losses(folders[family], tokens, length or T)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / len(tokens), rel=1e-6)
    assert (found["tokens"], found["targets"]) == (len(tokens), len(tokens) - 1)


@pytest.mark.parametrize(("family", "layouts"), [("llama", [(3, 1), (4, 2)]), ("bert", [(2, 2), (8, 1)])])
def test_loss_is_equal_on_any_layout(folders, tmp_path, family, layouts):
    (tmp_path / "x.txt").write_text(make_text(15))
    serial = evaluate_on_threads(folders[family], tmp_path / "x.txt", tmp_path / "1")
    for size, pipeline in layouts:
        out = tmp_path / f"{size}-{pipeline}"
        assert evaluate_on_threads(folders[family], tmp_path / "x.txt", out, size, pipeline) == serial


@pytest.mark.parametrize(
    ("family", "size", "pipeline", "length"), [("llama", 4, 1, 0), ("llama", 2, 1, 7), ("gpt2", 4, 2, 7), ("bert", 2, 1, 0)]
)
def test_loss_of_ranks_that_share_matrices_is_that_of_one(folders, tmp_path, family, size, pipeline, length):
    """To rounding, because the folder states no tensor parts. Windows of 7 tokens are not divided."""
    (tmp_path / "x.txt").write_text(make_text(15))
    serial = evaluate_on_threads(folders[family], tmp_path / "x.txt", tmp_path / "1", 1, 1, length)
    found = evaluate_on_threads(folders[family], tmp_path / "x.txt", tmp_path / "2", size, pipeline, length, tensor=2)
    assert found["loss"] == pytest.approx(serial["loss"], rel=1e-6)
    assert {**found, "loss": 0, "perplexity": 0, "bits_per_byte": 0} == {
        **serial,
        "loss": 0,
        "perplexity": 0,
        "bits_per_byte": 0,
    }


@pytest.mark.parametrize(("family", "size", "length"), [("llama", 2, 0), ("gpt2", 4, 7), ("bert", 4, 0)])
def test_loss_of_ranks_that_share_sequences_is_that_of_one(folders, tmp_path, family, size, length):
    """To rounding, because the folder states no sequence parts; counts are equal. Windows of 7 tokens are not divided."""
    (tmp_path / "x.txt").write_text(make_text(15))
    serial = evaluate_on_threads(folders[family], tmp_path / "x.txt", tmp_path / "1", context_length=length)
    found = evaluate_on_threads(folders[family], tmp_path / "x.txt", tmp_path / "2", size, 1, length, context=2)
    assert found["loss"] == pytest.approx(serial["loss"], rel=1e-6)
    for name in ("tokens", "targets", "masked_accuracy" if family == "bert" else "accuracy"):
        assert found[name] == serial[name]


def test_loss_is_equal_with_more_ranks_than_windows(folders, tmp_path):
    (tmp_path / "x.txt").write_text("ab")
    serial = evaluate_on_threads(folders["llama"], tmp_path / "x.txt", tmp_path / "1")
    assert serial["targets"] == 1
    assert evaluate_on_threads(folders["llama"], tmp_path / "x.txt", tmp_path / "3", size=3) == serial
    assert evaluate_on_threads(folders["llama"], tmp_path / "x.txt", tmp_path / "4", size=4, pipeline=2) == serial


def test_loss_of_bert_counts_masked_tokens_alone(folders, tmp_path):
    text = make_text(30)
    (tmp_path / "x.txt").write_text(text)
    found = evaluate_on_threads(folders["bert"], tmp_path / "x.txt", tmp_path / "out")
    n = len(text.encode())
    assert found["targets"] == sum(max(1, round(0.15 * min(T, n - at))) for at in range(0, n, T))
    assert 0 <= found["masked_accuracy"] <= 1
    assert "bits_per_byte" not in found


def test_documents_are_scored_separately(folders, tmp_path):
    documents = [make_text(3), "x", make_text(5)[:37], "yz"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    found = evaluate_on_threads(folders["llama"], tmp_path / "x.jsonl", tmp_path / "out", size=2, documents=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [len(document.encode()) for document in documents]
    losses = [transformers_losses(folders["llama"], list(document.encode()), T) for document in documents]
    for row, expected in zip(rows, losses, strict=True):
        assert row["targets"] == len(expected)
        assert row["loss"] == (pytest.approx(sum(expected) / len(expected), rel=1e-5) if expected else None)
    assert found["targets"] == sum(map(len, losses))
    assert found["loss"] == pytest.approx(sum(map(sum, losses)) / sum(map(len, losses)), rel=1e-6)


def test_tokenizer_without_an_end_token_scores_a_text(folders, tmp_path):
    """No token is added to the text, so none is needed."""
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    (copy / "tokenizer.json").write_text(bytes_tokenizer().json.replace(EOS, "<other>"))
    (tmp_path / "x.txt").write_text(make_text(5))
    expected = evaluate_on_threads(folders["llama"], tmp_path / "x.txt", tmp_path / "1")
    assert evaluate_on_threads(copy, tmp_path / "x.txt", tmp_path / "2") == expected | {"model": str(copy)}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_checkpoint_is_scored_in_windows_of_the_trained_length(folders, tmp_path, lora_rank, capsys):
    changes = {"model__init_from": str(folders["llama"]), "model__lora_rank": lora_rank, "model__context_length": T // 2}
    shape = small_config(**changes, model__dropout=0.0).model
    config = override(tiny_config(write_text(tmp_path), tmp_path / "run", train__steps=1), model=shape)
    run_ranks(1, lambda comm: train(override(config, data__tokenizer=str(folders["llama"])), comm))
    (tmp_path / "x.txt").write_text(make_text(5))
    found = {}
    for folder, text in (
        (
            tmp_path / "run" / "checkpoints" / "step-00000001",
            "windows         of 8 tokens: the length that the run trained with",
        ),
        (folders["llama"], "windows         of 16 tokens: the model's context length"),
    ):
        found[folder] = evaluate_on_threads(folder, tmp_path / "x.txt", tmp_path / "out")["context_length"]
        assert text in capsys.readouterr().out
    assert list(found.values()) == [T // 2, T]


# Refused.


def test_text_of_one_token_is_refused(folders, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(CollectiveError, match="1 tokens are too few"):
        evaluate_on_threads(folders["llama"], tmp_path / "x.txt", tmp_path / "out")


def test_bert_without_a_mask_token_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders["bert"], tmp_path / "copy")
    (copy / "tokenizer.json").write_text(bytes_tokenizer().json)
    tensors = load_file(copy / "model.safetensors")
    without_mask = {name: x[:257].clone() if x.shape[0] == 258 else x for name, x in tensors.items()}
    save_file(without_mask, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    assert config["vocab_size"] == 258
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 257}))
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(CollectiveError, match="has no \\[MASK\\] token"):
        evaluate_on_threads(copy, tmp_path / "x.txt", tmp_path / "out")


def test_tokens_of_another_tokenizer_are_refused(folders, tmp_path):
    prepare_tokens(DataConfig(path=(str(write_text(tmp_path)),), tokenizer="bpe:257"), tmp_path / "tokens", SelfComm("world"))
    with pytest.raises(CollectiveError, match="was tokenized with another tokenizer than that of"):
        evaluate_on_threads(folders["llama"], tmp_path / "tokens", tmp_path / "out")


def test_more_stages_than_layers_are_refused(folders, tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(CollectiveError, match=r"--parallel\.pipeline 5: the model has 4 layers, at least one a rank"):
        evaluate_on_threads(folders["llama"], tmp_path / "x.txt", tmp_path / "out", size=5, pipeline=5)


# The held-out part of a run.


@pytest.mark.parametrize(("family", "prepared"), [("llama", True), ("llama", False), ("bert", True), ("qwen2", False)])
def test_held_out_text_of_a_run_has_its_last_validation_loss(tmp_path, family, prepared):
    """All of it, with the run's own tokenizer, whether its text was prepared or not."""
    source = write_tokens(tmp_path / "data") if prepared else write_text(tmp_path / "data")
    config = tiny_config(
        source, tmp_path / "run", **FAMILIES[family], data__tokenizer="auto" if prepared else "bpe:300",
        data__eval_fraction=0.2, train__steps=2, run__eval_batches=0, model__dropout=0.0,
    )  # fmt: skip
    run_ranks(2, lambda comm: train(config, comm))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"

    compute = EvaluateCompute(device="cpu", threads=1, micro_batch=1)
    arguments = EvaluateArguments(EvaluateModel(str(checkpoint)), train=compute, held_out=True)
    run_ranks(2, lambda comm: evaluate_model(arguments, comm))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    if family == "bert":  # other masks
        assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=0.02)
    else:  # training leaves out a last sample that is not full
        assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=2e-3)
