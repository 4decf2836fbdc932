"""Generated texts: the same on any ranks, with a KV cache as without, and those that transformers generates."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import write_hf_model
from runs import FAMILIES, full_model, small_config
from thread_ranks import run_ranks
from tokenizers import Tokenizer as Library
from tokenizers import models
from transformers import AutoModelForCausalLM

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import GenerateConfig
from mpilm.inference.arguments import InferenceCompute, InferenceParallel, ModelFolder, to_config
from mpilm.inference.generate import GeneratedSequence, generate, generate_texts
from mpilm.inference.load import config_from_folder, load_model
from mpilm.model.families import initial_value

V = 97
DECODERS = [family for family in FAMILIES if family != "bert"]
PROMPTS = {0: [5], 1: [1, 2, 3], 2: list(range(40)), 3: [7, 7], 4: [9, 30, 2, 44], 5: [0] * 8}
GREEDY = GenerateConfig(max_tokens=12, temperature=0.0)
SAMPLED = GenerateConfig(max_tokens=12, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random models, with a context of 16 tokens."""
    made = {}
    for family in DECODERS:
        shape = small_config(
            **{"model__n_heads": 4, "model__n_kv_heads": 2, **FAMILIES[family]}, model__context_length=16, model__dropout=0.0
        ).model
        model, _ = full_model(shape, V, torch.device("cpu"))
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.data.copy_(initial_value(2, name, tuple(p.shape), 0.3) + mean)
        made[family] = tmp_path_factory.mktemp(family)
        write_hf_model(made[family], model, shape, V)
        (made[family] / "tokenizer.json").write_text("{}")  # named, but not read
    return made


def generate_on_threads(folder, size, settings, pipeline=1, prompts=PROMPTS, eos=-1, tensor=1):
    """Return the tokens after each prompt, on which all ranks of a pipeline agree."""

    def body(comm):
        config = to_config(
            ModelFolder(str(folder)),
            InferenceParallel(pipeline, tensor),
            InferenceCompute(device="cpu", threads=1),
            generate=settings,
        )
        model = load_model(config_from_folder(config), comm)
        data = model.mesh.comm("data")
        own = {n: prompts[n] for n in list(prompts)[data.rank :: data.size]}
        return generate(model, own, settings, eos)

    found = {}
    for theirs in run_ranks(size, body):
        for number, tokens in theirs.items():
            assert found.setdefault(number, tokens) == tokens
    return found


@pytest.fixture(scope="module")
def serial(folders):
    """The sampled texts of each family on one rank."""
    return {family: generate_on_threads(folders[family], 1, SAMPLED) for family in DECODERS}


@pytest.mark.parametrize(
    ("family", "size", "pipeline"), list(zip(DECODERS, [2, 3, 2, 4, 4, 2], [1, 1, 2, 2, 4, 1], strict=True)), ids=str
)
def test_texts_are_equal_on_any_layout(folders, serial, family, size, pipeline):
    assert {n: len(tokens) for n, tokens in serial[family].items()} == dict.fromkeys(PROMPTS, 12)
    assert len({tuple(tokens) for tokens in serial[family].values()}) == len(PROMPTS)
    assert generate_on_threads(folders[family], size, SAMPLED, pipeline) == serial[family]


