"""Texts that a model writes: the same on any ranks, with a cache as without, and as transformers writes them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import write_published
from runs import FAMILIES, full_model, small_config
from tokenizers import Tokenizer as Library
from tokenizers import models
from transformers import AutoModelForCausalLM

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.config import Generate
from mpilm.inference import generate as write_module
from mpilm.inference.generate import GeneratedSequence, generate, generate_texts
from mpilm.inference.load import config_from_folder, load_model
from mpilm.model.init import initial_value
from mpilm.usage import Compute, Folder, Stages, used

V = 97
DECODERS = [family for family in FAMILIES if family != "bert"]
PROMPTS = {0: [5], 1: [1, 2, 3], 2: list(range(40)), 3: [7, 7], 4: [9, 30, 2, 44], 5: [0] * 8}
GREEDY = Generate(max_tokens=12, temperature=0.0)
DRAWN = Generate(max_tokens=12, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of each family, with a context of 16 tokens."""
    made = {}
    for family in FAMILIES:
        shape = small_config(**FAMILIES[family], model__context_length=16, model__dropout=0.0).model
        model, _ = full_model(shape, V, torch.device("cpu"))
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.data.copy_(initial_value(2, name, tuple(p.shape), 0.3) + mean)
        made[family] = tmp_path_factory.mktemp(family.replace(" ", "-"))
        write_published(made[family], model, shape, V)
        (made[family] / "tokenizer.json").write_text("{}")  # named, and never read
    return made


def texts(folder, size, settings, pipeline=1, prompts=PROMPTS, stop=-1):
    def body(comm):
        config = used(Folder(str(folder)), Stages(pipeline), Compute(device="cpu", threads=1), generate=settings)
        model = load_model(config_from_folder(config), comm).model
        mine = {n: prompts[n] for n in list(prompts)[model.data.rank :: model.data.size]}
        return generate(model, mine, settings, stop)

    everyone = run_ranks(size, body)
    found = {}
    for theirs in everyone:
        for number, tokens in theirs.items():
            assert found.setdefault(number, tokens) == tokens  # on all ranks of a pipeline
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_texts_do_not_depend_on_the_ranks(folders, family):
    alone = texts(folders[family], 1, DRAWN)
    assert {n: len(tokens) for n, tokens in alone.items()} == dict.fromkeys(PROMPTS, 12)
    assert len({tuple(tokens) for tokens in alone.values()}) == len(PROMPTS)
    for size, pipeline in [(2, 1), (3, 1), (2, 2), (4, 2), (4, 4)]:
        assert texts(folders[family], size, DRAWN, pipeline) == alone, (size, pipeline)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_cache_changes_nothing(folders, family, settings, monkeypatch):
    with_cache = texts(folders[family], 1, settings)
    batch, lengths = GeneratedSequence.next_batch, []

    def without_cache(self, device):
        self.cached = 0
        found = batch(self, device)
        lengths.append(found.tokens.shape[1])
        return found

    monkeypatch.setattr(write_module.GeneratedSequence, "next_batch", without_cache)
    assert texts(folders[family], 1, settings) == with_cache
    assert max(lengths) == 16  # the last tokens of the context, once there are more


def test_with_the_cache_only_what_is_new_is_read(folders, monkeypatch):
    batch, read = GeneratedSequence.next_batch, []
    monkeypatch.setattr(
        write_module.GeneratedSequence, "next_batch", lambda self, device: read.append(batch(self, device)) or read[-1]
    )
    texts(folders["llama"], 1, GREEDY, prompts={0: [1, 2, 3]})
    assert [len(found.tokens[0]) for found in read] == [3] + [1] * 11
    assert [found.positions.tolist() for found in read[1:]] == [[i] for i in range(3, 14)]
    read.clear()
    texts(folders["llama"], 1, GREEDY, prompts={0: list(range(14))})
    assert [len(found.tokens[0]) for found in read] == [14, 1, 1] + [16] * 9
    assert read[-1].positions.tolist() == list(range(16))


@pytest.mark.parametrize("family", DECODERS)
def test_transformers_writes_the_same(folders, family):
    theirs = AutoModelForCausalLM.from_pretrained(folders[family])
    for number, prompt in PROMPTS.items():
        if len(prompt) + GREEDY.max_tokens > 16:
            continue
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=V + 1, pad_token_id=0
        )
        assert texts(folders[family], 1, GREEDY, prompts={number: prompt})[number] == expected[0, len(prompt) :].tolist()


def test_a_text_ends_before_the_stop_token_and_others_go_on(folders):
    whole = texts(folders["llama"], 1, DRAWN)
    stop = whole[1][4]
    cut = texts(folders["llama"], 2, DRAWN, pipeline=2, stop=stop)
    assert cut == {n: tokens[: tokens.index(stop)] if stop in tokens else tokens for n, tokens in whole.items()}
    assert len(cut[1]) <= 4
    assert any(len(tokens) == 12 for tokens in cut.values())


def test_the_seed_and_the_number_decide(folders):
    same = {n: [1, 2] for n in range(3)}
    one = texts(folders["gpt2"], 1, DRAWN, prompts=same)
    assert len({tuple(tokens) for tokens in one.values()}) == 3
    assert texts(folders["gpt2"], 1, replace(DRAWN, seed=4), prompts=same)[0] == one[1]
    assert texts(folders["gpt2"], 1, replace(DRAWN, max_tokens=0), prompts=same) == {0: [], 1: [], 2: []}


def test_each_text_is_reported_when_it_is_done(folders):
    config = used(Folder(str(folders["llama"])), Stages(1), Compute(device="cpu", threads=1))
    model, done = load_model(config_from_folder(config), SelfComm("world")).model, []
    generate(model, PROMPTS, GREEDY, -1, done.append)
    assert sorted(done) == list(PROMPTS)


def test_more_ranks_than_prompts(folders):
    one = {0: [5, 6]}
    expected = texts(folders["gpt2"], 1, DRAWN, prompts=one)
    assert texts(folders["gpt2"], 3, DRAWN, prompts=one) == expected
    assert texts(folders["gpt2"], 4, DRAWN, pipeline=2, prompts=one) == expected


def test_a_chat_model_is_asked_through_its_template(folders, tmp_path, capsys):
    """As if the text that transformers makes of the message had been given as the prompt."""
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    tokenizer = Library(models.BPE({**{chr(97 + i): i for i in range(26)}, "<u>": 26, "<a>": 27, "</s>": 28}, []))
    tokenizer.add_special_tokens(["<u>", "<a>", "</s>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    words = {"eos_token": "</s>", "chat_template": "{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>"}
    settings = replace(GREEDY, prompt="abc", chat=True)
    config = used(Folder(str(folder)), Stages(), Compute(device="cpu", threads=1), generate=settings)
    with pytest.raises(CollectiveError, match="no chat template beside the tokenizer"):
        generate_texts(config, SelfComm("world"))
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    run_ranks(2, lambda comm: generate_texts(config, comm))
    written = texts(folder, 1, GREEDY, prompts={0: [26, 0, 1, 2, 27]}, stop=28)[0]
    assert capsys.readouterr().out == tokenizer.decode(written, skip_special_tokens=False) + "\n"
