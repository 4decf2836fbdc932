"""Sequence parts against plain attention and the plain model, in float64, and the same bits for any number of ranks."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from part_models import VOCAB, dot, draw, draw_batch, family_config
from runs import CPU, FAMILIES, assemble, layout, small_config, train_steps
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.engine.pipelined import meta_model
from mpilm.kernels import base
from mpilm.kernels.base import attention_mask, loss_sum
from mpilm.model.attention import AttentionCore
from mpilm.model.families import initial_std, initial_value
from mpilm.model.flops import activation_bytes
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.sequence_axis import HeadsForTokens, SequenceAxis
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.context import attend_by_part
from mpilm.parallel.plan import cut_of
from mpilm.parallel.tensor import divide_model

LENGTH, WIDTH = 48, 8  # tokens of a sequence, and elements of a head


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (1, 5), (2, 4), (3, 6), (4, 4)])
def test_parts_of_all_ranks_are_the_sequence_and_causal_work_is_even(size, parts):
    tokens = torch.arange(2 * 4 * parts).view(2, -1)

    def body(comm):
        axis = SequenceAxis(comm, parts)
        own = axis.select_own(tokens)
        assert torch.equal(torch.cat(axis.split(own, 1), dim=1), own)
        return own, sum(part + 1 for part in axis.local_parts)

    selected, work = zip(*run_ranks(size, body))
    assert torch.equal(torch.cat(selected, dim=1).sort(dim=1).values, tokens)
    if parts == 2 * size:
        assert len(set(work)) == 1


def plain_attention(q, k, v, documents, causal):
    places = torch.arange(LENGTH)
    return F.scaled_dot_product_attention(q, k, v, attention_mask(places, places, causal, documents), enable_gqa=True)


@pytest.mark.parametrize(("size", "method"), [(1, "ring"), (2, "ring"), (3, "ring"), (6, "ring"), (3, "ulysses")])
@pytest.mark.parametrize(("causal", "has_documents"), product([True, False], [True, False]))
def test_attention_over_parts_is_attention(size, method, causal, has_documents):
    """Against torch's scaled_dot_product_attention: output and gradients in float64, with fewer key heads than query heads."""
    q, k, v = draw(1, shape=(2, 6, LENGTH, WIDTH)), draw(2, shape=(2, 3, LENGTH, WIDTH)), draw(3, shape=(2, 3, LENGTH, WIDTH))
    gradient = draw(4, shape=(2, 6, LENGTH, WIDTH))
    documents = torch.tensor([[0] * 5 + [1] * 30 + [2] * 13, [0] * 47 + [1]]) if has_documents else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*leaves, documents, causal)
    expected.backward(gradient)
    core = AttentionCore(causal, 0.0, "core")

    def body(comm):
        axis = SequenceAxis(comm, 6)
        own = [axis.select_own(x, 2).requires_grad_() for x in (q, k, v)]
        y = attend_by_part(
            core, core.forward, axis, method == "ulysses", *own, SequenceInfo(torch.arange(LENGTH), documents=documents)
        )
        y.backward(axis.select_own(gradient, 2))
        torch.testing.assert_close(y, axis.select_own(expected.detach(), 2), rtol=0, atol=1e-13)
        for x, leaf in zip(own, leaves):
            torch.testing.assert_close(x.grad, axis.select_own(leaf.grad, 2), rtol=0, atol=1e-13)

    run_ranks(size, body)


