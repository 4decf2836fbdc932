"""Activation checkpointing: the same bits, with fewer saved tensors."""

import shutil
from collections import Counter

import pytest
import torch
from runs import full_model
from text import tiny_config
from torch import nn

from mpilm.engine.pipelined import draw_values
from mpilm.kernels.base import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.activation_checkpoint import checkpoint_activations
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.compile import compile_blocks

V, CPU, LAYERS = 29, torch.device("cpu"), 3
PARTS = ["none", "attention", "block"]
SHAPES = [
    {"dropout": 0.1}, {"dropout": 0.0}, {"dropout": 0.1, "n_kv_heads": 1}, {"arch": "gpt2", "n_kv_heads": 4},
    {"arch": "bert", "n_kv_heads": 4}, {"arch": "qwen", "qk_norm": True}, {"arch": "mixtral", "n_experts": 4},
]  # fmt: skip


def build(part, is_compiled=False, **shape):
    config = tiny_config("", "", model__n_layers=LAYERS, **{f"model__{key}": value for key, value in shape.items()})
    model, flat = full_model(config.model, V, CPU)
    draw_values(flat, config.model, seed=0)
    if is_compiled:
        compile_blocks(model)
    checkpoint_activations(model, part, is_compiled)
    return model


def loss_of(model, dtype="float32", keys=(3, 4)):
    x = torch.randint(0, V, (2, 16), generator=torch.Generator().manual_seed(0))
    with make_autocast(dtype, CPU)():
        return loss_sum(model(x, SequenceInfo(torch.arange(16), list(keys), loss_weight=0.1)), x.roll(-1, 1))


def loss_and_gradients(part, dtype, shape, is_compiled=False):
    model = build(part, is_compiled, **shape)
    loss = loss_of(model, dtype)
    torch.manual_seed(5)  # torch's own generator must not matter
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS[1:])
def test_checkpointed_loss_and_gradients_have_the_same_bits(part, dtype, shape):
    expected = loss_and_gradients("none", dtype, shape)
    found = loss_and_gradients(part, dtype, shape)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not here")
def test_checkpointed_compiled_blocks_have_the_same_bits():
    expected, found = (loss_and_gradients(part, "bfloat16", {"dropout": 0.0}, True) for part in ("none", "block"))
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("part", PARTS[1:])
def test_checkpointed_input_without_gradient_leaves_parameters_their_gradients(part):
    expected, found = build("none", dropout=0.0), build(part, dropout=0.0)
    for model in (expected, found):
        model.embed.requires_grad_(False)
        loss_of(model).backward()
    names = [name for name, parameter in expected.named_parameters() if parameter.grad is not None]
    assert [name for name, parameter in found.named_parameters() if parameter.grad is not None] == names


def test_other_dropout_keys_change_every_gradient():
    """Equal bits above therefore mean equal masks."""
    one, other = build("none", dropout=0.1), build("none", dropout=0.1)
    loss_of(one).backward()
    loss_of(other, keys=(3, 5)).backward()
    assert not any(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def count_saved_tensors(part, dtype, shape):
    """Return how many tensors forward saves for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss_of(build(part, **shape), dtype)
    return len(saved)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_more_saves_fewer_tensors(dtype, shape):
    none, attention, block = (count_saved_tensors(part, dtype, shape) for part in PARTS)
    assert none >= attention > block
    assert none > attention or (dtype == "bfloat16" and not shape.get("dropout"))  # the core then saves its inputs alone


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("part", PARTS)
def test_checkpointed_part_alone_is_recomputed_and_only_in_backward(part, dropout):
    model, calls = build("none", dropout=dropout), Counter()

    class Core(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *inputs):
            calls["core"] += 1
            return self.inner(*inputs)

    for block in model.blocks.children():
        block.attn.core = Core(block.attn.core)
        block.mlp.register_forward_pre_hook(lambda *_: calls.update(["mlp"]))
        block.register_forward_pre_hook(lambda *_: calls.update(["hook of a block"]))
    checkpoint_activations(model, part)
    with torch.no_grad():
        loss_of(model)
    assert calls == {"core": LAYERS, "mlp": LAYERS, "hook of a block": LAYERS}
    calls.clear()
    loss = loss_of(model)
    assert calls == {"core": LAYERS, "mlp": LAYERS, "hook of a block": LAYERS}
    loss.backward()
    assert calls == {
        "core": LAYERS * (1 if part == "none" else 2),
        "mlp": LAYERS * (2 if part == "block" else 1),
        "hook of a block": LAYERS,  # the hook that gathers its parameters is not called again
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("part", PARTS)
def test_checkpointing_keeps_parameter_names(part, dropout):
    names = list(build("none", dropout=dropout).state_dict())
    assert "blocks.2.attn.q.weight" in names
    assert list(build(part, dropout=dropout).state_dict()) == names
