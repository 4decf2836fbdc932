"""Blockwise attention against torch's, in float64; and that a model in bfloat16 on a CPU uses it."""

import pytest
import torch
import torch.nn.functional as F

from mpilm.kernels import blockwise_attention
from mpilm.kernels.base import attention_mask
from mpilm.kernels.blockwise_attention import BlockwiseAttention
from mpilm.model.attention import AttentionCore
from mpilm.model.sequence_info import SequenceInfo


def inputs(heads, groups, length, dtype=torch.float64, sequences=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sequences, length, count, 8) for count in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def outcome(function, tensors):
    """Return output and gradients."""
    y = function(*tensors)
    (y.double() * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    return [y.detach(), *(x.grad for x in tensors)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [5, 64, 100, 130])
@pytest.mark.parametrize("kind", ["causal", "both sides", "documents"])
def test_attention_equals_torch(heads, groups, length, kind, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "MAX_BLOCK", 48)  # several blocks, the last of them shorter
    mask = None
    if kind == "documents":
        documents = (torch.arange(length) // 7).expand(2, -1)
        mask = attention_mask(torch.arange(length), torch.arange(length), True, documents)
    causal = kind != "both sides"
    found = outcome(lambda q, k, v: BlockwiseAttention.apply(q, k, v, causal, mask), inputs(heads, groups, length))
    expected = outcome(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, enable_gqa=True),
        inputs(heads, groups, length),
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # dk and dv are added in float32


def test_bfloat16_differs_from_torch_by_its_rounding_only(monkeypatch):
    core, info = AttentionCore(True, 0.0, "core"), SequenceInfo(torch.arange(200))
    exact = outcome(lambda q, k, v: core(q, k, v, info), inputs(4, 2, 200, torch.float32))
    ours = outcome(lambda q, k, v: core(q, k, v, info), inputs(4, 2, 200, torch.bfloat16))
    fused = outcome(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        inputs(4, 2, 200, torch.bfloat16),
    )
    for a, b, c in zip(exact, ours, fused):
        error, usual = (float((x.float() - a).norm() / a.norm()) for x in (b, c))
        assert 0 < error < max(0.02, 2 * usual)
    assert not torch.equal(ours[0], fused[0])  # it is used
