"""Fused kernels and deferred logits in whole runs: equal bits on all layouts, losses near torch's, resumes that keep them."""

import json
from pathlib import Path

import pytest
from runs import layout, newest_tensors, train_to_end, train_until_killed
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint.format import list_checkpoints
from mpilm.config.settings import override
from mpilm.errors import ConfigError
from mpilm.kernels import fused, linear_cross_entropy
from mpilm.trainer import loop

pytest.importorskip("numba")

LAYOUTS = {
    "data 2": (2, {}),
    "data 3, ZeRO-1": (3, layout(zero=1)),
    "data 2, ZeRO-3": (2, layout(zero=3)),
    "pipeline 2": (2, layout(pipeline=2)),
    "zero-bubble, data 2": (4, layout(pipeline=2, schedule="zero-bubble")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_config(data, folder, **changes):
    settings = {"train__steps": 4, "train__dtype": "bfloat16", "checkpoint__every": 2, "checkpoint__keep": 0, **changes}
    return tiny_config(data, folder, **settings)


def losses_of(config):
    rows = map(json.loads, Path(config.run.dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def serial(tmp_path_factory, data):
    """Return the tensor files of one rank, and its losses."""
    folder = tmp_path_factory.mktemp("serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILM_CACHE", str(folder / "cache"))
        config = make_config(data, folder / "run")
        return train_to_end(config, 1), losses_of(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_the_bits_of_one_rank(tmp_path, data, serial, name):
    size, changes = LAYOUTS[name]
    config = make_config(data, tmp_path / "run", **changes)
    assert train_to_end(config, size) == serial[0]
    (checkpoint,) = list_checkpoints(tmp_path / "run/checkpoints")[-1:]
    assert json.loads((checkpoint / "trainer.json").read_text())["conditions"]["kernels"] == "fused"


def test_losses_are_near_those_of_torch(tmp_path, data, serial):
    config = make_config(data, tmp_path / "run", train__kernels="torch")
    files = train_to_end(config, 2)
    assert losses_of(config) == pytest.approx(serial[1], rel=2e-3)
    assert files != serial[0]


def test_run_goes_on_with_its_kernels(tmp_path, data, capsys):
    """A run of torch's kernels, as all of earlier versions, keeps them unless others are stated."""
    expected = train_to_end(make_config(data, tmp_path / "whole", train__kernels="torch"), 2)
    config = make_config(data, tmp_path / "run", train__kernels="torch")
    train_until_killed(config, 2, step=3)
    for checkpoint in list_checkpoints(tmp_path / "run/checkpoints"):  # as 0.1.0 wrote it
        trainer = json.loads((checkpoint / "trainer.json").read_text())
        assert trainer["conditions"]["kernels"] == "torch"
    capsys.readouterr()
    resumed = override(config, train__kernels="auto")
    run_ranks(2, lambda comm: loop.train(resumed, comm))
    assert newest_tensors(resumed) == expected
    assert "last bits may differ" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deferred_logits_have_equal_bits_on_all_layouts(tmp_path, data, monkeypatch, dtype):
    usual = make_config(data, tmp_path / "usual", train__dtype=dtype)
    train_to_end(usual, 1)
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 0)
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_BLOCK", 2000)
    one = make_config(data, tmp_path / "one", train__dtype=dtype)
    expected = train_to_end(one, 1)
    assert losses_of(one) == pytest.approx(losses_of(usual), rel=1e-5 if dtype == "float32" else 2e-3)
    assert expected != newest_tensors(usual)
    for name in ("data 2", "zero-bubble, data 2"):
        size, changes = LAYOUTS[name]
        assert train_to_end(make_config(data, tmp_path / name, train__dtype=dtype, **changes), size) == expected


def test_fused_kernels_that_cannot_be_used_are_refused(tmp_path, data, monkeypatch):
    def fail(threads):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(fused, "LoopRunner", fail)
    config = make_config(data, tmp_path / "run", train__kernels="fused")
    with pytest.raises(ConfigError, match=r"--train.kernels fused: numba cannot be used .* pip install numba"):
        fused.choose_kernels(config.train, fused.torch.device("cpu"))
    assert fused.choose_kernels(override(config, train__kernels="auto").train, fused.torch.device("cpu")) == "torch"
    with pytest.raises(ConfigError, match="they are for CPUs, and the device is cuda; write auto"):
        fused.choose_kernels(config.train, fused.torch.device("cuda"))
