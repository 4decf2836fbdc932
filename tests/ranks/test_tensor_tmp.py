from functools import partial

import pytest
import torch
from thread_ranks import run_ranks

from mpilm.config.schema import Config, override, resolve_config
from mpilm.model.families import build_model, initial_std, initial_value
from mpilm.model.layers import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.parallel.plan import cut_of, part_name
from mpilm.parallel.tensor import divide_model

V = 131


def shape(arch, **more):
    c = override(
        Config(),
        model__arch=arch,
        model__n_layers=2,
        model__d_model=32,
        model__n_heads=4,
        model__context_length=16,
        model__n_kv_heads=4,
        **more,
    )
    return resolve_config(c).model


def data(B=2, T=16):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, V, (B, T), generator=g), torch.randint(0, V, (B, T), generator=g)


def run(model_shape, axis, dtype, comm=None, keys=None):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_model(model_shape, V)
    full = {
        n: initial_value(0, n, tuple(p.shape), initial_std(n, model_shape) or 0.3).to(dtype)
        for n, p in model.named_parameters()
    }
    cut = partial(cut_of, family=model_shape.arch)
    if axis:
        divide_model(model, cut, axis)
    for n, p in list(model.named_parameters()):
        if ".parts." in n:
            import re

            m = re.match(r"(.*)\.parts\.(\d+)\.(.*)", n)
            src = f"{m[1]}.{m[3]}"
            assert part_name(src, int(m[2])) == n
            v = cut(src).take_part(full[src], int(m[2]), axis.parts)
        else:
            v = full[n]
        assert tuple(v.shape) == tuple(p.shape), (n, v.shape, p.shape)
        owner, _, a = n.rpartition(".")
        setattr(model.get_submodule(owner), a, torch.nn.Parameter(v.clone().contiguous()))
    tokens, targets = data()
    info = SequenceInfo(torch.arange(16), keys, None, loss_weight=1.0)
    y = model(tokens, info)
    loss = y.losses(targets).sum() if axis else loss_sum(y, targets)
    loss.backward()
    return float(loss), {n: p.grad for n, p in model.named_parameters()}, cut


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "qwen", "mixtral"])
def test_equal(arch):
    s = shape(arch)
    ref_loss, ref, cut = run(s, None, torch.float64)

    def ranks(parts, dtype, keys=None):
        return lambda world: run(s, TensorAxis(world, parts), dtype, keys=keys)

    for parts in (1, 2, 4):
        ((l, g, _),) = run_ranks(1, ranks(parts, torch.float64))
        assert abs(l - ref_loss) < 1e-4 * abs(ref_loss), (l, ref_loss)  # loss float32
        for n, x in ref.items():
            if n in g:
                assert torch.allclose(g[n], x, atol=2e-5), (n, (g[n] - x).abs().max())
            else:
                for v in range(parts):
                    assert torch.allclose(g[part_name(n, v)], cut(n).take_part(x, v, parts), atol=2e-5), n
    for parts in (2, 3, 4) if False else (2, 4):
        for keys in (None, [3, 4]):
            ((l, g, _),) = run_ranks(1, ranks(parts, torch.float32, keys))
            for T in (2, 3, 4):
                if parts < T:
                    continue
                for l2, g2, _ in run_ranks(T, ranks(parts, torch.float32, keys)):
                    assert l2 == l
                    for n, x in g2.items():
                        assert torch.equal(x, g[n]), (arch, parts, T, n)
