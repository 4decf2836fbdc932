"""Adapters against PEFT: its training loop, its files in ours and ours in its; and the same bits on any layout."""

import json
import re
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from checkpoints import write_hf_model
from runs import (
    FAMILIES,
    differing,
    full_batch,
    full_model,
    layout,
    serial_config,
    small_config,
    train_on_threads,
    train_to_end,
    train_until_killed,
)
from safetensors.torch import load_file, save_file
from text import tiny_config, write_tokens
from thread_ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mpilm.checkpoint.merge import merge_adapter
from mpilm.checkpoint.pretrained import find_base_model, find_tokenizer_folder, read_pretrained_config
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import Config, resolve_config
from mpilm.engine.step import train_step
from mpilm.errors import ConfigError, FileError
from mpilm.inference.arguments import InferenceCompute, InferenceParallel, ModelFolder, to_config
from mpilm.inference.load import config_from_folder, load_model
from mpilm.model.sequence_info import SequenceInfo
from mpilm.optim.optimizer import learning_rate
from mpilm.trainer.build import build_run
from mpilm.trainer.loop import train

WHERE = {"llama": (), "gpt2": ("o",), "qwen2": ("q", "v"), "qwen3": (), "mixtral": (), "qwen3-moe": (), "bert": ("down", "q")}
PEFT_WORDS = {
    "llama": "all-linear", "gpt2": ["c_attn", "mlp.c_proj"], "qwen2": ["k_proj", "gate_proj"], "qwen3": ["o_proj"],
    "mixtral": ["q_proj", "o_proj"], "qwen3-moe": ["v_proj"],
    "bert": r"bert\.encoder\.layer\.\d+\.(attention\.self\.key|intermediate\.dense)",
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each family with a tiny model."""
    found = {}
    for family, changes in FAMILIES.items():
        shape = tiny_config("", "", model__dropout=0.0, **changes).model
        torch.manual_seed(1)
        model, _ = full_model(shape, 300, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.1)
        found[family] = tmp_path_factory.mktemp("bases") / family
        write_hf_model(found[family], model, shape, 300)
    return found


def job(data, folder, base, **changes):
    """A run that gives the model of a folder adapters."""
    asked = {"model__lora_rank": 4, "model__lora_alpha": 6.0, "train__steps": 4, "checkpoint__every": 2, "run__eval_every": 2}
    config = tiny_config(data, folder, **asked | changes)
    ours = {key: getattr(config.model, key) for key in ("lora_rank", "lora_alpha", "lora_targets", "router_loss")}
    return replace(config, model=replace(read_pretrained_config(base), **ours, init_from=str(base)))


def theirs(base, family):
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(base)


def logits(folder, tokens, base=""):
    """What our model in a folder makes of tokens, without a training run."""
    config = config_from_folder(to_config(ModelFolder(str(folder), base), InferenceParallel(), InferenceCompute()))
    model = load_model(config, SelfComm()).stages[0].model
    with torch.no_grad():
        return model(tokens, SequenceInfo(torch.arange(tokens.shape[1])))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(0))


@each_family
def test_a_checkpoint_is_an_adapter_that_peft_reads(tmp_path, data, bases, tokens, family):
    config = job(data, tmp_path / "run", bases[family], model__lora_targets=WHERE[family], train__lr=0.05)
    run_ranks(2, lambda comm: train(config, comm))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    model = peft.PeftModel.from_pretrained(theirs(bases[family], family), checkpoint)
    there = {name for name, _ in model.named_parameters() if "lora" in name}
    assert {name.replace(".default", "") for name in there} == set(load_file(checkpoint / "adapter_model.safetensors"))
    with torch.no_grad():
        adapted = model(tokens).logits
    plain = logits(bases[family], tokens)
    assert not torch.allclose(adapted, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(checkpoint, tokens), adapted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(theirs(checkpoint, family)(tokens).logits, adapted)  # transformers finds the model


@each_family
def test_an_adapter_of_peft_is_read(tmp_path, bases, tokens, family):
    torch.manual_seed(5)
    kind = {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=PEFT_WORDS[family], **kind)
    model = peft.get_peft_model(theirs(bases[family], family), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 2.0)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(tokens).logits
    assert not torch.allclose(expected, logits(bases[family], tokens), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(tmp_path / "adapter", tokens), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged", tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert"])
def test_it_is_pefts_training_loop(tmp_path, data, bases, family):
    config = job(data, tmp_path / "run", bases[family], train__steps=50, train__lr=0.02, train__clip_norm=0.5)
    settings = config.train
    run = build_run(config, SelfComm())
    state = run.model.owned_slices()
    start = job(data, tmp_path / "start", bases[family], train__steps=1, train__lr=0.0, train__min_lr=0.0)
    run_ranks(1, lambda comm: train(start, comm))
    checkpoint = tmp_path / "start" / "checkpoints" / "step-00000001"
    reference = peft.PeftModel.from_pretrained(theirs(bases[family], family), checkpoint, is_trainable=True)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(x.numel() for x in state.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )
    losses = []
    for step in range(settings.steps):
        tokens, targets = full_batch(run.batches, step, 8)
        loss = torch.nn.functional.cross_entropy(reference(tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        assert train_step(run.model, run.batches, step).loss == pytest.approx(loss.item(), rel=1e-5), step
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


TENSOR = {"model__tensor_parts": 2, "model__n_kv_heads": 2}
LAYOUTS = [
    (1, layout(schedule="zero-bubble")), (3, layout(zero=1)), (3, layout(zero=2)), (3, layout(zero=3)), (2, layout(2)),
    (4, layout(2, "interleaved", 2)), (4, layout(2, "zero-bubble", 3)), (6, layout(3, "zero-bubble", 1)),
    (4, layout(tensor=2, zero=1) | TENSOR), (8, layout(2, "zero-bubble", 3, tensor=2) | TENSOR),
]  # fmt: skip


CASES = [("llama", *layout) for layout in LAYOUTS]
CASES += [(family, *LAYOUTS[i]) for number, family in enumerate(FAMILIES) for i in ((3, 9), (5, 6))[number % 2]]


@pytest.mark.parametrize(("family", "size", "layout"), CASES, ids=str)
def test_every_layout_has_the_bits_of_the_serial_run(family, size, layout):
    changes = FAMILIES[family] | layout
    config = small_config(**changes, model__lora_rank=2, model__lora_targets=WHERE[family], train__lr=0.02)
    numbers, tensors = train_on_threads(size, config, steps=3)
    expected = train_on_threads(1, serial_config(config), steps=3)
    assert numbers == expected[0]
    count = len({re.sub(r"\.parts\.\d", "", name) for name in tensors})
    assert count == 3 * 2 * 4 * len(WHERE[family] or (0,) * (count // 24))
    assert differing(tensors, expected[1]) == []


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_so_it_has_with_blocks_recomputed_and_in_bfloat16(number):
    (size, layout), (dtype, recompute) = LAYOUTS[number], [("float32", "attention"), ("bfloat16", "block")][number // 2 % 2]
    config = small_config(
        **layout, model__lora_rank=2, train__recompute=recompute, train__dtype=dtype, model__tie_embeddings=False
    )
    numbers, tensors = train_on_threads(size, config)
    expected = train_on_threads(1, serial_config(config))
    assert numbers == expected[0]
    assert differing(tensors, expected[1]) == []


@pytest.mark.parametrize("first", [(2, layout(2)), (3, layout(zero=3))])
def test_a_run_goes_on_on_another_layout(tmp_path, data, bases, first):
    whole = train_to_end(job(data, tmp_path / "whole", bases["llama"]), 1)
    train_until_killed(job(data, tmp_path / "run", bases["llama"], **first[1]), first[0], step=3)
    assert train_to_end(job(data, tmp_path / "run", bases["llama"], **layout(2, zero=1)), 4) == whole


def test_the_model_is_left_as_it_was_and_the_adapter_is_small(tmp_path, data, bases):
    before = (bases["llama"] / "model.safetensors").read_bytes()
    run_ranks(2, lambda comm: train(job(data, tmp_path / "run", bases["llama"]), comm))
    assert (bases["llama"] / "model.safetensors").read_bytes() == before
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert find_base_model(checkpoint) == bases["llama"].resolve()


def test_an_adapter_is_trained_further(tmp_path, data, bases, tokens):
    """From a checkpoint with one: its shape, its values, and the same model beneath."""
    run_ranks(1, lambda comm: train(job(data, tmp_path / "one", bases["llama"], train__lr=0.05), comm))
    checkpoint = tmp_path / "one" / "checkpoints" / "step-00000004"
    other = job(data, tmp_path / "two", checkpoint, train__steps=1, train__lr=0.0, train__min_lr=0.0)
    assert read_pretrained_config(checkpoint).lora_rank == 4
    run_ranks(3, lambda comm: train(other, comm))
    later = tmp_path / "two" / "checkpoints" / "step-00000001"
    assert find_base_model(later) == bases["llama"].resolve()
    assert torch.equal(logits(later, tokens), logits(checkpoint, tokens))


# What is refused.


@pytest.fixture
def adapter(tmp_path, bases):
    """A folder with an adapter that PEFT wrote."""
    model = peft.get_peft_model(theirs(bases["llama"], "llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(adapter, **config):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return adapter


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"exclude_modules": ["q_proj"]}, r"exclude_modules \['q_proj'\] is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out true is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported"),
        ({"r": True}, "r true is not a number"),
        ({"r": 0}, "r 0 is not a number above zero"),
        ({"lora_alpha": None}, "lacks 'lora_alpha'"),
        (
            {"target_modules": ["lm_head"]},
            r"target_modules \['lm_head'\] names no matrix of llama that may have an adapter: self",
        ),
        ({"target_modules": "(("}, "names no matrix of llama"),
        ({"base_model_name_or_path": None}, "lacks base_model_name_or_path"),
    ],
)
def test_adapters_of_other_kinds(adapter, config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_pretrained_config(changed(adapter, **config))
    assert str(adapter / "adapter_config.json") in str(caught.value)


def test_an_adapter_whose_model_is_elsewhere(adapter, bases, tokens, tmp_path):
    expected = logits(adapter, tokens)
    changed(adapter, base_model_name_or_path="no/model")
    with pytest.raises(FileError, match=r"holds an adapter to 'no/model', which is not a model folder here, .*--model.base"):
        read_pretrained_config(adapter)
    assert torch.equal(logits(adapter, tokens, base=str(bases["llama"])), expected)
    shutil.copytree(bases["llama"], tmp_path / "beside")
    changed(adapter, base_model_name_or_path="../beside")  # as seen from the adapter
    assert torch.equal(logits(adapter, tokens), expected)


def test_an_adapter_without_a_tokenizer_has_its_models(adapter, bases):
    assert find_tokenizer_folder(adapter) == str(bases["llama"])
    (adapter / "tokenizer.json").touch()
    assert find_tokenizer_folder(adapter) == str(adapter)


def test_targets_in_any_order_are_the_same():
    every = tiny_config("", "", model__lora_rank=2, model__lora_targets=("down", "v", "q", "k", "o", "gate", "up", "q")).model
    assert resolve_config(Config(model=every)).model.lora_targets == ()
    some = replace(every, lora_targets=("v", "q", "v"))
    assert resolve_config(Config(model=some)).model.lora_targets == ("q", "v")


def test_tensors_that_no_adapter_here_has(adapter, tokens):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CollectiveError, match=re.escape("an adapter of a llama model, base_model.model.lm_head.lora_A.weight")):
        logits(adapter, tokens)


def test_an_adapter_of_another_shape(adapter, tokens):
    with pytest.raises(CollectiveError, match=r"q_proj.lora_A.weight has shape \(2, \d+\), this model needs \(3, \d+\)"):
        logits(changed(adapter, r=3), tokens)


@each_family
def test_merging_equals_peft_in_float64(tmp_path, bases, family):
    torch.manual_seed(5)
    kind = {"fan_in_fan_out": True} if family == "gpt2" else {}
    model = theirs(bases[family], family).double()
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=PEFT_WORDS[family], **kind))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).double()  # numbers of float32, which files hold exactly
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    expected = model.merge_and_unload().state_dict()
    merged, before = theirs(tmp_path / "merged", family).state_dict(), theirs(bases[family], family).state_dict()
    assert set(merged) == set(expected)
    for name, values in merged.items():
        torch.testing.assert_close(values, expected[name].float(), rtol=2**-23, atol=0)  # a last bit: sums in another order
    assert any(not torch.equal(values, before[name]) for name, values in merged.items())
    assert (tmp_path / "merged" / "tokenizer.json").exists() == (bases[family] / "tokenizer.json").exists()


def test_merging_keeps_the_dtype_and_the_other_bytes_and_refuses_what_does_not_fit(tmp_path, adapter, bases):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    half = {name: values.bfloat16() for name, values in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", {"format": "pt"})
    merge_adapter(str(adapter), tmp_path / "merged", str(base))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {values.dtype for values in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], values) for name, values in half.items() if "q_proj" not in name)
    for wrong, out, message in (
        (base, "new", "is not the folder of an adapter"),
        (adapter, "merged", "merged exists; name a folder that does not"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge_adapter(str(wrong), tmp_path / out, str(base))
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="does not fit its base"):
        merge_adapter(str(adapter), tmp_path / "new", str(base))
    assert not list(tmp_path.glob("*new*"))
