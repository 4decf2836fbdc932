"""Compilation of blocks, with torch.compile replaced; tests/faults/test_verify.py compiles."""

import pytest
import torch
from runs import CPU, full_model, small_config
from text import tiny_config

from mpilm.engine.pipelined import draw_values
from mpilm.errors import ConfigError
from mpilm.model.sequence_info import KVCache, SequenceInfo
from mpilm.parallel.compile import compile_blocks, require_compiler


@pytest.fixture
def calls(monkeypatch):
    """Calls of compiled functions; torch.compile is replaced."""
    found = []

    def compile(function, dynamic):
        assert dynamic is False
        return lambda *inputs: found.append(function) or function(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    return found


def test_compile_blocks_compiles_each_block_but_not_decoding(calls):
    config = tiny_config("", "", model__n_layers=3)
    model, flat = full_model(config.model, 29, torch.device("cpu"))
    draw_values(flat, config.model, seed=0)
    tokens = torch.randint(0, 29, (1, 5), generator=torch.Generator().manual_seed(0))
    plain = model(tokens, SequenceInfo(torch.arange(5)))
    compile_blocks(model)
    assert torch.equal(model(tokens, SequenceInfo(torch.arange(5))), plain)
    assert len(calls) == 3
    torch.testing.assert_close(model(tokens, SequenceInfo(torch.arange(5), cache=KVCache(8))), plain)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["", "no-such-compiler"])
def test_require_compiler_without_one_names_what_torch_would_take(monkeypatch, name):
    monkeypatch.setenv("CXX", name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=f"and {name or r'(g|clang)[+][+]'} is not found; install one, name it in CXX"):
        require_compiler()


def test_block_is_compiled_once_whatever_the_samples():
    """Without dropout their keys must not be looked at: each new value would be another graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, flat = full_model(small_config(model__dropout=0.0).model, 64, CPU)
    flat.values.tensor.fill_(0.1)
    block = model.blocks["0"]
    forward, rotation = torch.compile(block.forward, backend=backend, dynamic=False), model.rotary(torch.arange(8))
    for keys in ([1], [2], [3]):
        forward(torch.ones(1, 8, 16), SequenceInfo(torch.arange(8), keys, rotation=rotation))
    assert len(graphs) == 1
