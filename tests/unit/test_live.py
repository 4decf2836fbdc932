"""The view of a run in a terminal: what the rows say, in words and as a curve."""

import io

import pytest
from rich.console import Console

from mpilm.telemetry.live import Glance, curve

START = {
    "event": "start", "step": 0, "time": 1000.0, "ranks": 2, "layout": {"data": 1, "pipeline": 2, "zero": 3},
    "predicted_memory_bytes": 300 << 20,
}  # fmt: skip


def step(number, loss=3.0, **more):
    return {
        "step": number, "time": 1000.0 + number, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "step_s": 2.0,
        "tokens_per_s": 5000.0, **more,
    }  # fmt: skip


def shown(glance, now=1010.0):
    file = io.StringIO()
    Console(file=file, width=100).print(glance.view(now))
    return file.getvalue()


def test_a_run_without_rows():
    assert "no rows yet" in shown(Glance("runs/a", 100, 10))


def test_what_a_person_wants_to_know():
    glance = Glance("runs/a", 100, 10)
    ranks = {
        "compute": [1.0, 1.9],
        "bubble": [0.8, 0.0],
        "communication": [0.1, 0.0],
        "data": [0.0, 0.0],
        "optimizer": [0.1, 0.1],
    }
    for row in (
        START, step(1, 4.0), {"step": 2, "time": 1002.0, "eval_loss": 3.5}, {"step": 2, "time": 1002.0, "eval_loss": 3.75},
        step(3, mfu=0.42, memory_bytes=[100 << 20, 250 << 20], rank_s=ranks), {"event": "saved", "step": 3, "time": 1003.0},
    ):  # fmt: skip
        glance.see(row)
    said = shown(glance)
    for words in (
        "runs/a  2 ranks, pipeline 2, ZeRO-3", "step 3/100", "3m14s left", "3.0000", "3.7500 at step 2, best 3.5000",
        "5,000 tokens/s", "2 s a step", "MFU 42.0%", "compute 72%   bubble 20%", "rank 1 computes 1.9 times as long as most",
        "250 MiB a rank at most, 300 MiB predicted", "in 7 steps, 14s", "saved step 3", " 4.000", " 3.000",
    ):  # fmt: skip
        assert words in said, said


def test_a_run_that_is_silent_and_one_that_is_done():
    glance = Glance("runs/a", 100, 0)
    glance.see(START)
    glance.see(step(50))
    assert "1m40s left" in shown(glance, 1051.0)
    assert "no word for 5m50s" in shown(glance, 1400.0)
    glance.see({"event": "end", "step": 100, "time": 1100.0})
    assert "done" in shown(glance, 9999.0)
    glance.see({**START, "step": 100})  # taken up again
    assert "done" not in shown(glance, 1051.0)
    glance.see({"event": "stopped", "step": 100, "time": 1100.0, "why": "stopped after step 100, as its stop file asked"})
    assert "stopped\n" in shown(glance, 9999.0)
    assert "as its stop file asked" in shown(glance, 9999.0)


@pytest.mark.parametrize("values", [[], [1.0], [float("nan"), 2.0]])
def test_too_little_for_a_curve(values):
    assert curve(values) == [""] * 4


def test_a_falling_curve_is_drawn_from_the_top_left_to_the_bottom_right():
    lines = curve([8.0, 6.0, 4.0, 2.0, float("inf"), 0.0], columns=3, rows=2)
    assert lines == ["⠹⣄⠀ 8.000", "⠀⠘⡆ 0.000"]  # dots at heights 7, 5, 4, 2, 0 of 7, joined upwards


def test_a_curve_of_many_values_has_the_width_asked_for():
    lines = curve(range(10_000), columns=10, rows=3)
    assert [len(line.split(" ")[0]) for line in lines] == [10, 10, 10]
    assert lines[2][0] != "⠀"
    assert lines[0][9] != "⠀"