@pytest.mark.parametrize("causal", [True, False])
def test_formula_with_dropout_is_the_fused_kernel_if_nothing_is_dropped(causal):
    """And what it drops, it drops from the weights: the mean over many masks is the attention without dropout."""
    inputs = [draw(n, shape=(1, 2, LENGTH, WIDTH)) for n in range(4)]
    axis = SequenceAxis(SelfComm(), 4)

    def run(core, keys):
        *leaves, gradient = (x.repeat(len(keys or [0]), 1, 1, 1) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        y = attend_by_part(core, core.forward, axis, False, *leaves, SequenceInfo(torch.arange(LENGTH), keys))
        return (y.detach(), *torch.autograd.grad(y, leaves, gradient))

    expected = run(AttentionCore(causal, 0.0, "core"), None)
    for found, value in zip(run(AttentionCore(causal, 1e-12, "core"), [1]), expected):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-10)
    core = AttentionCore(causal, 0.3, "core")
    for values, value in zip(run(core, list(range(400))), expected):
        mean = values.mean(dim=0, keepdim=True)
        assert float((mean - value).abs().mean() / value.abs().mean()) < 0.1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_exchange_of_heads_and_its_gradient_are_adjoint(size):
    """<F x, y> = <x, F* y>, summed over all ranks, and the inverse undoes it."""

    def body(comm):
        axis = SequenceAxis(comm, 4)
        x = draw(1, comm.rank, shape=(2, 4, 3, 5)).requires_grad_()
        y = draw(2, comm.rank, shape=(2, 4 // size, 3 * size, 5))
        heads = HeadsForTokens.apply(axis, x, False)
        assert torch.equal(HeadsForTokens.apply(axis, heads, True), x)
        (gradient,) = torch.autograd.grad(heads, x, y)
        return dot([heads], [y]), dot([x], [gradient])

    left, right = zip(*run_ranks(size, body))
    assert sum(left) == pytest.approx(sum(right), rel=1e-12)


def build_float_model(shape, axis, dtype):
    model = meta_model(shape, VOCAB)
    divide_model(model, partial(cut_of, family=shape.arch), axis)
    for name, parameter in list(model.named_parameters()):
        values = initial_value(0, name, tuple(parameter.shape), initial_std(name, shape) or 0.3).to(dtype)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(values))
    return model


def run_model(shape, axis, documents=None):
    """Return the loss of this rank's sequence parts, in float64, and the gradients."""
    model = build_float_model(shape, axis, torch.float64)
    inputs, targets = draw_batch(shape)
    select = axis.sequence.select_own
    positions = select(torch.arange(shape.context_length), 0)
    logits = model(select(inputs), SequenceInfo(positions, documents=documents, loss_weight=0.0))
    loss = loss_sum(logits, select(targets))
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("size", "parts"), [(1, 4), (2, 4), (4, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_compute_what_the_plain_model_computes(family, size, parts):
    """Loss and gradients in float64 (the losses of tokens are float32), with documents."""
    shape = family_config(family)
    documents = torch.tensor([[0] * 3 + [1] * 5, [0] * 8])
    loss, gradients = run_model(shape, TensorAxis(SelfComm(), 1), documents)
    results = run_ranks(size, lambda comm: run_model(shape, TensorAxis(SelfComm(), 1, SequenceAxis(comm, parts)), documents))
    assert sum(part_loss for part_loss, _ in results) == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(found[name] for _, found in results), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_rank_are_its_share(family, dtype):
    """What autograd saves on one of two ranks, each storage once, without parameters and logits, against the formula."""
    shape = replace(family_config(family), d_model=128, head_width=32, d_ff=384, context_length=128, dropout=0.0)
    if family in ("mixtral", "qwen3-moe") and dtype == "bfloat16":
        pytest.skip("each part has bfloat16 copies of its experts")

    def body(comm):
        storages, select = {}, SequenceAxis(comm, 4).select_own

        def record(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        model = build_float_model(shape, TensorAxis(SelfComm(), 1, SequenceAxis(comm, 4)), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), make_autocast(dtype, CPU)():
            info = SequenceInfo(select(torch.arange(shape.context_length), 0), loss_weight=1.0)
            logits = model(select(draw_batch(shape)[0]), info)
        for tensor in (*model.parameters(), logits):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in storages.values())

    predicted = activation_bytes(shape, VOCAB, shape.context_length, dtype)["activations"]  # of 2 sequences, each half
    assert run_ranks(2, body) == [pytest.approx(predicted, rel=0.05)] * 2


SIZES = {
    "model__n_heads": 4, "model__d_model": 32, "model__d_ff": 44, "model__context_length": 20, "model__sequence_parts": 4,
    "train__micro_batch": 3, "train__global_batch": 6,
}  # fmt: skip
"""Parts of 5 tokens and 3 sequences, so that no tensor fills whole vectors of the processor."""
LAYOUTS = [
    (2, {}, layout(context=2, context_method="ring")),
    (2, {}, layout(context=2, context_method="ulysses")),
    (4, {}, layout(context=4, zero=1)),
    (4, {}, layout(context=2, zero=3)),
    (4, {"train__recompute": "attention"}, layout(2, "interleaved", context=2)),
    (4, {"model__tensor_parts": 2, "model__context_length": 40}, layout(tensor=2, context=2)),
    (8, {"model__tensor_parts": 2, "model__context_length": 40}, layout(2, "zero-bubble", tensor=2, context=2)),
    (6, {"model__sequence_parts": 6, "model__context_length": 30}, layout(context=6, zero=2)),
    (3, {"model__sequence_parts": 6, "model__context_length": 30, "train__dtype": "bfloat16"}, layout(context=3)),
]


CASES = [(family, case) for i, family in enumerate(FAMILIES) for case in LAYOUTS[i % 3 :: 3]]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_layout_trains_to_the_same_bits(family, case):
    size, changes, parallel = case
    dropout = 0.1 * (size in (4, 8))
    if (dropout or family.startswith("qwen3")) and parallel.get("parallel__context_method") == "ulysses":  # refused
        parallel = {**parallel, "parallel__context_method": "auto"}
    heads = {} if family in ("gpt2", "bert") else {"model__n_kv_heads": 2}
    config = small_config(**{**FAMILIES[family], **SIZES, **heads, "model__dropout": dropout, **changes})
    (expected,) = run_ranks(1, lambda comm: train_steps(config, comm))
    settings = small_config(**{**FAMILIES[family], **SIZES, **heads, "model__dropout": dropout, **changes, **parallel})
    outcomes = run_ranks(size, lambda comm: train_steps(settings, comm, checks_calls=True))
    assert all(outcome.numbers == expected.numbers for outcome in outcomes)
    found, bits = assemble([outcome.state for outcome in outcomes]), assemble([expected.state])
    assert [name for name in bits if not torch.equal(found[name], bits[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2])
def test_loss_in_blocks_of_sequence_parts_has_the_bits_of_the_whole(monkeypatch, size, dtype):
    """One sequence a microbatch, so that the logits of its parts are views of the same memory; backward overwrites them."""
    settings = {**SIZES, "train__micro_batch": 1, "train__dtype": dtype, **layout(context=size)}
    (expected, *_) = run_ranks(size, lambda comm: train_steps(small_config(**settings), comm))
    monkeypatch.setattr(base, "LOSS_BLOCK", 100)  # less than the logits of a row
    (found, *_) = run_ranks(size, lambda comm: train_steps(small_config(**settings), comm))
    assert found.numbers == expected.numbers
