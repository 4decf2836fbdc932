"""What a person gets to see whose model folder, prompts or text cannot be used: one message, and nothing written over."""

import json
import shutil

import pytest
import torch
from checkpoints import write_published
from helpers import refusal
from runs import FAMILIES, full_model, small_config
from text import write_text

from mpilm.data.tokenizer import bytes_tokenizer

CONFIG, DATA, FILE = 78, 65, 74


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of a few thousand parameters, as transformers would read it."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    shape = small_config(**FAMILIES["gpt2"], model__context_length=16).model
    model, _ = full_model(shape, 257, torch.device("cpu"))
    write_published(path, model, shape, 257)
    (path / "tokenizer.json").write_text(bytes_tokenizer().json)
    return path


def changed(folder, parent, **config):
    copy = shutil.copytree(folder, parent / "model")
    found = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(found))
    return copy


def test_a_folder_that_is_not_there_on_two_ranks(tmp_path):
    message = refusal("generate", "--model.init-from", tmp_path / "none", ranks=2, code=FILE)
    assert f"--model.init-from {tmp_path / 'none'} is not a folder" in message


def test_weights_that_do_not_fit_the_config_on_two_ranks(folder, tmp_path):
    model = changed(folder, tmp_path, n_layer=5)
    message = refusal("generate", "--model.init-from", model, ranks=2)
    assert "lacks transformer.h.4.ln_1.weight, transformer.h.4.ln_1.bias" in message


def test_a_tokenizer_with_more_ids_than_the_model(folder, tmp_path):
    model = changed(folder, tmp_path)
    (model / "tokenizer.json").write_text(bytes_tokenizer().with_mask().json)
    message = refusal("train", "--model.init-from", model, "--data.path", write_text(tmp_path), "--run.dir", tmp_path / "run")
    assert f"has ids up to 257, but {model} has 257 rows for them" in message
    assert not (tmp_path / "run").exists()


def test_an_index_that_leads_out_of_its_folder(folder, tmp_path):
    model = changed(folder, tmp_path)
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal("evaluate", "--model.init-from", model, "--data.path", write_text(tmp_path), code=DATA)
    assert "is not an index of tensors in files of its own folder" in message


def test_prompts_that_are_no_objects(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    message = refusal("generate", "--model.init-from", folder, "--generate.prompts", tmp_path / "p.jsonl", code=DATA)
    assert f'{tmp_path / "p.jsonl"}: line 2 is not an object with a "prompt" that is a string' in message


def test_no_model_at_all():
    assert "--model.init-from is needed" in refusal("generate")


def test_a_pipeline_that_does_not_divide_the_ranks(folder):
    message = refusal("generate", "--model.init-from", folder, "--parallel.pipeline", 2, ranks=3)
    assert "--parallel.pipeline 2 does not divide 3 ranks" in message
