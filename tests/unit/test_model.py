"""The parts of a model: against transformers' Llama in float64, closed forms, and the seams by which it can be cut."""

import copy
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers.models.llama.modeling_llama as hf_llama
from runs import full_model
from text import tiny_config
from thread_ranks import run_ranks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mpilm.engine.pipelined import draw_values, resolve_model_layouts
from mpilm.kernels import base as kernels
from mpilm.kernels.base import IGNORE_INDEX, attention_mask, cross_entropy_sum, loss_sum
from mpilm.model.attention import AttentionCore
from mpilm.model.families import build_model, initial_std, initial_value
from mpilm.model.hf.config import hf_config
from mpilm.model.hf.names import hf_name
from mpilm.model.layers import Dropout, RotaryEmbedding, hash_key
from mpilm.model.sequence_info import KVCache, SequenceInfo
from mpilm.parallel.layout import select_owned

V = 53


def make_model(dtype=torch.float32, **changes):
    """A model with norms other than one and logits of some size; and its settings."""
    config = tiny_config("", "", **{f"model__{key}": value for key, value in changes.items()})
    model, flat = full_model(config.model, V, torch.device("cpu"))
    draw_values(flat, config.model, config.train.seed)
    for layout in select_owned(resolve_model_layouts(config.model, V, (config.model.n_layers,))):
        flat.parameter(layout.name).add_(initial_value(1, layout.name, layout.shape, 0.05))
    return (model if dtype == torch.float32 else model.to(dtype)), config.model


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(batch=2, length=16):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model, tokens, positions=None, **info):
    return model(tokens, SequenceInfo(torch.arange(tokens.shape[1]) if positions is None else positions, **info))


@pytest.mark.parametrize(
    "changes", [{"n_kv_heads": 4, "tie_embeddings": False}, {"n_kv_heads": 2, "tie_embeddings": True}, {"n_kv_heads": 1}]
)
def test_llama_in_float64_equals_transformers(changes, monkeypatch):
    """transformers computes norms and positions in float32 whatever the model's type is; here both are replaced."""
    model, settings = make_model(torch.float64, **changes)
    monkeypatch.setattr(
        hf_llama.LlamaRMSNorm, "forward",
        lambda self, x: self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon),
    )  # fmt: skip
    rotary = RotaryEmbedding(8, settings.rope_theta)
    monkeypatch.setattr(
        hf_llama.LlamaRotaryEmbedding, "forward",
        lambda self, x, position_ids: tuple(t[None].to(x.dtype) for t in rotary(position_ids[0])),
    )  # fmt: skip
    reference = LlamaForCausalLM(LlamaConfig(**hf_config(settings, V, 0))).double().eval()
    weights = {hf_name(name, settings.arch): parameter.detach() for name, parameter in model.named_parameters()}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], [])
    with torch.no_grad():
        expected = reference(random_tokens()).logits
    assert expected.dtype == torch.float64
    assert expected.std() > 0.1
    assert (logits_of(model, random_tokens()) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_rotary_embedding_equals_closed_form():
    cos, sin = RotaryEmbedding(8, 10000.0)(torch.tensor([0, 1, 7, 500]))
    for row, position in enumerate([0, 1, 7, 500]):
        angles = torch.tensor([position / 10000.0 ** (2 * (i % 4) / 8) for i in range(8)], dtype=torch.float64)
        torch.testing.assert_close(cos[row].double(), angles.cos(), rtol=0, atol=5e-5)
        torch.testing.assert_close(sin[row].double(), angles.sin(), rtol=0, atol=5e-5)


def test_positions_of_the_batch_count_by_their_distances():
    model, _ = make_model(n_kv_heads=2)
    tokens = random_tokens()
    expected = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(model, tokens, torch.arange(100, 116)), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(model, tokens, 2 * torch.arange(16)), expected, atol=1e-4)


def test_loss_sum_is_the_sum_of_cross_entropies():
    scores = random(2, 3, V, seed=2).double()
    targets = torch.tensor([[1, 2, IGNORE_INDEX], [0, V - 1, 7]])
    counted = [(b, t) for b in range(2) for t in range(3) if targets[b, t] != IGNORE_INDEX]
    expected = -sum(float(scores[b, t].log_softmax(0)[targets[b, t]]) for b, t in counted)
    assert float(loss_sum(scores, targets)) == pytest.approx(expected, rel=1e-6)
    assert loss_sum(scores.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 1000, 100_000])  # many rows in a block, several blocks, and rows of almost a block
