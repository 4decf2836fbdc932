"""Head and loss in blocks of the vocabulary, against torch in float64 and against whole logits; and the memory they need."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mpilm.kernels import linear_cross_entropy
from mpilm.kernels.base import IGNORE_INDEX, TORCH_KERNELS
from mpilm.kernels.linear_cross_entropy import DeferredLogits, LinearCrossEntropySum, defer_logits
from mpilm.model.layers import Linear

KERNELS = {"torch": TORCH_KERNELS}
try:
    from mpilm.kernels.fused import FusedKernels

    KERNELS["fused"] = FusedKernels(threads=1)
except ImportError:
    pass


def inputs(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 8), (103, 8)))
    tensors = [x, weight, torch.randn(103, generator=generator, dtype=torch.float64) if bias else None]
    targets = torch.randint(0, 103, (2, 5), generator=generator)
    targets[0, 1] = targets[1, 4] = IGNORE_INDEX
    return [None if each is None else each.to(torch.bfloat16).to(dtype).requires_grad_() for each in tensors], targets


def outcome(function, dtype, bias):
    """Return the loss and the gradients."""
    tensors, targets = inputs(dtype, bias)
    loss = function(*tensors, targets)
    (loss / 7).backward()
    return [loss.detach(), *(each.grad for each in tensors if each is not None)]


def whole(x, weight, bias, targets):
    logits = F.linear(x, weight, bias).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [10, 170, 5000])  # of 1 and 17 words, and of all
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_torch(monkeypatch, kernels, bias, block, dtype, error):
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_BLOCK", block)
    expected = outcome(whole, torch.float64, bias)
    found = outcome(lambda *tensors: LinearCrossEntropySum.apply(KERNELS[kernels], *tensors), dtype, bias)
    for right, ours in zip(expected, found, strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < error


def test_only_many_logits_are_deferred_and_only_in_training(monkeypatch):
    model = torch.nn.Module()
    model.head = Linear(8, 103, bias=False)
    model.head.weight.data.zero_()
    defer_logits(model, TORCH_KERNELS)
    x = torch.ones(2, 5, 8, requires_grad=True)
    assert isinstance(model.head(x), torch.Tensor)
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 1029)
    assert isinstance(model.head(x), DeferredLogits)
    assert isinstance(model.head(x[:1]), torch.Tensor)
    with torch.no_grad():
        assert isinstance(model.head(x), torch.Tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head(x).x.dtype == model.head(x).weight.dtype == torch.bfloat16


def peak_mib(deferred, dtype):
    """Return the memory that head and loss of 1,024 tokens and 131,072 words add, in a process of its own."""
    code = f"""
import resource, torch
from mpilm.kernels import linear_cross_entropy
from mpilm.kernels.base import TORCH_KERNELS, loss_sum
from mpilm.kernels.linear_cross_entropy import LinearCrossEntropySum
torch.set_num_threads(1)
x = torch.randn(1, 1024, 64, dtype=torch.{dtype}, requires_grad=True)
weight = torch.randn(131_072, 64, dtype=torch.{dtype}, requires_grad=True)
targets = torch.zeros(1, 1024, dtype=torch.int64)
loss_sum(x @ weight[:128].t(), targets).backward()  # what the program itself needs
x.grad = weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{
        "LinearCrossEntropySum.apply(TORCH_KERNELS, x, weight, None, targets)"
        if deferred
        else 'torch.nn.functional.cross_entropy((x @ weight.t())[0].float(), targets[0], reduction="sum")'
    }.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) / 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_tensor_of_tokens_times_vocabulary_lives(dtype):
    assert peak_mib(True, dtype) < 0.2 * peak_mib(False, dtype)
