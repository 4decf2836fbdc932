"""Every model family against transformers, with random weights, both ways; its parts; Hugging Face folders of other makes."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from checkpoints import write_hf_model
from runs import full_model
from safetensors.torch import load_file, save_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mpilm.checkpoint.load import load_hf_weights
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import Config, ModelConfig, resolve_config
from mpilm.engine.pipelined import resolve_model_layouts
from mpilm.errors import ConfigError
from mpilm.model.families import build_model, initial_value
from mpilm.model.hf.config import hf_config, hf_model_type, read_hf_config
from mpilm.model.hf.names import LEGACY_KEYS, MODULE_NAMES, hf_name
from mpilm.model.moe import load_balancing_loss
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.apply import prune_to_stage
from mpilm.parallel.layout import select_owned

V, T = 61, 16
FAMILIES = {
    "llama": {"n_kv_heads": 2, "tie_embeddings": False},
    "llama scaled": {"rope_scaling": (8.0, 1.0, 4.0, 8.0), "rope_theta": 50.0},
    "wide heads": {"head_width": 12, "n_kv_heads": 1},
    "gpt2": {"arch": "gpt2"},
    "gpt2 untied": {"arch": "gpt2", "tie_embeddings": False, "d_ff": 40},
    "qwen2": {"arch": "qwen", "n_kv_heads": 2, "norm_eps": 1e-6},
    "qwen3": {"arch": "qwen", "qk_norm": True, "n_kv_heads": 2, "head_width": 10, "tie_embeddings": False},
    "mixtral": {"arch": "mixtral", "n_kv_heads": 2, "n_experts": 4, "tie_embeddings": False, "rope_theta": 1e6},
    "qwen3-moe": {
        "arch": "qwen-moe", "qk_norm": True, "n_kv_heads": 2, "n_experts": 5, "d_ff": 24, "head_width": 10, "norm_eps": 1e-6
    },
    "bert": {"arch": "bert", "norm_eps": 1e-12},
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "mixtral": transformers.MixtralForCausalLM,
    "qwen3_moe": transformers.Qwen3MoeForCausalLM,
    "bert": transformers.BertForMaskedLM,
}


def settings_of(family: str, **changes) -> ModelConfig:
    base = ModelConfig(n_layers=2, n_heads=4, d_model=32, context_length=T)
    return resolve_config(Config(model=replace(base, **FAMILIES[family], **changes))).model


def random_model(settings: ModelConfig):
    """All parameters drawn, norms and biases too, and large enough for logits of some size."""
    model, flat = full_model(settings, V, torch.device("cpu"))
    for layout in select_owned(resolve_model_layouts(settings, V, (settings.n_layers,))):
        mean = 1.0 if layout.name.endswith("norm.weight") else 0.0
        flat.parameter(layout.name).copy_(initial_value(1, layout.name, layout.shape, 0.2) + mean)
    return model


def random_tokens(batch=3, length=T):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model, tokens, positions=None, **info):
    return model(tokens, SequenceInfo(torch.arange(tokens.shape[1]) if positions is None else positions, **info))


def read(folder, **changes):
    """The model of a Hugging Face folder, and its settings, some of them changed."""
    settings, vocab_size = read_hf_config(json.loads((folder / "config.json").read_text()), "config.json")
    settings = replace(settings, **changes)
    model, flat = full_model(settings, vocab_size, torch.device("cpu"))
    shapes = {
        layout.name: layout.shape for layout in select_owned(resolve_model_layouts(settings, vocab_size, (settings.n_layers,)))
    }
    load_hf_weights(folder, flat.owned_slices(flat.values), shapes, settings, SelfComm("world"))
    return model, settings


def write(folder, family, **changes):
    """A Hugging Face folder with a random model; return the model."""
    settings = settings_of(family, **changes)
    model = random_model(settings)
    folder.mkdir(exist_ok=True)
    write_hf_model(folder, model, settings, V)
    return model


def change_tensors(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def is_close(ours, theirs):
    assert theirs.std() > 0.1
    return bool((ours - theirs).abs().max() < 1e-5 * theirs.abs().max())


@each_family
def test_hf_folder_written_by_mpilm_is_read_by_transformers(family, tmp_path):
    model = write(tmp_path, family)
    theirs, problems = CLASSES[hf_model_type(settings_of(family))].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    with torch.no_grad():
        expected = theirs.eval()(random_tokens()).logits
    assert is_close(logits_of(model, random_tokens()), expected)


@each_family
def test_hf_folder_written_by_transformers_is_read_by_mpilm(family, tmp_path):
    settings = settings_of(family)
    torch.manual_seed(0)
    theirs = CLASSES[hf_model_type(settings)](transformers.AutoConfig.for_model(**hf_config(settings, V, 7))).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + ("norm" in name.lower() and parameter.ndim == 1))
        expected = theirs(random_tokens()).logits
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # in several files with an index
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, found = read(tmp_path)
    assert found == replace(settings, dropout=0.0)
    assert is_close(logits_of(model, random_tokens()), expected)


@each_family
def test_hf_names_are_unique(family):
    settings = settings_of(family, n_layers=12)
    names = [name for name, _ in build_model(settings, V).named_parameters()]
    assert len({hf_name(name, settings.arch) for name in names}) == len(names)
    modules = MODULE_NAMES[settings.arch]
    assert len(set(modules.values())) == len(modules)


@each_family
@pytest.mark.parametrize("cut", [(4,), (3, 1), (1, 2, 1), (1, 1, 1, 1)])
def test_stages_keep_the_names_and_values_of_the_whole(family, cut):
    model = random_model(settings_of(family, n_layers=4))
    parameters, found, y = dict(model.named_parameters()), [], random_tokens()
    for number, blocks in enumerate(cut):
        stage = copy.deepcopy(model)
        prune_to_stage(stage, number, cut)
        assert len(stage.blocks) == blocks
        assert all(torch.equal(parameter, parameters[name]) for name, parameter in stage.named_parameters())
        found += [name for name, _ in stage.named_parameters()]
        y = logits_of(stage, y)
    assert sorted(found) == sorted(parameters)
    assert torch.equal(y, logits_of(model, random_tokens()))


@each_family
def test_attention_sees_later_tokens_in_bert_only(family):
    model, tokens = random_model(settings_of(family)), random_tokens()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % V
    before, after = logits_of(model, tokens), logits_of(model, changed)
    assert torch.allclose(after[:, :10], before[:, :10], rtol=1e-4, atol=1e-5) == (not family.startswith("bert"))
    assert not torch.allclose(after[:, 10:], before[:, 10:], rtol=1e-2, atol=1e-2)


@each_family
def test_documents_packed_in_one_sequence_do_not_see_each_other(family):
    model, tokens, lengths = random_model(settings_of(family)), random_tokens(batch=1), (5, 4, 7)
    expected = torch.cat([logits_of(model, part) for part in tokens.split(lengths, dim=1)], dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    torch.testing.assert_close(logits_of(model, tokens, positions, documents=documents), expected, rtol=1e-4, atol=1e-4)


@each_family
def test_dropout_of_a_sample_does_not_depend_on_its_batch(family):
    model, tokens = random_model(settings_of(family, dropout=0.2)), random_tokens(batch=4)
    expected = logits_of(model, tokens, dropout_keys=[1, 2, 3, 4])
    torch.testing.assert_close(logits_of(model, tokens[1:3], dropout_keys=[2, 3]), expected[1:3], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits_of(model, tokens, dropout_keys=[1, 2, 3, 5])[3], expected[3], atol=1e-3)
    assert not torch.allclose(logits_of(model, tokens), expected, atol=1e-3)


# Mixture of experts.


def test_load_balancing_loss_equals_transformers():
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    probs, expected = scores.softmax(-1), float(load_balancing_loss_func((scores,), 4, 2))
    assert float(load_balancing_loss(probs, probs.topk(2).indices)) == pytest.approx(expected, rel=1e-6)
    assert float(load_balancing_loss(torch.full((8, 4), 0.25), torch.arange(16).view(8, 2) % 4)) == pytest.approx(2.0)


def test_router_gradient_has_the_auxiliary_loss():
    """Against the auxiliary loss added to the sum explicitly."""
    settings = settings_of("mixtral", n_layers=1)
    model, info = random_model(settings), SequenceInfo(torch.arange(T), loss_weight=0.25)
    router, inputs = model.blocks["0"].mlp.router, []
    hook = router.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(random_tokens(), info).logsumexp(-1).sum().backward()
    hook.remove()
    found = router.weight.grad.clone()
    router.weight.grad = None
    model(random_tokens(), replace(info, loss_weight=0.0)).logsumexp(-1).sum().backward()
    probs = (inputs[0].detach() @ router.weight.t()).softmax(-1)
    (settings.router_loss * 0.25 * load_balancing_loss(probs, probs.topk(2).indices)).backward()
    torch.testing.assert_close(router.weight.grad, found, rtol=1e-5, atol=1e-8)
    assert router.weight.grad.abs().max() > 0


def test_auxiliary_loss_ignores_padding():
    """Its gradient is that of the sequence without the padding."""
    model = random_model(settings_of("mixtral", n_layers=1))
    router, tokens, gradients = model.blocks["0"].mlp.router, random_tokens(), []
    padding = (torch.arange(T) >= 10).long().neg().expand_as(tokens)
    for x, documents in ((tokens, padding), (tokens[:, :10], torch.zeros_like(tokens[:, :10]))):
        by_weight = []
        for loss_weight in (0.25, 0.0):
            router.weight.grad = None
            info = SequenceInfo(torch.arange(x.shape[1]), documents=documents, loss_weight=loss_weight)
            model(x, info)[:, :10].logsumexp(-1).sum().backward()
            by_weight.append(router.weight.grad)
        gradients.append(by_weight[0] - by_weight[1])
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_auxiliary_loss_survives_compilation():
    moe, gradients = random_model(settings_of("mixtral", router_loss=10.0)).blocks["0"].mlp, []
    x = torch.randn(3, T, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(moe.forward, dynamic=False, backend="aot_eager")
    for forward, loss_weight in ((moe.forward, 0.0), (moe.forward, 0.25), (compiled, 0.25)):
        moe.router.weight.grad = None
        forward(x, SequenceInfo(torch.arange(T), loss_weight=loss_weight)).logsumexp(-1).sum().backward()
        gradients.append(moe.router.weight.grad)
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=1e-4, atol=1e-4)


def test_expert_without_tokens_has_a_gradient_of_zero():
    model = random_model(settings_of("mixtral", n_layers=1))
    moe = model.blocks["0"].mlp
    with torch.no_grad():
        moe.router.weight.zero_()
    model(random_tokens(), SequenceInfo(torch.arange(T))).sum().backward()
    used = [[bool(p.grad.any()) for p in expert.parameters()] for expert in moe.experts.values()]
    assert sorted(used) == [[False] * 3] * 2 + [[True] * 3] * 2  # all alike: every token goes to the same two


def test_run_experts_can_be_exchanged():
    """Here by one that computes every expert for every token, and adds the chosen ones in ascending number."""
    model = random_model(settings_of("mixtral"))
    expected = logits_of(model, random_tokens())

    def run_experts(experts, flat, chosen, weights):
        by_expert = torch.zeros(len(flat), len(experts)).scatter_(1, chosen, weights)
        return sum(expert(flat) * by_expert[:, i, None] for i, expert in enumerate(experts.values()))

    for block in model.blocks.values():
        block.mlp.run_experts = partial(run_experts, block.mlp.experts)
    torch.testing.assert_close(logits_of(model, random_tokens()), expected, rtol=1e-5, atol=1e-5)
    model.blocks["0"].mlp.run_experts = lambda flat, chosen, weights: torch.zeros_like(flat)
    assert not torch.allclose(logits_of(model, random_tokens()), expected, rtol=1e-2, atol=1e-2)


# Hugging Face folders of other makes.


def test_hf_folder_without_head_or_prefix_is_read(tmp_path):
    for family, prefix in (("gpt2", "transformer."), ("llama scaled", "model."), ("bert", "bert.")):
        model = write(tmp_path / family, family)
        change_tensors(tmp_path / family, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})  # noqa: B023
        assert torch.equal(logits_of(read(tmp_path / family)[0], random_tokens()), logits_of(model, random_tokens()))


def test_hf_folder_with_legacy_and_ignored_keys_is_read(tmp_path):
    model = write(tmp_path, "bert")

    def as_google_wrote_it(tensors):
        for new, legacy in LEGACY_KEYS:
            tensors = {n.replace(new, legacy): t for n, t in tensors.items()}
        return tensors | {
            "bert.pooler.dense.weight": torch.zeros(2),
            "cls.seq_relationship.bias": torch.zeros(2),
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        }

    change_tensors(tmp_path, as_google_wrote_it)
    assert torch.equal(logits_of(read(tmp_path)[0], random_tokens()), logits_of(model, random_tokens()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "h.1.attn.c_attn.bias" not in n}, r"lacks transformer.h.1.attn.c_attn.bias$"),
        (lambda t: t | {"transformer.adapter.x": torch.zeros(1)}, r"holds, besides a gpt2 model, transformer.adapter.x$"),
        (lambda t: t | {"transformer.ln_f.bias": torch.zeros(5)}, r"ln_f.bias has shape \(5,\), this model needs \(32,\)"),
        (lambda t: {n: x for n, x in t.items() if "ln" not in n}, r"lacks .*, .*, .*, .* and 6 more$"),
    ],
)
def test_hf_folder_that_does_not_fit_is_refused(tmp_path, change, message):
    write(tmp_path, "gpt2")
    change_tensors(tmp_path, change)
    with pytest.raises(CollectiveError, match=message):
        read(tmp_path)


def test_hf_folder_of_pickles_is_refused_with_the_way_to_convert(tmp_path):
    write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CollectiveError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        read(tmp_path)


def test_hf_folder_with_more_positions_is_cut(tmp_path):
    model = write(tmp_path, "gpt2", context_length=40)
    short, _ = read(tmp_path, context_length=T)
    assert short.embed.positions.weight.shape == (T, 32)
    assert torch.equal(logits_of(short, random_tokens()), logits_of(model, random_tokens()))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' of this model is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window 4096"),
        ("qwen3-moe", {"norm_topk_prob": None}, "norm_topk_prob None"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen3", {"attention_bias": True}, "attention_bias true"),
    ],
)
def test_hf_config_of_an_unsupported_variant_is_refused(family, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_hf_config(hf_config(settings_of(family), V, 0) | changes, "config.json")


def test_hf_config_read_has_no_dropout():
    settings = settings_of("gpt2", dropout=0.1)
    config = hf_config(settings, V, 0)
    assert config["resid_pdrop"] == 0.1
    assert read_hf_config(config, "x")[0] == replace(settings, dropout=0.0)
