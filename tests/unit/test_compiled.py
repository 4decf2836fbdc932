"""What is given to torch.compile, and what is not; that its results are right: tests/faults/test_verify.py."""

import errno

import pytest
import torch
from runs import whole_model
from text import tiny

from mpilm.engine.pipelined import draw_values
from mpilm.errors import ConfigError
from mpilm.model.sequence_info import KVCache, SequenceInfo
from mpilm.parallel import compile as compiled
from mpilm.trainer.memory import is_out_of_memory


@pytest.fixture
def calls(monkeypatch):
    """How often something compiled is called, in the place of torch.compile."""
    found = []

    def compile(function, dynamic):
        assert dynamic is False
        return lambda *inputs: found.append(function) or function(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    return found


def test_each_block_is_and_a_text_that_goes_on_is_not(calls):
    config = tiny("", "", model__n_layers=3)
    model, flat = whole_model(config.model, 29, torch.device("cpu"))
    draw_values(flat, config.model, seed=0)
    tokens = torch.randint(0, 29, (1, 5), generator=torch.Generator().manual_seed(0))
    plain = model(tokens, SequenceInfo(torch.arange(5)))
    compiled.compile_blocks(model)
    assert torch.equal(model(tokens, SequenceInfo(torch.arange(5))), plain)
    assert len(calls) == 3
    torch.testing.assert_close(model(tokens, SequenceInfo(torch.arange(5), cache=KVCache(8))), plain)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["", "no-such-compiler"])
def test_the_compiler_is_the_one_that_torch_takes(monkeypatch, name):
    monkeypatch.setenv("CXX", name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=f"and {name or r'(g|clang)[+][+]'} is not found; install one, name it in CXX"):
        compiled.require_compiler()


def test_memory_that_the_kernel_does_not_give_is_no_memory():
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