@pytest.mark.parametrize(
    ("family", "size", "pipeline"), list(zip(DECODERS, [2, 4, 4, 6, 8, 2], [1, 1, 2, 1, 2, 1], strict=True)), ids=str
)
def test_texts_are_equal_on_ranks_that_share_matrices(folders, tmp_path, family, size, pipeline):
    """The parts are in config.json, so that one rank computes the same bits."""
    folder = tmp_path / "parts"
    shutil.copytree(folders[family], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tensor_parts": 2}))
    expected = generate_on_threads(folder, 1, SAMPLED)
    assert generate_on_threads(folder, size, SAMPLED, pipeline, tensor=2) == expected


@pytest.mark.parametrize("family", DECODERS)
def test_texts_are_equal_without_the_cache(folders, serial, family, monkeypatch):
    next_batch, lengths = GeneratedSequence.next_batch, []

    def without_cache(self, device):
        self.cached = 0
        batch = next_batch(self, device)
        lengths.append(batch.tokens.shape[1])
        return batch

    monkeypatch.setattr(GeneratedSequence, "next_batch", without_cache)
    assert generate_on_threads(folders[family], 1, SAMPLED) == serial[family]
    assert max(lengths) == 16  # the last tokens of the context


def test_decoding_reads_only_new_tokens_until_the_context_is_full(folders, monkeypatch):
    next_batch, batches = GeneratedSequence.next_batch, []
    monkeypatch.setattr(
        GeneratedSequence, "next_batch", lambda self, device: batches.append(next_batch(self, device)) or batches[-1]
    )
    generate_on_threads(folders["llama"], 1, GREEDY, prompts={0: [1, 2, 3]})
    assert [len(batch.tokens[0]) for batch in batches] == [3] + [1] * 11
    assert [batch.positions.tolist() for batch in batches[1:]] == [[i] for i in range(3, 14)]
    batches.clear()
    generate_on_threads(folders["llama"], 1, GREEDY, prompts={0: list(range(14))})
    assert [len(batch.tokens[0]) for batch in batches] == [14, 1, 1] + [16] * 9
    assert batches[-1].positions.tolist() == list(range(16))


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_texts_equal_transformers(folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family])
    prompts = {number: prompt for number, prompt in PROMPTS.items() if len(prompt) + GREEDY.max_tokens <= 16}
    assert len(prompts) >= 4
    found = generate_on_threads(folders[family], 1, GREEDY, prompts=prompts)
    for number, prompt in prompts.items():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=V + 1, pad_token_id=0
        )
        assert found[number] == expected[0, len(prompt) :].tolist()


def test_text_ends_before_eos_and_others_continue(folders, serial):
    texts = serial["llama"]
    eos = texts[1][4]
    found = generate_on_threads(folders["llama"], 2, SAMPLED, pipeline=2, eos=eos)
    assert found == {n: tokens[: tokens.index(eos)] if eos in tokens else tokens for n, tokens in texts.items()}
    assert len(found[1]) <= 4
    assert any(len(tokens) == 12 for tokens in found.values())


def test_text_depends_on_its_seed_and_number(folders):
    prompts = {n: [1, 2] for n in range(3)}
    texts = generate_on_threads(folders["gpt2"], 1, SAMPLED, prompts=prompts)
    assert len({tuple(tokens) for tokens in texts.values()}) == 3
    assert generate_on_threads(folders["gpt2"], 1, replace(SAMPLED, seed=4), prompts=prompts)[0] == texts[1]
    empty = generate_on_threads(folders["gpt2"], 1, replace(SAMPLED, max_tokens=0), prompts=prompts)
    assert empty == {0: [], 1: [], 2: []}


def test_each_text_is_reported_once_it_is_complete(folders):
    config = to_config(ModelFolder(str(folders["llama"])), InferenceParallel(1), InferenceCompute(device="cpu", threads=1))
    model, done = load_model(config_from_folder(config), SelfComm("world")), []
    generate(model, PROMPTS, GREEDY, -1, done.append)
    assert sorted(done) == list(PROMPTS)


def test_texts_are_equal_with_more_ranks_than_prompts(folders):
    prompts = {0: [5, 6]}
    expected = generate_on_threads(folders["gpt2"], 1, SAMPLED, prompts=prompts)
    assert generate_on_threads(folders["gpt2"], 3, SAMPLED, prompts=prompts) == expected
    assert generate_on_threads(folders["gpt2"], 4, SAMPLED, pipeline=2, prompts=prompts) == expected


def test_chat_prompt_goes_through_the_template(folders, tmp_path, capsys):
    """The text is that of a prompt which transformers would make of the message."""
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    tokenizer = Library(models.BPE({**{chr(97 + i): i for i in range(26)}, "<u>": 26, "<a>": 27, "</s>": 28}, []))
    tokenizer.add_special_tokens(["<u>", "<a>", "</s>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = replace(GREEDY, prompt="abc", chat=True)
    config = to_config(
        ModelFolder(str(folder)), InferenceParallel(), InferenceCompute(device="cpu", threads=1), generate=settings
    )
    with pytest.raises(CollectiveError, match=r"needs a chat template, and .* has none"):
        generate_texts(config, SelfComm("world"))
    template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    run_ranks(2, lambda comm: generate_texts(config, comm))
    expected = generate_on_threads(folder, 1, GREEDY, prompts={0: [26, 0, 1, 2, 27]}, eos=28)[0]
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=False) + "\n"
