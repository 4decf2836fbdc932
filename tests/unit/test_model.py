"""The model against transformers' Llama with the same weights, and what makes it cuttable."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers.models.llama.modeling_llama as theirs
from runs import whole_model
from text import tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mpilm.comm.threads import run_ranks
from mpilm.engine.pipelined import draw_values, resolve_model_layouts
from mpilm.model.attention import Core
from mpilm.model.families import build, initial_std
from mpilm.model.huggingface import published_name
from mpilm.model.huggingface_config import published_config
from mpilm.model.init import initial_value, key_of
from mpilm.model.layers import Dropout, Rotary
from mpilm.model.loss import IGNORED, loss_sum
from mpilm.model.rows import Rows
from mpilm.parallel.apply import prune_to_stage
from mpilm.parallel.layout import select_owned

V = 53
SHAPES = [{"n_kv_heads": 4, "tie_embeddings": False}, {"n_kv_heads": 2, "tie_embeddings": True}, {"n_kv_heads": 1}]


def model_of(dtype=torch.float32, **shape):
    config = tiny("", "", **{f"model__{key}": value for key, value in shape.items()})
    model, flat = whole_model(config.model, V, torch.device("cpu"))
    draw_values(flat, config.model, config.train.seed)
    for layout in select_owned(resolve_model_layouts(config.model, V, (config.model.n_layers,))):
        noise = initial_value(1, layout.name, layout.shape, 0.05)  # norms other than one, logits of some size
        flat.parameter(layout.name).add_(noise)
    return (model if dtype == torch.float32 else model.to(dtype)), config.model


def published(model, shape):
    reference = LlamaForCausalLM(LlamaConfig(**published_config(shape, V, 0))).to(next(model.parameters()).dtype)
    weights = {published_name(name, shape.arch): parameter.detach() for name, parameter in model.named_parameters()}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing
    return reference.eval()


def tokens(batch=2, length=16):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, x, keys=None):
    return model(x, Rows(torch.arange(x.shape[1]), keys))


@pytest.mark.parametrize("shape", SHAPES)
def test_is_llama(shape):
    model, config = model_of(**shape)
    x = tokens()
    with torch.no_grad():
        expected = published(model, config)(x).logits
    assert expected.std() > 0.1
    assert (logits(model, x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_is_llama_in_float64(shape, monkeypatch):
    """transformers computes norms and positions in float32 whatever the model is in; here they are put right."""
    model, config = model_of(torch.float64, **shape)
    reference = published(model, config)
    monkeypatch.setattr(
        theirs.LlamaRMSNorm, "forward",
        lambda self, x: self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon),
    )  # fmt: skip
    monkeypatch.setattr(
        theirs.LlamaRotaryEmbedding, "forward",
        lambda self, x, position_ids: tuple(t[None].to(x.dtype) for t in Rotary(8, config.rope_theta)(position_ids[0])),
    )  # fmt: skip
    x = tokens()
    with torch.no_grad():
        expected = reference(x).logits
    assert expected.dtype == torch.float64
    assert (logits(model, x) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_rotation_is_the_closed_form():
    cos, sin = Rotary(8, 10000.0)(torch.tensor([0, 1, 7, 500]))
    for row, position in enumerate([0, 1, 7, 500]):
        angles = torch.tensor([position / 10000.0 ** (2 * (i % 4) / 8) for i in range(8)], dtype=torch.float64)
        torch.testing.assert_close(cos[row].double(), angles.cos(), rtol=0, atol=5e-5)
        torch.testing.assert_close(sin[row].double(), angles.sin(), rtol=0, atol=5e-5)


def test_positions_are_taken_from_the_batch_and_the_future_is_not_seen():
    model, _ = model_of(n_kv_heads=2)
    x = tokens()
    whole = logits(model, x)
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % V
    torch.testing.assert_close(logits(model, changed)[:, :10], whole[:, :10], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model, changed)[:, 10:], whole[:, 10:])
    with torch.no_grad():  # only distances between positions matter
        torch.testing.assert_close(model(x, Rows(torch.arange(100, 116))), whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(x, Rows(2 * torch.arange(16))), whole, atol=1e-4)


# Dropout.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_written_out_is_the_fused_one(kv_heads, causal):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 16, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, 16, 8, generator=generator) for _ in range(2))
    core, rows = Core(causal, 0.5, "a"), Rows(torch.arange(16), keys=[1, 2])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.equal(core(q, k, v, replace(rows, keys=None)), expected)
    assert not torch.allclose(core(q, k, v, rows), expected, atol=1e-2)
    core.dropout.forward = lambda weights, keys: weights
    torch.testing.assert_close(core(q, k, v, rows), expected, rtol=1e-5, atol=1e-6)


def test_a_dropout_mask_belongs_to_the_sample_and_the_place():
    x = torch.ones(4, 50, 20)
    dropout = Dropout(0.3, "here")
    whole = dropout(x, [11, 12, 13, 14])
    assert torch.equal(dropout(x[2:3], [13]), whole[2:3])
    assert torch.equal(dropout(x, [14, 13, 12, 11]), whole.flip(0))
    assert not any(torch.equal(whole[i], whole[j]) for i in range(4) for j in range(i))
    assert not torch.equal(Dropout(0.3, "there")(x, [11, 12, 13, 14]), whole)
    assert set(whole.unique().tolist()) == {0.0, float(torch.tensor(1.0) / torch.tensor(0.7))}
    assert (whole == 0).float().mean() == pytest.approx(0.3, abs=0.03)  # 4000 draws: 4 sigma
    assert dropout(x, None) is x
    assert Dropout(0.0, "here")(x, [1, 2, 3, 4]) is x


def test_dropout_in_the_model_does_not_depend_on_the_batch():
    model, _ = model_of(dropout=0.2, n_kv_heads=2)
    x = tokens(batch=4)
    whole = logits(model, x, [1, 2, 3, 4])
    torch.testing.assert_close(logits(model, x[1:3], [2, 3]), whole[1:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model, x, [1, 2, 3, 5])[3], whole[3], atol=1e-3)
    assert not torch.allclose(logits(model, x), whole, atol=1e-3)


def test_dropout_is_drawn_for_every_place_of_the_model(monkeypatch):
    model, _ = model_of(dropout=0.2)
    places = Counter()
    monkeypatch.setattr(Dropout, "_mask", lambda self, key, x: places.update([self.place]) or torch.ones_like(x[0]))
    logits(model, tokens(batch=1), [1])
    assert places == Counter(["embed"] + [f"blocks.{i}.{part}" for i in (0, 1) for part in ("core", "attn", "mlp")])


# Initial values.


def test_initial_values_depend_on_seed_name_and_shape_alone():
    first = initial_value(3, "a.weight", (4, 5), 0.02)
    assert torch.equal(first, initial_value(3, "a.weight", (4, 5), 0.02))
    torch.manual_seed(99)
    assert all(torch.equal(first, there) for there in run_ranks(3, lambda comm: initial_value(3, "a.weight", (4, 5), 0.02)))
    assert not torch.equal(first, initial_value(4, "a.weight", (4, 5), 0.02))
    assert not torch.equal(first, initial_value(3, "b.weight", (4, 5), 0.02))
    assert torch.equal(initial_value(3, "norm.weight", (7,), None), torch.ones(7))


def test_initial_values_are_the_published_ones():
    """Numbers that every machine must draw; a change here makes all runs start elsewhere."""
    drawn = initial_value(0, "embed.weight", (2, 2), 1.0).flatten().tolist()
    assert drawn == pytest.approx([-0.20812039, 0.23993936, -1.04677808, 0.51093161], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embed.weight", 0.02),
        ("blocks.0.attn.q.weight", 0.02),
        ("blocks.1.mlp.down.weight", 0.01),
        ("blocks.0.attn.o.weight", 0.01),
    ],
)
def test_deviations(name, std):
    shape = tiny("", "").model  # 2 blocks: the residual branches start at 0.02 / sqrt(4)
    assert initial_std(name, shape) == pytest.approx(std)
    values = initial_value(0, name, (200, 200), initial_std(name, shape))
    assert float(values.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(values.mean())) < std / 40


def test_norms_start_as_ones():
    assert all(initial_std(name, tiny("", "").model) is None for name in ("norm.weight", "blocks.1.mlp_norm.weight"))


def test_keys_do_not_run_together():
    keys = {key_of(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", ""), (1, 2), (12,), ("1", "2", 3)]}
    assert len(keys) == 6
    assert all(0 <= key < 2**64 for key in keys)


# Parts of a model.


@pytest.mark.parametrize("cut", [(4,), (2, 2), (3, 1), (1, 2, 1), (1, 1, 1, 1)])
def test_a_stage_keeps_the_names_and_the_numbers(cut):
    model, _ = model_of(n_layers=4, n_kv_heads=2)
    names = dict(model.named_parameters())
    stages = [copy.deepcopy(model) for _ in cut]
    for number, stage in enumerate(stages):
        prune_to_stage(stage, number, cut)
        assert all(torch.equal(parameter, names[name]) for name, parameter in stage.named_parameters())
    assert sorted(name for stage in stages for name, _ in stage.named_parameters()) == sorted(names)
    assert [len(stage.blocks) for stage in stages] == list(cut)
    x = tokens()
    y = x
    for stage in stages:
        y = logits(stage, y)
    assert torch.equal(y, logits(model, x))


def test_the_head_count_comes_from_the_width_of_the_matrices():
    model, _ = model_of(n_kv_heads=4)
    attention = model.blocks["0"].attn
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    rows = Rows(torch.arange(16), rotation=Rotary(8, 10000.0)(torch.arange(16)))
    with torch.no_grad():
        whole = attention(x, rows)
        parts = []
        for half in (slice(0, 16), slice(16, 32)):  # two heads each
            part = copy.deepcopy(attention)
            for linear in (part.q, part.k, part.v):
                linear.weight = nn.Parameter(linear.weight[half])
            part.o.weight = nn.Parameter(part.o.weight[:, half])
            parts.append(part(x, rows))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-6)


def test_the_model_is_made_on_the_meta_device_without_memory():
    with torch.device("meta"):
        model = build(tiny("", "").model, V)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_loss_is_the_sum_of_the_cross_entropies():
    scores = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = torch.tensor([[1, 2, IGNORED], [0, V - 1, 7]])
    picked = [scores[b, t].log_softmax(0)[targets[b, t]] for b in range(2) for t in range(3) if targets[b, t] != IGNORED]
    assert float(loss_sum(scores, targets)) == pytest.approx(-float(sum(picked)), rel=1e-6)
    assert loss_sum(scores.bfloat16(), targets).dtype == torch.float32
