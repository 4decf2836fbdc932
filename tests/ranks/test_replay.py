"""One step of a run recomputed with its tensors: against plain torch, equal on every layout, and refusals."""

import re

import numpy as np
import pytest
import torch
from runs import full_batch, full_model, train_to_end
from safetensors.torch import load_file
from text import make_text, tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint.load import open_tensors
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.errors import ConfigError
from mpilm.kernels.base import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.trainer.build import build_run
from mpilm.verification.arguments import ReplayArguments, ReplayCompute, ReplayParallel
from mpilm.verification.replay import replay_step

SETTINGS = {
    "train__steps": 6, "checkpoint__every": 3, "checkpoint__keep": 0, "run__eval_every": 0, "model__dropout": 0.0,
    "model__tensor_parts": 2, "train__clip_norm": 0.0,
}  # fmt: skip
WATCH = ("blocks.0.attn.o.weight.grad", "blocks.1.mlp.gate.weight.*", "norm.weight.*", "embed.weight.value")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_to_end(tiny_config(data, folder, **SETTINGS), 2)
    return folder


def replay(run, size=1, **settings):
    """Return what the command prints on thread ranks."""
    arguments, printed = ReplayArguments(runs=(str(run),), **settings), []
    run_ranks(size, lambda comm: replay_step(arguments, comm, printed.append if comm.rank == 0 else lambda text: None))
    return "\n".join(printed)


def refuse(run, **settings):
    with pytest.raises(CollectiveError) as caught:
        replay(run, **settings)
    assert type(caught.value.error) is ConfigError
    return str(caught.value)


def stored(run, step, stem, name):
    """Return a tensor of a checkpoint."""
    with open_tensors(run / f"checkpoints/step-{step:08d}", stem) as refs:
        out = torch.empty(refs[name].shape)
        refs[name].read(out)
        return out


def test_tensors_are_those_of_plain_torch(tmp_path, data, trained):
    """Step 4, from the weights in checkpoint 3: gradients by autograd on the whole model."""
    path = tmp_path / "tensors.safetensors"
    replay(trained, step=4, watch=WATCH, save=str(path))
    shown = load_file(path)
    run = build_run(tiny_config(data, tmp_path / "new", **{**SETTINGS, "model__tensor_parts": 1}), SelfComm())
    model, _ = full_model(run.config.model, run.model.vocab_size, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        hf = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)
        hf = re.sub(r"^blocks\.(\d+)\.attn\.(.)\.", r"model.layers.\1.self_attn.\2_proj.", hf)
        hf = re.sub(r"^blocks\.(\d+)\.mlp\.(\w+)\.", r"model.layers.\1.mlp.\2_proj.", hf)
        hf = re.sub(r"^blocks\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm.", hf)
        hf = re.sub(r"^blocks\.(\d+)\.mlp_norm\.", r"model.layers.\1.post_attention_layernorm.", hf)
        if hf != "head.weight":
            parameter.data.copy_(stored(trained, 3, "model", hf))
    tokens, targets = full_batch(run.batches, 3, 8)
    (loss_sum(model(tokens, SequenceInfo(torch.arange(tokens.shape[1]))), targets) / targets.numel()).backward()
    for name in ("blocks.0.attn.o.weight", "blocks.1.mlp.gate.weight", "norm.weight"):
        expected = model.get_parameter(name).grad
        assert torch.allclose(shown[f"{name}.grad"], expected, rtol=1e-4, atol=1e-7), name
    assert torch.equal(shown["embed.weight.value"], stored(trained, 3, "model", "model.embed_tokens.weight"))
    with torch.no_grad():
        update = shown["norm.weight.value"] + shown["norm.weight.update"]
    assert torch.isfinite(update).all()
    assert shown["norm.weight.update"].abs().max() > 0


@pytest.mark.parametrize(
    ("size", "parallel"), [(2, {}), (3, {"zero": 3}), (4, {"pipeline": 2, "tensor": 2}), (4, {"tensor": 2, "zero": 1})]
)
@pytest.mark.parametrize("microbatch", [-1, 5])
def test_tensors_are_the_same_on_every_layout(trained, size, parallel, microbatch):
    settings = {"step": 5, "watch": WATCH, "microbatch": microbatch}
    shown = replay(trained, size, parallel=ReplayParallel(**parallel), **settings)
    assert shown == replay(trained, **settings)
    assert shown.count("digest") == 8