def test_blockwise_loss_has_the_bits_of_the_whole(dtype, vocab, monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_BLOCK", 120_000)
    rows = max(3, 300_000 // vocab)
    targets = torch.randint(0, vocab, (1, rows), generator=torch.Generator().manual_seed(1))
    targets[:, ::3] = IGNORE_INDEX
    found = []
    for function in (loss_sum, lambda logits, targets: cross_entropy_sum(logits.flatten(0, 1), targets.flatten())):
        leaf = random(1, rows, vocab, seed=2).mul(5.0).to(dtype).requires_grad_()
        loss = function(leaf * 2.0, targets)  # not a leaf: its memory receives the gradient
        (loss / 7.0).backward()
        found.append((loss, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert float(found[0][1].abs().sum()) > 0


# Attention.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_core_with_dropout_uses_the_same_formula(kv_heads, causal):
    q, k, v = random(2, 4, 16, 8), random(2, kv_heads, 16, 8, seed=1), random(2, kv_heads, 16, 8, seed=2)
    core, info = AttentionCore(causal, 0.5, "a"), SequenceInfo(torch.arange(16), dropout_keys=[1, 2])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.equal(core(q, k, v, replace(info, dropout_keys=None)), expected)
    assert not torch.allclose(core(q, k, v, info), expected, atol=1e-2)
    core.dropout.forward = lambda weights, keys: weights
    torch.testing.assert_close(core(q, k, v, info), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1, -1]])])
def test_attention_mask_of_some_queries_and_keys_is_that_part_of_the_square(causal, documents):
    everything, queries, keys = torch.arange(6), torch.tensor([1, 4]), torch.tensor([0, 3, 4])
    square = attention_mask(everything, everything, causal, documents)
    assert square.shape[-2:] == (6, 6)
    assert torch.equal(attention_mask(queries, keys, causal, documents), square[..., queries, :][..., keys])
    if documents is None:
        assert torch.equal(square, torch.ones(6, 6).tril().bool() | (not causal))


@pytest.mark.parametrize("chunks", [(5, 1, 1, 9), (1, 15), (3, 6, 7)])
def test_kv_cache_filled_in_chunks_gives_the_logits_of_one_pass(chunks):
    model, _ = make_model(n_kv_heads=2)
    tokens, cache = random_tokens(batch=1), KVCache(20)
    parts = zip(tokens.split(chunks, dim=1), torch.arange(16).split(chunks))
    found = torch.cat([logits_of(model, part, positions, cache=cache) for part, positions in parts], dim=1)
    torch.testing.assert_close(found, logits_of(model, tokens), rtol=1e-4, atol=1e-5)


# Dropout.


def test_dropout_mask_depends_on_sample_and_path_alone():
    x = torch.ones(4, 50, 20)
    dropout = Dropout(0.3, "here")
    all_samples = dropout(x, [11, 12, 13, 14])
    assert torch.equal(dropout(x[2:3], [13]), all_samples[2:3])
    assert torch.equal(dropout(x, [14, 13, 12, 11]), all_samples.flip(0))
    assert not any(torch.equal(all_samples[i], all_samples[j]) for i in range(4) for j in range(i))
    assert not torch.equal(Dropout(0.3, "there")(x, [11, 12, 13, 14]), all_samples)
    assert set(all_samples.unique().tolist()) == {0.0, float(torch.tensor(1.0) / torch.tensor(0.7))}
    assert (all_samples == 0).float().mean() == pytest.approx(0.3, abs=0.03)  # 4000 draws: 4 sigma
    assert dropout(x, None) is x
    assert Dropout(0.0, "here")(x, [1, 2, 3, 4]) is x


def test_dropout_of_slices_has_a_mask_for_each_whatever_lies_beside_it():
    x, dropout = random(2, 6, 10), Dropout(0.5, "here")
    dropout.slices = SimpleNamespace(slice_numbers=[0, 1, 2])
    expected = dropout(x, [1, 2])
    assert len({tuple((mask == 0).flatten().tolist()) for mask in expected[0].split(2)}) == 3
    dropout.slices = SimpleNamespace(slice_numbers=[2, 0])
    assert torch.equal(
        dropout(torch.cat([x[:, 4:], x[:, :2]], dim=1), [1, 2]), torch.cat([expected[:, 4:], expected[:, :2]], dim=1)
    )


