"""Backward in two halves: what the second half gives has the bits of a backward in one piece."""

import copy
import weakref

import pytest
import torch
from runs import whole_model
from text import tiny
from torch import nn

from mpilm.engine.pipelined import draw_values
from mpilm.model.layers import Conv1D
from mpilm.model.loss import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.activation_checkpoint import checkpoint_activations
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.pipeline.split_backward import WeightGradQueue, split_backward

V, CPU = 29, torch.device("cpu")
MICROBATCHES = range(4)


class Whole:
    """The repository's model: of microbatch m, the loss."""

    def __init__(self, again="none", first=True, **shape):
        config = tiny("", "", **{f"model__{key}": value for key, value in shape.items()})
        self.model, flat = whole_model(config.model, V, CPU)
        draw_values(flat, config.model, seed=0)
        self.again = again
        if not first:
            self.embedding = self.model.embed.weight.detach().clone()
            self.model.embed = None

    def apart(self, model):
        checkpoint_activations(model, self.again)

    def input(self, m):
        tokens = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(m))
        return tokens if self.model.embed is not None else self.embedding[tokens]

    def result(self, model, x, m):
        return loss_sum(
            model(x, SequenceInfo(torch.arange(8), [2 * m, 2 * m + 1], loss_weight=0.1)), torch.arange(16).view(2, 8)
        )


class Plain:
    """A few layers, and a loss whose gradient is one number for all elements, without memory of its own."""

    def __init__(self, *shape):
        self.shape = shape
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(shape[-1], 24, bias=False), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5, bias=False), nn.Tanh(),
            nn.Linear(5, 7, bias=False),
        )  # fmt: skip

    def apart(self, model):
        pass

    def input(self, m):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(m))

    def result(self, model, x, m):
        return model(x).float().sum()


CASES = {
    "model": Whole(),
    "without dropout": Whole(dropout=0.0),
    "one key and value head": Whole(n_kv_heads=1),
    "last stage": Whole(first=False),
    "attention recomputed": Whole("attention"),
    "blocks recomputed": Whole("block"),
    "gpt2": Whole(arch="gpt2", n_kv_heads=4),
    "bert": Whole(arch="bert", n_kv_heads=4),
    "qwen2": Whole(arch="qwen"),
    "qwen3": Whole(arch="qwen", qk_norm=True, head_width=6),
    "mixtral": Whole(arch="mixtral", n_experts=4),
    "mixtral, blocks recomputed": Whole("block", arch="mixtral", n_experts=4),
    "plain": Plain(3, 4, 6),
    "one row": Plain(1, 1, 6),
    "rows in one dim": Plain(5, 6),
    "rows in three dims": Plain(2, 3, 4, 6),
}


def forward(case, model, m, dtype):
    x = case.input(m)
    x.requires_grad_(x.is_floating_point())
    with make_autocast(dtype, CPU)():
        return x, case.result(model, x, m)


def in_one_piece(case, m, dtype):
    """Gradients of the parameters, and that of the input, by autograd alone."""
    model = copy.deepcopy(case.model)
    x, y = forward(case, model, m, dtype)
    y.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, x.grad


def first_half(case, model, store, m, y):
    """As a stage does it: small gradients are kept, those of matrices are owed."""
    store.microbatch = m
    model.zero_grad(set_to_none=True)
    y.backward()
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in matrices)
        if parameter.grad is not None:
            store.push_completed(name, parameter.grad)


def deferred(case):
    model, store = copy.deepcopy(case.model), WeightGradQueue()
    case.apart(model)
    split_backward(model, store)
    return model, store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_that_wait_have_the_bits_of_those_that_do_not(case, dtype):
    """Four microbatches are forwarded, go backward and are then taken, each time in another order."""
    model, store = deferred(case)
    expected = {m: in_one_piece(case, m, dtype) for m in MICROBATCHES}
    graphs = {m: forward(case, model, m, dtype) for m in MICROBATCHES}
    for m in (2, 0, 3, 1):
        x, y = graphs.pop(m)
        first_half(case, model, store, m, y)
        assert torch.equal(x.grad, expected[m][1]) if x.requires_grad else x.grad is None
    for m in (1, 2, 0, 3):
        found = list(store.pop_gradients(m))
        assert len(found) == len(expected[m][0])
        for name, gradient in found:
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, expected[m][0][name]), name
        assert list(store.pop_gradients(m)) == []


def test_the_gradients_differ_between_microbatches():
    """So that a mix-up above would be seen."""
    for case in CASES.values():
        first, second = (in_one_piece(case, m, "float32")[0] for m in (0, 1))
        assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_forward_without_gradients_owes_nothing_and_gives_the_same(case, dtype):
    model, store = deferred(case)
    with torch.no_grad():
        _, y = forward(case, model, 0, dtype)
    assert torch.equal(y, forward(case, case.model, 0, dtype)[1])
    assert list(store.pop_gradients(store.microbatch)) == []


def test_a_forward_alone_owes_nothing():
    model, store = deferred(CASES["plain"])
    store.microbatch = 0
    forward(CASES["plain"], model, 0, "float32")
    assert list(store.pop_gradients(0)) == []


def test_what_is_owed_is_let_go_one_after_the_other():
    store, alive = WeightGradQueue(), []
    store.microbatch = 7
    for i in range(4):
        x, gradient = torch.full((3, 2), float(i)), torch.ones(3, 5)
        store.push_pending(f"{i}.weight", False, x, gradient)
        alive.append((weakref.ref(x), weakref.ref(gradient)))
    store.push_completed("norm.weight", torch.ones(2))
    del x, gradient

    def gone():
        return [all(ref() is None for ref in refs) for refs in alive]

    found = store.pop_gradients(7)
    assert next(found)[0] == "norm.weight"
    for i in range(4):
        name, product = next(found)
        assert name == f"{i}.weight"
        assert torch.equal(product, torch.full((5, 2), 3.0 * i))
        assert gone() == [earlier < i for earlier in range(4)]
    assert next(found, None) is None
    assert all(gone())


def test_a_backward_that_is_over_leaves_the_store_alone_with_what_it_needs():
    """The input of a matrix lives until its gradient is made, and no longer."""
    model, store = deferred(CASES["plain"])
    inputs = []
    model[3].register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0].untyped_storage())))
    x, y = forward(CASES["plain"], model, 0, "float32")
    first_half(CASES["plain"], model, store, 0, y)
    del x, y
    assert inputs[0]() is not None
    list(store.pop_gradients(0))
    assert inputs[0]() is None


@pytest.mark.parametrize(
    ("model", "needs_gradient"),
    [
        (nn.Sequential(nn.Linear(6, 4)), True),
        (nn.Linear(6, 4, bias=False), True),
        (nn.Sequential(nn.Linear(6, 4, bias=False), nn.LayerNorm(4)), False),
    ],
    ids=["with a bias", "the whole model", "of an input without gradient"],
)
def test_any_linear_layer_can_be_done_in_halves(model, needs_gradient):
    store, x = WeightGradQueue(), torch.randn(3, 4, 6, requires_grad=needs_gradient)
    expected = model(x)
    expected.square().sum().backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    split_backward(model, store)
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    halves = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    halves.update(store.pop_gradients(store.microbatch))
    assert torch.equal(y, expected)
    assert halves.keys() == plain.keys()
    assert all(torch.equal(halves[name], plain[name]) for name in plain)
