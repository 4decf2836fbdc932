"""Model folders, prompts and texts that cannot be used: one message, and nothing is overwritten."""

import json
import shutil

import pytest
import torch
from checkpoints import write_hf_model
from helpers import refusal, refusal_in_process
from runs import FAMILIES, full_model, small_config
from text import write_text

from mpilm.data.tokenizer import bytes_tokenizer

DATA, FILE = 65, 74


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of a few thousand parameters, as transformers would read it."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    shape = small_config(**FAMILIES["gpt2"], model__context_length=16).model
    model, _ = full_model(shape, 257, torch.device("cpu"))
    write_hf_model(path, model, shape, 257)
    (path / "tokenizer.json").write_text(bytes_tokenizer().json)
    return path


def changed(folder, parent, **config):
    copy = shutil.copytree(folder, parent / "model")
    found = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(found))
    return copy


def test_generate_missing_folder_on_two_ranks_is_refused(tmp_path):
    message = refusal("generate", "--model.init-from", tmp_path / "none", ranks=2, code=FILE)
    assert f"--model.init-from {tmp_path / 'none'} is not a folder" in message


def test_generate_weights_that_do_not_fit_the_config_are_refused(folder, tmp_path):
    model = changed(folder, tmp_path, n_layer=5)
    message = refusal_in_process("generate", "--model.init-from", model)
    assert "lacks transformer.h.4.ln_1.weight, transformer.h.4.ln_1.bias" in message


def test_train_tokenizer_with_more_ids_than_the_model_is_refused(folder, tmp_path):
    model = changed(folder, tmp_path)
    (model / "tokenizer.json").write_text(bytes_tokenizer().with_mask().json)
    flags = ("--model.init-from", model, "--data.path", write_text(tmp_path), "--run.dir", tmp_path / "run")
    assert f"has ids up to 257, but {model} has 257 rows for them" in refusal_in_process("train", *flags)
    assert not (tmp_path / "run").exists()


def test_evaluate_index_that_leads_out_of_its_folder_is_refused(folder, tmp_path):
    model = changed(folder, tmp_path)
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal_in_process("evaluate", "--model.init-from", model, "--data.path", write_text(tmp_path), code=DATA)
    assert "is not an index of tensors in files of its own folder" in message


def test_generate_prompts_that_are_no_objects_are_refused(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    flags = ("--model.init-from", folder, "--generate.prompts", tmp_path / "p.jsonl")
    message = refusal_in_process("generate", *flags, code=DATA)
    assert f'{tmp_path / "p.jsonl"}: line 2 is not an object with a "prompt" that is a string' in message


def test_generate_without_a_model_is_refused():
    assert "--model.init-from is needed" in refusal_in_process("generate")


def test_generate_pipeline_that_does_not_divide_the_ranks_is_refused(folder):
    message = refusal_in_process("generate", "--model.init-from", folder, "--parallel.pipeline", 2)
    assert "--parallel.pipeline 2 does not divide 1 rank" in message
