"""Fused kernels against torch in float64; equal bits with any number of threads and for rows computed alone."""

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.comm.base import SelfComm
from mpilm.kernels.base import IGNORE_INDEX, TORCH_KERNELS

njit = pytest.importorskip("numba").njit
from mpilm.kernels import functions, loops  # noqa: E402
from mpilm.kernels.attention import find_spans  # noqa: E402
from mpilm.kernels.fused import FusedKernels  # noqa: E402
from mpilm.optim.norm import global_norm  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
KERNELS = FusedKernels(threads=1)
SILU = nn.SiLU()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate(kernels, x):  # (B, T, H K)
    angles = draw(x.shape[1], 5, seed=9)
    angles = torch.cat((angles, angles), dim=-1)
    return kernels.rotate(x.unflatten(-1, (-1, 10)).transpose(1, 2), angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def rotate_by_sequence(kernels, x):
    angles = draw(x.shape[0], 1, x.shape[1], 5, seed=9)
    angles = torch.cat((angles, angles), dim=-1)
    return kernels.rotate(x.unflatten(-1, (-1, 10)).transpose(1, 2), angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def attend(kernels, x, causal=True, documents=None):
    q, k, v = (part.unflatten(-1, (-1, 10)).transpose(1, 2) for part in x.split((40, 20, 20), dim=-1))
    return kernels.attend(q, k, v, causal, documents)


DOCUMENTS = torch.tensor([[0] * 3 + [1] * 60 + [2] * 37, [5] * 99 + [-1]])


def loss(kernels, x):
    targets = torch.randint(0, x.shape[-1], x.shape[:2], generator=torch.Generator().manual_seed(1))
    targets[:1, :2] = IGNORE_INDEX
    return kernels.loss_sum(x * 3, targets)


# Name: a function of kernels and inputs, and the shapes of the inputs, of which the first may have any number of rows.
OPERATIONS = {
    "rms_norm": (lambda kernels, x, weight: kernels.rms_norm(x, weight, 1e-5), [(3, 7, 50), (50,)]),
    "rms_norm, one row": (lambda kernels, x, weight: kernels.rms_norm(x, weight, 1e-5), [(1, 64), (64,)]),
    "silu_product": (lambda kernels, gate, up: kernels.silu_product(SILU, gate, up), [(3, 7, 50)] * 2),
    "rotate": (rotate, [(3, 7, 40)]),
    "rotate by sequence": (rotate_by_sequence, [(3, 7, 40)]),
    "attention": (attend, [(2, 130, 80)]),
    "attention to both sides": (lambda kernels, x: attend(kernels, x, causal=False), [(2, 100, 80)]),
    "attention in documents": (lambda kernels, x: attend(kernels, x, documents=DOCUMENTS), [(2, 100, 80)]),
    "attention to both sides in documents": (lambda kernels, x: attend(kernels, x, False, DOCUMENTS), [(2, 100, 80)]),
    "loss": (loss, [(3, 7, 101)]),
}


def outcome(kernels, name, dtype, transform=lambda x: x):
    """Return output and gradients."""
    function, shapes = OPERATIONS[name]
    inputs = [draw(*shape, seed=i).to(torch.bfloat16).to(dtype) for i, shape in enumerate(shapes)]
    inputs = [transform(x).requires_grad_() for x in inputs]
    y = function(kernels, *inputs)
    (y.double() * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_equal_torch_in_float64(name, dtype):
    expected = outcome(TORCH_KERNELS, name, torch.float64)
    found = outcome(KERNELS, name, dtype)
    usual = outcome(TORCH_KERNELS, name, dtype)
    for right, ours, theirs in zip(expected, found, usual, strict=True):
        assert ours.dtype == theirs.dtype
        error, other = (float((x.double() - right).norm() / right.norm()) for x in (ours, theirs))
        assert error < (1e-6 if dtype == torch.float32 else 1.05 * other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_bits_do_not_depend_on_threads_and_places(name, dtype, monkeypatch):
    expected = outcome(KERNELS, name, dtype)
    monkeypatch.setattr(functions, "SHARE", 1)
    # Not aligned. Attention in float32 is torch's, whose bits depend on alignment to 16 bytes on some processors.
    shift = 4 if name.startswith("attention") and dtype == torch.float32 else 3
    moved = lambda x: torch.cat((x.new_zeros(shift), x.flatten()))[shift:].view(x.shape)  # noqa: E731
    for kernels, transform in ((FusedKernels(2), moved), (FusedKernels(3), lambda x: x)):
        for one, other in zip(expected, outcome(kernels, name, dtype, transform), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_others(dtype):
    x, weight = draw(6, 50).to(dtype), draw(50, seed=1).float()
    assert torch.equal(KERNELS.rms_norm(x, weight, 1e-5)[2:3], KERNELS.rms_norm(x[2:3], weight, 1e-5))
    assert torch.equal(KERNELS.silu_product(SILU, x, x + 1)[2:3], KERNELS.silu_product(SILU, x[2:3], x[2:3] + 1))


def test_norm_has_the_type_in_which_autocast_computes():
    x, weight = draw(6, 50).float(), torch.ones(50)
    with torch.autocast("cpu", torch.bfloat16):
        assert KERNELS.rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert KERNELS.rms_norm(x, weight, 1e-5).dtype == torch.float32


def test_float64_is_computed_by_torch():
    for name in OPERATIONS:
        for one, other in zip(outcome(KERNELS, name, torch.float64), outcome(TORCH_KERNELS, name, torch.float64)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_not_lost(dtype):
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(3, 2, 40, dtype=dtype)
        x[1, 0, 3] = value
        for result in (
            KERNELS.rms_norm(x, torch.ones(40), 1e-5),
            KERNELS.loss_sum(x, torch.full((3, 2), 3))[None],
            KERNELS.silu_product(SILU, torch.ones_like(x), x),
        ):
            assert not result.isfinite().all()
    for place in (0, 40, 60):  # of a query, a key, a value
        x = torch.ones(1, 3, 80, dtype=torch.bfloat16)
        x[0, 1, place] = torch.nan
        assert attend(KERNELS, x).isnan().any(dim=-1)[0, 0, 1]


def test_documents_in_pieces_are_left_to_torch():
    x, documents = draw(1, 90, 80).bfloat16(), torch.tensor([[0] * 30 + [1] * 30 + [0] * 30])
    assert find_spans(90, True, documents.numpy()) is None
    assert torch.equal(attend(KERNELS, x, documents=documents), attend(TORCH_KERNELS, x, documents=documents))


def test_sums_of_gradients_have_the_bits_of_torch():
    x, total = draw(50, 7).bfloat16(), draw(50, 7, seed=1).float()
    x[0, :2] = torch.tensor([0.0, -0.0])
    found, expected = torch.empty(2, 50, 7), torch.empty(2, 50, 7)
    for kernels, out in ((KERNELS, found), (TORCH_KERNELS, expected)):
        kernels.store_(out[0], x)
        out[1].copy_(total)
        kernels.accumulate_(out[1], x)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("threads", [1, 3])
def test_norm_has_the_bits_of_torch(threads, monkeypatch):
    monkeypatch.setattr(functions, "SHARE", 1)
    pieces = [draw(100_000, seed=i).float() * 10.0**i for i in range(3)]
    assert global_norm(pieces, SelfComm(), FusedKernels(threads).row_sum()) == global_norm(pieces, SelfComm())


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "documents" not in name])
def test_empty_tensors_have_the_type_of_others(name):
    """As a replica has that lacks a microbatch but serves the experts of others."""
    function, shapes = OPERATIONS[name]
    with torch.autocast("cpu", torch.bfloat16):
        results = []
        for count in (shapes[0][0], 0):
            first = draw(count, *shapes[0][1:]).bfloat16().requires_grad_()
            others = [
                draw(count if i == 0 and len(shape) > 1 else shape[0], *shape[1:]).float() for i, shape in enumerate(shapes[1:])
            ]
            results.append(y := function(KERNELS, first, *others))
            y.sum().backward()
            assert first.grad.shape == first.shape
        assert results[0].dtype == results[1].dtype


def test_target_outside_of_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="target 9"):
        KERNELS.loss_sum(torch.zeros(1, 2, 9), torch.tensor([[0, 9]]))


def test_exponential():
    x = np.linspace(-87, 88, 4001, dtype=np.float32)
    y = np.array([loops.exp(value) for value in x], dtype=np.float64)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 2e-7


def test_rounding_to_bfloat16_is_that_of_torch():
    special = [0.0, -0.0, 1.00390625, 1.01171875, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40]  # two ties among them
    values = torch.cat((draw(10_000).float() * 1e3, torch.tensor(special)))
    write = njit(lambda x: loops.bfloat16_bits(x))
    bits = torch.tensor([write(x) for x in values.numpy()], dtype=torch.uint16).view(torch.bfloat16)
    torch.testing.assert_close(bits, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert bits[10_000:10_002].signbit().tolist() == [False, True]
