"""Every architecture against transformers' own, with random weights, both ways; and what makes each cuttable."""

from dataclasses import replace

import pytest
import torch
import transformers
from checkpoints import write_published
from runs import whole_model
from safetensors.torch import save_file
from text import tiny

from mpilm.checkpoint.load import load_published
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config import Config, Model, resolve
from mpilm.engine.pipelined import resolve_model_layouts
from mpilm.errors import ConfigError
from mpilm.model.families import build, initial_std
from mpilm.model.huggingface import NAMES, OLD_WORDS, published_name
from mpilm.model.huggingface_config import kind_of, published_config, read_config
from mpilm.model.init import initial_value
from mpilm.model.rows import Rows
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
    "bert": {"arch": "bert", "norm_eps": 1e-12},
}
each_family = pytest.mark.parametrize("family", FAMILIES)
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "mixtral": transformers.MixtralForCausalLM,
    "bert": transformers.BertForMaskedLM,
}


def shape_of(family: str, **changes) -> Model:
    base = Model(n_layers=2, n_heads=4, d_model=32, context_length=T)
    return resolve(Config(model=replace(base, **FAMILIES[family], **changes))).model


def random_model(shape: Model):
    """All parameters drawn, norms and biases too, and large enough for logits of some size."""
    model, flat = whole_model(shape, V, torch.device("cpu"))
    for layout in select_owned(resolve_model_layouts(shape, V, (shape.n_layers,))):
        mean = 1.0 if layout.name.endswith("norm.weight") else 0.0
        flat.parameter(layout.name).copy_(initial_value(1, layout.name, layout.shape, 0.2) + mean)
    return model


def tokens(batch=3, length=T):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, x, **more):
    return model(x, Rows(torch.arange(x.shape[1]), **more))


def read(folder):
    import json

    shape, vocab_size = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    model, flat = whole_model(shape, vocab_size, torch.device("cpu"))
    shapes = {layout.name: layout.shape for layout in select_owned(resolve_model_layouts(shape, vocab_size, (shape.n_layers,)))}
    load_published(folder, flat.owned_slices(flat.values), shapes, shape, SelfComm("world"))
    return model, shape


def close(ours, theirs):
    assert theirs.std() > 0.1
    return bool((ours - theirs).abs().max() < 1e-5 * theirs.abs().max())