def test_dropout_modules_have_paths_of_their_own(monkeypatch):
    model, _ = make_model(dropout=0.2)
    paths = Counter()
    monkeypatch.setattr(Dropout, "_draw_mask", lambda self, key, x: paths.update([self.path]) or torch.ones_like(x[0]))
    logits_of(model, random_tokens(batch=1), dropout_keys=[1])
    assert paths == Counter(["embed"] + [f"blocks.{i}.{part}" for i in (0, 1) for part in ("core", "attn", "mlp")])


# Initial values.


def test_initial_value_depends_on_seed_name_and_shape_alone():
    first = initial_value(3, "a.weight", (4, 5), 0.02)
    torch.manual_seed(99)
    assert all(torch.equal(first, other) for other in run_ranks(3, lambda comm: initial_value(3, "a.weight", (4, 5), 0.02)))
    assert not torch.equal(first, initial_value(4, "a.weight", (4, 5), 0.02))
    assert not torch.equal(first, initial_value(3, "b.weight", (4, 5), 0.02))
    assert torch.equal(initial_value(3, "norm.weight", (7,), None), torch.ones(7))
    assert torch.equal(initial_value(3, "x.bias", (3,), 0.0), torch.zeros(3))


def test_initial_value_equals_the_stored_one():
    """Every machine must draw these numbers; a change here makes all runs start elsewhere."""
    drawn = initial_value(0, "embed.weight", (2, 2), 1.0).flatten().tolist()
    assert drawn == pytest.approx([-0.20812039, 0.23993936, -1.04677808, 0.51093161], rel=1e-6)


@pytest.mark.parametrize(
    ("arch", "name", "std"),
    [
        ("llama", "embed.weight", 0.02),
        ("llama", "blocks.0.attn.q.weight", 0.02),
        ("llama", "blocks.1.mlp.down.weight", 0.01),  # 0.02 / sqrt(2 x 2 blocks)
        ("llama", "blocks.0.attn.o.weight", 0.01),
        ("llama", "norm.weight", None),
        ("llama", "blocks.1.mlp_norm.weight", None),
        ("gpt2", "blocks.0.attn.o.weight", 0.01),
        ("gpt2", "blocks.0.attn.qkv.weight", 0.02),
        ("gpt2", "blocks.0.attn.qkv.bias", 0.0),
        ("gpt2", "blocks.0.attn_norm.weight", None),
        ("gpt2", "blocks.0.attn_norm.bias", 0.0),
        ("mixtral", "blocks.0.mlp.experts.3.down.weight", 0.01),
        ("bert", "blocks.0.attn.o.weight", 0.02),
        ("bert", "norm.project.weight", 0.02),
        ("bert", "norm.norm.weight", None),
    ],
)
def test_initial_std_follows_the_name(arch, name, std):
    found = initial_std(name, tiny_config("", "", model__arch=arch, model__n_kv_heads=0).model)
    assert found == (pytest.approx(std) if std else std)
    if std:
        values = initial_value(0, name, (200, 200), found)
        assert float(values.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(values.mean())) < std / 40


def test_hash_key_of_different_parts_differs():
    keys = {hash_key(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", ""), (1, 2), (12,), ("1", "2", 3)]}
    assert len(keys) == 6
    assert all(0 <= key < 2**64 for key in keys)


# Parts of a model.


def test_attention_counts_its_heads_by_the_width_of_its_matrices():
    model, _ = make_model(n_kv_heads=4)
    attention, x = model.blocks["0"].attn, random(2, 16, 32, seed=1)
    info = SequenceInfo(torch.arange(16), rotation=RotaryEmbedding(8, 10000.0)(torch.arange(16)))
    parts = []
    with torch.no_grad():
        for half in (slice(0, 16), slice(16, 32)):  # two heads each
            part = copy.deepcopy(attention)
            for linear in (part.q, part.k, part.v):
                linear.weight = nn.Parameter(linear.weight[half])
            part.o.weight = nn.Parameter(part.o.weight[:, half])
            parts.append(part(x, info))
        torch.testing.assert_close(parts[0] + parts[1], attention(x, info), rtol=1e-4, atol=1e-6)


def test_build_model_on_the_meta_device_takes_no_memory():
    with torch.device("meta"):
        model = build_model(tiny_config("", "").model, V)
    assert all(parameter.is_meta for parameter in model.parameters())
