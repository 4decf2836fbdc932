"""Backward in two halves: the weight gradients of the second have the bits of a full backward."""

import copy
import weakref
from functools import partial

import pytest
import torch
from runs import full_model
from text import tiny_config
from torch import nn

from mpilm.engine.pipelined import draw_values
from mpilm.kernels.base import loss_sum
from mpilm.model.layers import Conv1D
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.activation_checkpoint import checkpoint_activations
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.split_backward import WeightGradQueue, split_backward

V, CPU = 29, torch.device("cpu")
MICROBATCHES = range(4)


class FullModel:
    """A model of the package, and the loss of its microbatches."""

    def __init__(self, part="none", first=True, **shape):
        config = tiny_config("", "", **{f"model__{key}": value for key, value in shape.items()})
        self.model, flat = full_model(config.model, V, CPU)
        draw_values(flat, config.model, seed=0)
        self.part = part
        if not first:
            self.embedding = self.model.embed.weight.detach().clone()
            self.model.embed = None

    def checkpoint(self, model):
        checkpoint_activations(model, self.part)

    def input(self, m):
        tokens = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(m))
        return tokens if self.model.embed is not None else self.embedding[tokens]

    def loss(self, model, x, m):
        return loss_sum(
            model(x, SequenceInfo(torch.arange(8), [2 * m, 2 * m + 1], loss_weight=0.1)), torch.arange(16).view(2, 8)
        )


class FewLayers:
    """A few layers, and a loss whose gradient is an expanded scalar without memory of its own."""

    def __init__(self, *shape):
        self.shape = shape
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(shape[-1], 24, bias=False), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5, bias=False), nn.Tanh(),
            nn.Linear(5, 7, bias=False),
        )  # fmt: skip

    def checkpoint(self, model):
        pass

    def input(self, m):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(m))

    def loss(self, model, x, m):
        return model(x).float().sum()


CASES = {
    "model": FullModel(),
    "without dropout": FullModel(dropout=0.0),
    "one key and value head": FullModel(n_kv_heads=1),
    "last stage": FullModel(first=False),
    "attention recomputed": FullModel("attention"),
    "blocks recomputed": FullModel("block"),
    "gpt2": FullModel(arch="gpt2", n_kv_heads=4),
    "gpt2 of width 8": FullModel(arch="gpt2", n_kv_heads=4, d_model=8),
    "bert": FullModel(arch="bert", n_kv_heads=4),
    "qwen2": FullModel(arch="qwen"),
    "qwen3": FullModel(arch="qwen", qk_norm=True, head_width=6),
    "mixtral": FullModel(arch="mixtral", n_experts=4),
    "mixtral, blocks recomputed": FullModel("block", arch="mixtral", n_experts=4),
    "plain": FewLayers(3, 4, 6),
    "one row": FewLayers(1, 1, 6),
    "rows in one dim": FewLayers(5, 6),
    "rows in three dims": FewLayers(2, 3, 4, 6),
}


def forward(case, model, m, dtype):
    x = case.input(m)
    x.requires_grad_(x.is_floating_point())
    with make_autocast(dtype, CPU)():
        return x, case.loss(model, x, m)


def full_backward(case, m, dtype):
    """Return the gradients of the parameters, and that of the input, by autograd alone."""
    model = copy.deepcopy(case.model)
    x, y = forward(case, model, m, dtype)
    y.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, x.grad


def backward_input(case, model, queue, m, y):
    """Run the first half as a stage does: small gradients are completed, those of matrices pending."""
    queue.microbatch = m
    model.zero_grad(set_to_none=True)
    y.backward()
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in matrices)
        if parameter.grad is not None:
            queue.push_completed(name, parameter.grad)