@each_family
def test_transformers_reads_what_we_write(family, tmp_path):
    shape = shape_of(family)
    model = random_model(shape)
    write_published(tmp_path, model, shape, V)
    theirs, problems = CLASSES[kind_of(shape)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    with torch.no_grad():
        expected = theirs.eval()(tokens()).logits
    assert close(logits(model, tokens()), expected)


@each_family
def test_we_read_what_transformers_writes(family, tmp_path):
    shape = shape_of(family)
    kind = kind_of(shape)
    config = transformers.AutoConfig.for_model(**published_config(shape, V, 7))
    torch.manual_seed(0)
    theirs = CLASSES[kind](config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + ("norm" in name.lower() and parameter.ndim == 1))
        expected = theirs(tokens()).logits
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # in several files with an index
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, found = read(tmp_path)
    assert found == replace(shape, dropout=0.0)
    assert close(logits(model, tokens()), expected)


@each_family
def test_every_parameter_has_a_name_of_its_own(family):
    shape = shape_of(family, n_layers=12)
    names = [name for name, _ in build(shape, V).named_parameters()]
    assert len({published_name(name, shape.arch) for name in names}) == len(names)


@pytest.mark.parametrize("arch", NAMES)
def test_the_tables_name_nothing_twice(arch):
    assert len(set(NAMES[arch].values())) == len(NAMES[arch])


@each_family
@pytest.mark.parametrize("cut", [(4,), (2, 2), (1, 2, 1)])
def test_stages_give_what_the_whole_gives(family, cut):
    import copy

    model = random_model(shape_of(family, n_layers=4))
    stages = [copy.deepcopy(model) for _ in cut]
    names: list[str] = []
    y = tokens()
    for number, stage in enumerate(stages):
        prune_to_stage(stage, number, cut)
        names += [name for name, _ in stage.named_parameters()]
        y = logits(stage, y)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert torch.equal(y, logits(model, tokens()))


@each_family
def test_only_bert_sees_what_comes_later(family):
    model = random_model(shape_of(family))
    x = tokens()
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % V
    before = torch.allclose(logits(model, changed)[:, :10], logits(model, x)[:, :10], rtol=1e-4, atol=1e-5)
    assert before == (not family.startswith("bert"))


@each_family
def test_documents_in_one_row_do_not_see_each_other(family):
    model = random_model(shape_of(family))
    x = tokens(batch=1)
    lengths = (5, 4, 7)
    parts = [logits(model, part) for part in x.split(lengths, dim=1)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    with torch.no_grad():
        together = model(x, Rows(positions, documents=documents))
    torch.testing.assert_close(together, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-4)


@each_family
def test_dropout_belongs_to_the_sample(family):
    shape = shape_of(family, dropout=0.2)
    model = random_model(shape)
    x = tokens(batch=4)
    whole = logits(model, x, keys=[1, 2, 3, 4])
    torch.testing.assert_close(logits(model, x[1:3], keys=[2, 3]), whole[1:3], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(model, x, keys=[1, 2, 3, 5])[3], whole[3], atol=1e-3)


def test_where_parameters_start():
    shape = shape_of("gpt2")
    assert initial_std("blocks.0.attn.o.weight", shape) == pytest.approx(0.01)  # 0.02 / sqrt(2 x 2 blocks)
    assert initial_std("blocks.0.attn.qkv.weight", shape) == 0.02
    assert initial_std("blocks.0.attn.qkv.bias", shape) == 0.0
    assert initial_std("blocks.0.attn_norm.weight", shape) is None
    assert initial_std("blocks.0.attn_norm.bias", shape) == 0.0
    assert initial_std("blocks.0.mlp.experts.3.down.weight", shape_of("mixtral")) == pytest.approx(0.01)
    assert initial_std("blocks.0.attn.o.weight", shape_of("bert")) == 0.02
    assert initial_std("norm.project.weight", shape_of("bert")) == 0.02
    assert initial_std("norm.norm.weight", shape_of("bert")) is None
    assert torch.equal(initial_value(0, "x.bias", (3,), 0.0), torch.zeros(3))


# Experts.


def test_the_load_balancing_loss_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from mpilm.model.experts import imbalance

    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    likely = scores.softmax(-1)
    chosen = likely.topk(2).indices
    assert float(imbalance(likely, chosen)) == pytest.approx(float(load_balancing_loss_func((scores,), 4, 2)), rel=1e-6)
    assert float(imbalance(torch.full((8, 4), 0.25), torch.arange(16).view(8, 2) % 4)) == pytest.approx(2.0)


def test_the_router_gets_the_gradient_of_its_own_loss():
    """Against the loss added to the sum in the plain way."""
    from mpilm.model.experts import imbalance

    shape = shape_of("mixtral", n_layers=1)
    model = random_model(shape)
    x, rows = tokens(), Rows(torch.arange(T), share=0.25)
    router = model.blocks["0"].mlp.router
    inputs = []
    hook = router.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(x, rows).logsumexp(-1).sum().backward()
    hook.remove()
    with_own = router.weight.grad.clone()
    router.weight.grad = None
    model(x, replace(rows, share=0.0)).logsumexp(-1).sum().backward()
    likely = (inputs[0].detach() @ router.weight.t()).softmax(-1)
    (shape.router_loss * 0.25 * imbalance(likely, likely.topk(2).indices)).backward()
    torch.testing.assert_close(router.weight.grad, with_own, rtol=1e-5, atol=1e-8)
    assert router.weight.grad.abs().max() > 0


def test_where_no_token_is_the_router_is_not_asked_for_balance():
    """The gradient of its own loss is that of the row without what is empty."""
    model = random_model(shape_of("mixtral", n_layers=1))
    router, x, gradients = model.blocks["0"].mlp.router, tokens(), []
    for row, documents in ((x, (torch.arange(T) >= 10).long().neg().expand_as(x)), (x[:, :10], torch.zeros_like(x[:, :10]))):
        of_share = []
        for share in (0.25, 0.0):
            router.weight.grad = None
            logits = model(row, Rows(torch.arange(row.shape[1]), documents=documents, share=share))
            logits[:, :10].logsumexp(-1).sum().backward()
            of_share.append(router.weight.grad)
        gradients.append(of_share[0] - of_share[1])
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero():
    model = random_model(shape_of("mixtral", n_layers=1))
    router = model.blocks["0"].mlp.router
    with torch.no_grad():
        router.weight.zero_()
    model(tokens(), Rows(torch.arange(T))).sum().backward()
    used = [[bool(p.grad.any()) for p in expert.parameters()] for expert in model.blocks["0"].mlp.experts]
    assert sorted(used) == [[False] * 3] * 2 + [[True] * 3] * 2  # all alike: every token goes to the same two


# Files of other makes.


def resave(folder, change):
    from safetensors.torch import load_file

    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def test_a_model_saved_without_its_head_or_prefix(tmp_path):
    for family, prefix in (("gpt2", "transformer."), ("llama scaled", "model."), ("bert", "bert.")):
        folder = tmp_path / family
        folder.mkdir()
        model, shape = random_model(shape_of(family)), shape_of(family)
        write_published(folder, model, shape, V)
        resave(folder, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})  # noqa: B023
        assert torch.equal(logits(read(folder)[0], tokens()), logits(model, tokens()))


def test_old_words_and_buffers_and_copies_are_known(tmp_path):
    model, shape = random_model(shape_of("bert")), shape_of("bert")
    write_published(tmp_path, model, shape, V)

    def as_google_had_it(tensors):
        old = dict(tensors)
        for new, word in OLD_WORDS:
            old = {n.replace(new, word): t for n, t in old.items()}
        return old | {
            "bert.pooler.dense.weight": torch.zeros(2),
            "cls.seq_relationship.bias": torch.zeros(2),
            "cls.predictions.decoder.weight": old["bert.embeddings.word_embeddings.weight"].clone(),
        }

    resave(tmp_path, as_google_had_it)
    assert torch.equal(logits(read(tmp_path)[0], tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "h.1.attn.c_attn.bias" not in n}, r"lacks transformer.h.1.attn.c_attn.bias$"),
        (lambda t: t | {"transformer.adapter.x": torch.zeros(1)}, r"holds, besides a gpt2 model, transformer.adapter.x$"),
        (lambda t: t | {"transformer.ln_f.bias": torch.zeros(5)}, r"ln_f.bias has shape \(5,\), this model needs \(32,\)"),
        (lambda t: {n: x for n, x in t.items() if "ln" not in n}, r"lacks .*, .*, .*, .* and 6 more$"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    write_published(tmp_path, random_model(shape_of("gpt2")), shape_of("gpt2"), V)
    resave(tmp_path, change)
    with pytest.raises(CollectiveError, match=message):
        read(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    write_published(tmp_path, random_model(shape_of("gpt2")), shape_of("gpt2"), V)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CollectiveError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        read(tmp_path)


def test_a_longer_table_of_positions_is_cut(tmp_path):
    model, shape = random_model(shape_of("gpt2", context_length=40)), shape_of("gpt2", context_length=40)
    write_published(tmp_path, model, shape, V)
    short = replace(shape, context_length=T)
    cut, flat = whole_model(short, V, torch.device("cpu"))
    shapes = {layout.name: layout.shape for layout in select_owned(resolve_model_layouts(short, V, (2,)))}
    load_published(tmp_path, flat.owned_slices(flat.values), shapes, short, SelfComm("world"))
    assert torch.equal(logits(cut, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' of this model is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window 4096"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
    ],
)
def test_what_is_not_built_here_is_refused(family, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_config(published_config(shape_of(family), V, 0) | changes, "config.json")


def test_dropout_is_the_users_to_set():
    shape = shape_of("gpt2", dropout=0.1)
    published = published_config(shape, V, 0)
    assert published["resid_pdrop"] == 0.1
    assert read_config(published, "x")[0] == replace(shape, dropout=0.0)
    assert tiny("", "").model.dropout == 0.1
