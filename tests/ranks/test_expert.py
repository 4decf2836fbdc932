"""Divided experts against whole ones: the exchange of tokens, the same bits for any number of ranks, and what a rank holds."""

import pytest
import torch
from helpers import read_metrics
from part_models import dot, draw
from runs import FAMILIES, assert_equals_serial, build_train_model, eval_loss, layout, small_config, train_on_threads
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.config.schema import GenerateConfig
from mpilm.engine.step import train_step
from mpilm.inference.generate import generate
from mpilm.ops.expert_axis import ExchangeRows, ExpertAxis
from mpilm.parallel.layout import select_owned
from mpilm.trainer.loop import train
from mpilm.verification.layouts import RandomTokens

WIDTH, EXPERTS = 5, 12


def rows_of(rank):
    """Inputs for each expert, of which some have none."""
    return [draw("rows", rank, expert, shape=((3 * rank + expert) % 4, WIDTH)) for expert in range(EXPERTS)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_rows_reach_their_experts_and_come_back(size):
    def body(comm):
        axis, inputs = ExpertAxis(comm, EXPERTS), rows_of(comm.rank)
        sends, receives = axis.count_rows(inputs)
        arrived = ExchangeRows.apply(comm, sends, receives, *inputs)
        expected = [rows_of(source)[expert] for source in range(size) for expert in axis.local_experts]
        assert all(torch.equal(x, y) for x, y in zip(arrived, expected, strict=True))
        assert all(x.data_ptr() % 64 == 0 for x in arrived if x.numel())
        returned = ExchangeRows.apply(comm, receives, sends, *arrived)
        assert all(torch.equal(x, y) for x, y in zip(returned, inputs, strict=True))
        return list(axis.local_experts)

    assert [expert for own in run_ranks(size, body) for expert in own] == list(range(EXPERTS))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exchange_of_rows_and_its_gradient_are_adjoint(size):
    """<F x, y> = <x, F* y>, summed over all ranks."""

    def body(comm):
        inputs = [x.requires_grad_() for x in rows_of(comm.rank)]
        sends, receives = ExpertAxis(comm, EXPERTS).count_rows(inputs)
        outputs = ExchangeRows.apply(comm, sends, receives, *inputs)
        gradients = [draw("gradient", comm.rank, i, shape=x.shape) for i, x in enumerate(outputs)]
        torch.autograd.backward(outputs, gradients)
        return dot(outputs, gradients), dot(inputs, [x.grad for x in inputs])

    forward, backward = map(sum, zip(*run_ranks(size, body)))
    assert forward == pytest.approx(backward, rel=1e-12)


def config_of(arch="mixtral", **changes):
    return small_config(**{**FAMILIES[arch], **changes})


SHARED = {"model__n_heads": 4, "model__n_kv_heads": 4}
CASES = {
    "two ranks": (2, layout(expert=2), {}),
    "three ranks, sharded": (3, layout(expert=3, zero=3), {}),
    "an expert a rank": (6, layout(expert=6, zero=1), {}),
    "replicas with fewer microbatches": (4, layout(expert=2, zero=2), {"train__global_batch": 7}),
    "ranks without a microbatch": (8, layout(expert=2), {"train__global_batch": 9}),
    "a pipeline with fewer": (4, layout(2, expert=2), {"train__global_batch": 5}),
    "zero bubble": (4, layout(2, "zero-bubble", expert=2), {}),
    "interleaved": (4, layout(2, "interleaved", expert=2, chunks=2), {}),
    "tensor parts": (4, layout(expert=2, tensor=2), {"model__tensor_parts": 2, **SHARED}),
    "sequence parts": (8, layout(expert=2, context=2, zero=3), {"model__sequence_parts": 4, **SHARED}),
    "all axes": (8, layout(expert=2, context=2, tensor=2), {"model__sequence_parts": 2, "model__tensor_parts": 2, **SHARED}),
    "three of six, in parts": (6, layout(expert=3, context=2), {"model__sequence_parts": 2, **SHARED}),
    "muon": (4, layout(expert=2, zero=1), {"train__optimizer": "muon"}),
    "adafactor": (4, layout(expert=2, zero=3), {"train__optimizer": "adafactor"}),
    "bfloat16, recomputed": (4, layout(expert=2, zero=3), {"train__dtype": "bfloat16", "train__recompute": "block"}),
}


@pytest.mark.parametrize("case", CASES)
def test_divided_experts_have_the_bits_of_the_serial_run(case):
    size, axes, changes = CASES[case]
    assert_equals_serial(size, config_of(**axes, **changes))


@pytest.mark.parametrize(("family", "axes"), [("qwen3-moe", layout(expert=3, zero=2)), ("mixtral", layout(3, expert=2))])
def test_thirty_steps_have_the_bits_of_the_serial_run(family, axes):
    assert_equals_serial(6, config_of(family, model__dropout=0.1, train__steps=30, **axes), steps=30)


def test_rank_holds_its_experts_alone():
    def body(comm):
        model = build_train_model(config_of(**layout(expert=3)), comm)
        held = {x.expert for flat in model.flats.values() for _, x in flat.layout.spans.values()} - {None}
        assert held == set(model.experts.local_experts)
        experts = sum(x.numel for x in select_owned(model.layouts) if x.expert is not None)
        shared = sum(x.numel for x in select_owned(model.layouts) if x.expert is None)
        assert model.local_numel == shared + experts // 3
        sums = {key: vector.tensor.numel() for key, vector in model.sums.items()}
        assert sums[0, True] < 1.05 * experts / 3
        return held

    assert sorted(expert for own in run_ranks(3, body) for expert in own) == list(range(6))


def test_evaluation_and_generation_with_divided_experts_are_those_of_one_rank():
    settings = GenerateConfig(max_tokens=9, temperature=1.0)

    def body(comm):
        model = build_train_model(config_of(**layout(expert=comm.size if comm.size < 4 else 2)), comm)
        train_step(model, RandomTokens(model.config), 0)
        return eval_loss(model, 5), generate(model, {0: [1, 2, 3], 1: [7]}, settings, eos=-1)

    ((loss, texts),) = run_ranks(1, body)
    for size in (2, 3, 4):
        for other_loss, other_texts in run_ranks(size, body):
            assert (other_loss, other_texts) == (loss, texts)


def test_experts_that_are_frozen_are_divided_too():
    config = config_of(model__lora_rank=2, **layout(expert=2, zero=3))
    numbers, tensors = train_on_threads(2, config)
    expected, whole = train_on_threads(1, config_of(model__lora_rank=2))
    assert numbers == expected
    assert all(torch.equal(x, whole[name]) for name, x in tensors.items())


def test_load_of_experts_and_ranks_is_logged_and_does_not_depend_on_the_layout(tmp_path):
    data, mixture = write_tokens(tmp_path), {"model__arch": "mixtral", "model__n_experts": 4, "run__log_every": 2}

    def logged(size, name, **changes):
        config = tiny_config(data, tmp_path / name, **mixture, train__steps=4, **changes)
        run_ranks(size, lambda comm: train(config, comm))
        return [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "expert_share" in row]

    alone = logged(1, "alone")
    assert len({tuple(row["expert_share"]) for row in alone}) == len(alone) >= 2
    assert all(sum(row["expert_share"]) == pytest.approx(1, abs=1e-5) and "expert_rank_share" not in row for row in alone)
    for size, name, changes in (
        (4, "experts", layout(expert=2)),
        (2, "stages", layout(2)),
        (2, "recomputed", {**layout(expert=2), "train__recompute": "block"}),
    ):
        rows = logged(size, name, **changes)
        assert [row["expert_share"] for row in rows] == [row["expert_share"] for row in alone]
        for row in rows if name == "experts" else ():
            a, b, c, d = row["expert_share"]
            assert row["expert_rank_share"] == pytest.approx([a + b, c + d], abs=2e-6)