def split_copy(case):
    model, queue = copy.deepcopy(case.model), WeightGradQueue()
    case.checkpoint(model)
    split_backward(model, queue)
    return model, queue


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_split_backward_has_the_bits_of_a_full_backward(case, dtype):
    """Forward, backward and popping see the microbatches in different orders."""
    model, queue = split_copy(case)
    expected = {m: full_backward(case, m, dtype) for m in MICROBATCHES}
    graphs = {m: forward(case, model, m, dtype) for m in MICROBATCHES}
    for m in (2, 0, 3, 1):
        x, y = graphs.pop(m)
        backward_input(case, model, queue, m, y)
        assert torch.equal(x.grad, expected[m][1]) if x.requires_grad else x.grad is None
    for m in (1, 2, 0, 3):
        found = list(queue.pop_gradients(m))
        assert len(found) == len(expected[m][0])
        for name, gradient in found:
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, expected[m][0][name]), name
        assert list(queue.pop_gradients(m)) == []


def test_gradients_differ_between_microbatches():
    """A mix-up above would therefore be noticed."""
    for case in CASES.values():
        first, second = (full_backward(case, m, "float32")[0] for m in (0, 1))
        assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_without_gradients_queues_nothing_and_is_equal(case, dtype):
    model, queue = split_copy(case)
    with torch.no_grad():
        _, y = forward(case, model, 0, dtype)
    assert torch.equal(y, forward(case, case.model, 0, dtype)[1])
    assert list(queue.pop_gradients(queue.microbatch)) == []


def test_forward_without_backward_queues_nothing():
    model, queue = split_copy(CASES["plain"])
    queue.microbatch = 0
    forward(CASES["plain"], model, 0, "float32")
    assert list(queue.pop_gradients(0)) == []


def test_popped_gradients_free_their_tensors_one_by_one():
    queue, alive = WeightGradQueue(), []
    queue.microbatch = 7
    for i in range(4):
        x, gradient = torch.full((3, 2), float(i)), torch.ones(3, 5)
        queue.push_pending(f"{i}.weight", partial(lambda x, gradient: gradient.t() @ x, x, gradient))
        alive.append((weakref.ref(x), weakref.ref(gradient)))
    queue.push_completed("norm.weight", torch.ones(2))
    del x, gradient

    def freed():
        return [all(ref() is None for ref in refs) for refs in alive]

    found = queue.pop_gradients(7)
    assert next(found)[0] == "norm.weight"
    for i in range(4):
        name, product = next(found)
        assert name == f"{i}.weight"
        assert torch.equal(product, torch.full((5, 2), 3.0 * i))
        assert freed() == [earlier < i for earlier in range(4)]
    assert next(found, None) is None
    assert all(freed())


def test_queue_alone_holds_inputs_after_backward():
    """The input of a matrix is freed with its gradient."""
    model, queue = split_copy(CASES["plain"])
    inputs = []
    model[3].register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0].untyped_storage())))
    x, y = forward(CASES["plain"], model, 0, "float32")
    backward_input(CASES["plain"], model, queue, 0, y)
    del x, y
    assert inputs[0]() is not None
    list(queue.pop_gradients(0))
    assert inputs[0]() is None


@pytest.mark.parametrize(
    ("model", "needs_gradient"),
    [
        (nn.Sequential(nn.Linear(6, 4)), True),
        (nn.Linear(6, 4, bias=False), True),
        (nn.Sequential(nn.Linear(6, 4, bias=False), nn.LayerNorm(4)), False),
    ],
    ids=["with a bias", "a model of its own", "input without gradient"],
)
def test_split_backward_of_any_linear_layer_has_the_same_bits(model, needs_gradient):
    queue, x = WeightGradQueue(), torch.randn(3, 4, 6, requires_grad=needs_gradient)
    expected = model(x)
    expected.square().sum().backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    split_backward(model, queue)
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    halves = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    halves.update(queue.pop_gradients(queue.microbatch))
    assert torch.equal(y, expected)
    assert halves.keys() == plain.keys()
    assert all(torch.equal(halves[name], plain[name]) for name in plain)
