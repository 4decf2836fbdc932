"""Microbatches assigned by speed: any contiguous blocks give the same bits, and slow ranks get fewer."""

import threading
from itertools import product

import pytest
from helpers import read_metrics
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    assemble,
    build_train_model,
    differing,
    layout,
    newest_tensors,
    owned_state,
    serial_config,
    small_config,
    train_to_end,
)
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.config.check import check_config
from mpilm.config.settings import override
from mpilm.engine.recheck import Recheck
from mpilm.engine.step import train_step
from mpilm.errors import ConfigError
from mpilm.ops.tree import balance_blocks, even_blocks
from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.trainer import hooks, loop
from mpilm.verification.layouts import RandomTokens

BLOCKS = ([(0, 6), (6, 8)], [(0, 1), (1, 8)], [(0, 3), (3, 8)])


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=4), st.integers(4, 12))
def test_no_other_division_is_faster(seconds, total):
    """Against all divisions."""

    def slowest(counts):
        return max(count * s for count, s in zip(counts, seconds))

    blocks = balance_blocks(seconds, total)
    assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])]
    assert blocks[-1][1] == total
    counts = product(range(1, total + 1), repeat=len(seconds))
    best = min(slowest(each) for each in counts if sum(each) == total)
    assert slowest([b - a for a, b in blocks]) == pytest.approx(best, rel=1e-12)


def test_equal_ranks_get_equal_numbers():
    assert balance_blocks([0.1] * 3, 9) == even_blocks(3, 9)
    assert balance_blocks([0.1, 0.3], 8) == [(0, 6), (6, 8)]
    assert balance_blocks([1.0, 100.0, 1.0], 5) == [(0, 2), (2, 3), (3, 5)]  # everyone has one


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (2, layout(zero=1)),
        (2, layout(reduce="messages")),
        (4, layout(pipeline=2)),
        (4, layout(pipeline=2, schedule="zero-bubble", zero=1)),
        (4, {**layout(tensor=2), "model__n_kv_heads": 2, "model__tensor_parts": 2}),
        (2, {"train__optimizer": "muon"}),
    ],
)
def test_every_division_has_the_bits_of_one_rank(size, changes, blocks):
    """Microbatches change hands after the first step, and again after the second."""
    config = small_config(**changes)

    def body(comm):
        model, source, numbers = build_train_model(config, comm), RandomTokens(config), []
        recheck = Recheck(model, 1)
        for step, each in enumerate([blocks, even_blocks(2, 8), None]):
            result = train_step(model, source, step, recheck=recheck)
            numbers += [result.loss, result.grad_norm]
            if each is not None:
                model.assign_microbatches(each)
        return numbers, owned_state(model)

    outcomes = run_ranks(size, body, timeout_s=60.0)

    def serial(comm):
        model, source = build_train_model(serial_config(config), comm), RandomTokens(config)
        results = [train_step(model, source, step) for step in range(3)]
        return [x for result in results for x in (result.loss, result.grad_norm)], owned_state(model)

    ((numbers, state),) = run_ranks(1, serial)
    assert outcomes[0][0] == numbers
    assert differing(assemble([state for _, state in outcomes]), assemble([state])) == []


def test_slow_rank_gets_fewer_microbatches(tmp_path, monkeypatch):
    """Rank 1 of two takes three times as long for a microbatch in the first 6 steps, and then as long as the other."""
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))
    data, forward, local = write_tokens(tmp_path / "data"), ModelStage.forward, threading.local()
    settings = {"train__steps": 16, "checkpoint__every": 14, "run__eval_every": 0, "train__global_batch": 16}
    expected = train_to_end(tiny_config(data, tmp_path / "even", **settings), 2)
    config = tiny_config(data, tmp_path / "run", **settings, parallel__deal="measured")

    def count_forward(self, microbatch):
        if microbatch < len(self.inputs.microbatch_ids):
            local.compute_s += 0.3 if local.rank == 1 and self.inputs.step < 6 else 0.1
        forward(self, microbatch)

    def read_seconds(spans, pipelined):
        seconds, local.compute_s = local.compute_s, 0.0
        return {"compute": seconds}

    def body(comm):
        local.rank, local.compute_s = comm.rank, 0.0
        loop.train(config, comm)

    monkeypatch.setattr(ModelStage, "forward", count_forward)
    monkeypatch.setattr(hooks, "break_down", read_seconds)
    run_ranks(2, body)
    assert newest_tensors(config) == expected
    events = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row.get("event") == "balanced"]
    assert [(row["step"], row["why"].partition(" microbatches on")[0]) for row in events] == [(6, "6, 2"), (14, "4, 4")]


@pytest.mark.parametrize(
    "changes", [{"parallel__zero": 2}, {"parallel__context": 2}, {"parallel__sync_every": 2}, {"train__reproducible": False}]
)
def test_layouts_without_a_choice_are_refused(changes):
    with pytest.raises(ConfigError, match=r"--parallel\.deal measured does not work with"):
        check_config(override(small_config(run__eval_every=0), parallel__deal="measured", **changes))
