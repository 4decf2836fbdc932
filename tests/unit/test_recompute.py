"""What is computed once more in backward: the same bits, with less kept meanwhile."""

from collections import Counter

import pytest
import torch
from runs import whole_model
from text import tiny
from torch import nn

from mpilm.engine.pipelined import draw_values
from mpilm.model.loss import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.activation_checkpoint import checkpoint_activations
from mpilm.parallel.apply import make_autocast

V, CPU, LAYERS = 29, torch.device("cpu"), 3
HOW = ["none", "attention", "block"]
SHAPES = [
    {"dropout": 0.1}, {"dropout": 0.0}, {"dropout": 0.1, "n_kv_heads": 1}, {"arch": "gpt2", "n_kv_heads": 4},
    {"arch": "bert", "n_kv_heads": 4}, {"arch": "qwen", "qk_norm": True}, {"arch": "mixtral", "n_experts": 4},
]  # fmt: skip


def model_of(how, **shape):
    config = tiny("", "", model__n_layers=LAYERS, **{f"model__{key}": value for key, value in shape.items()})
    model, flat = whole_model(config.model, V, CPU)
    draw_values(flat, config.model, seed=0)
    checkpoint_activations(model, how)
    return model


def loss_of(model, dtype="float32", keys=(3, 4)):
    x = torch.randint(0, V, (2, 16), generator=torch.Generator().manual_seed(0))
    with make_autocast(dtype, CPU)():
        return loss_sum(model(x, SequenceInfo(torch.arange(16), list(keys), loss_weight=0.1)), x.roll(-1, 1))


def loss_and_gradients(how, dtype, shape):
    model = model_of(how, **shape)
    loss = loss_of(model, dtype)
    torch.manual_seed(5)  # torch's own generator decides nothing
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", HOW[1:])
def test_loss_and_gradients_have_the_same_bits(how, dtype, shape):
    expected = loss_and_gradients("none", dtype, shape)
    found = loss_and_gradients(how, dtype, shape)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("how", HOW[1:])
def test_parameters_have_their_gradients_also_when_the_input_needs_none(how):
    expected, found = model_of("none", dropout=0.0), model_of(how, dropout=0.0)
    for model in (expected, found):
        model.embed.requires_grad_(False)
        loss_of(model).backward()
    names = [name for name, parameter in expected.named_parameters() if parameter.grad is not None]
    assert [name for name, parameter in found.named_parameters() if parameter.grad is not None] == names


def test_the_masks_of_dropout_matter_for_these_gradients():
    """So that equal bits above mean that the masks were the same ones."""
    one, other = model_of("none", dropout=0.1), model_of("none", dropout=0.1)
    loss_of(one).backward()
    loss_of(other, keys=(3, 5)).backward()
    assert not any(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def kept(how, dtype, shape):
    """Tensors that forward keeps for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss_of(model_of(how, **shape), dtype)
    return len(saved)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_more_is_computed_again_the_less_is_kept(dtype, shape):
    none, attention, block = (kept(how, dtype, shape) for how in HOW)
    assert none > attention > block


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("how", HOW)
def test_only_what_is_named_is_computed_again_and_only_in_backward(how, dropout):
    model, calls = model_of("none", dropout=dropout), Counter()

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
    checkpoint_activations(model, how)
    with torch.no_grad():
        loss_of(model)
    assert calls == {"core": LAYERS, "mlp": LAYERS, "hook of a block": LAYERS}
    calls.clear()
    loss = loss_of(model)
    assert calls == {"core": LAYERS, "mlp": LAYERS, "hook of a block": LAYERS}
    loss.backward()
    assert calls == {
        "core": LAYERS * (1 if how == "none" else 2),
        "mlp": LAYERS * (2 if how == "block" else 1),
        "hook of a block": LAYERS,  # what gathers its parameters is not called again
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("how", HOW)
def test_parameters_keep_their_names(how, dropout):
    names = list(model_of("none", dropout=dropout).state_dict())
    assert "blocks.2.attn.q.weight" in names
    assert list(model_of(how, dropout=dropout).state_dict()) == names