def test_microbatch_gradients_add_up_to_that_of_the_step(tmp_path, trained):
    name = "blocks.0.attn.o.weight.grad"
    parts = []
    for microbatch in range(8):
        replay(trained, step=2, watch=(name,), microbatch=microbatch, save=str(tmp_path / "part"))
        parts.append(load_file(tmp_path / "part")[name])
    replay(trained, step=2, watch=(name,), save=str(tmp_path / "whole"))
    pairs = [a + b for a, b in zip(parts[::2], parts[1::2])]
    total = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])  # the tree of the microbatches
    assert torch.equal(total, load_file(tmp_path / "whole")[name])


def test_outputs_of_modules_are_shown(tmp_path, trained):
    replay(trained, step=2, watch=("blocks.0", "embed"), save=str(tmp_path / "one"))
    shown = load_file(tmp_path / "one")
    assert {name: tuple(x.shape) for name, x in shown.items()} == {"embed": (2, 16, 32), "blocks.0": (2, 16, 32)}
    replay(trained, 2, step=2, watch=("blocks.0",), parallel=ReplayParallel(tensor=2), save=str(tmp_path / "two"))
    parts = load_file(tmp_path / "two")
    assert list(parts) == ["blocks.0 (rank 0)", "blocks.0 (rank 1)"]  # each has half of the tokens
    assert torch.equal(torch.cat(list(parts.values()), dim=1), shown["blocks.0"])


def test_two_runs_are_compared(tmp_path, data, trained):
    train_to_end(tiny_config(data, tmp_path / "run", **{**SETTINGS, "train__lr": 1e-3}), 1)
    settings = {"watch": ("norm.weight.*",), "compare": str(tmp_path / "run")}
    first = replay(trained, step=1, **settings).splitlines()
    assert [line.rpartition("; ")[2] for line in first if "norm.weight.grad" in line] == ["equal bits"]
    assert re.search(r"32 of 32 elements differ by at most \S+, the first at \[0\]$", replay(trained, step=1, **settings), re.M)


def test_text_of_a_microbatch_is_shown_with_its_place(trained, data):
    printed = replay(trained, step=3, microbatch=4, text=True)
    head = r"sample (\d+) \(microbatch 4, \S+, tokens (\d+) to (\d+) of (\S+)\):\n"
    found = [(*match.groups(), printed[match.end() :]) for match in re.finditer(head, printed)]
    assert [int(number) for number, *_ in found] == [40, 41]
    text = np.frombuffer(make_text().encode(), dtype=np.uint8)
    for _, start, stop, path, shown in found:
        assert path == f"{data}.bin"
        assert shown.startswith(text[int(start) : int(stop)].tobytes().decode(errors="replace"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 7, "watch": ("norm",)}, "has 6 steps"),
        ({"step": 2, "watch": ("norm",), "microbatch": 8}, "has 8 microbatches a step, numbered from 0"),
        ({"step": 2, "watch": ("norm",), "microbatch": -2}, "has 8 microbatches a step, numbered from 0"),
        ({"step": 2, "watch": ("norm.wieght.grad",)}, "the nearest names: norm.weight.grad"),
    ],
)
def test_what_is_not_there_is_refused(trained, settings, message):
    assert message in refuse(trained, **settings)


@pytest.mark.parametrize("path", ["nowhere/x.safetensors", "."])
def test_file_that_cannot_be_written_is_refused_at_once(tmp_path, trained, path):
    with pytest.raises(CollectiveError, match=r"--save .*; name a file"):
        replay(trained, 2, step=2, watch=("norm",), save=str(tmp_path / path))


def test_watching_does_not_change_the_step(trained):
    shown = replay(trained, step=6, watch=("*.update",))
    digests = re.findall(r"^(\S+)\.update .* digest (\w+)$", shown, re.M)
    again = replay(trained, 3, step=6, watch=("*",), parallel=ReplayParallel(zero=1), train=ReplayCompute(offload="parameters"))
    assert digests == re.findall(r"^(\S+)\.update .* digest (\w+)$", again, re.M)
