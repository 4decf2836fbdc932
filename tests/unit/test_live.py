"""Live view of a run in a terminal: text and loss curve."""

import io
from unittest import mock

import pytest
from rich.console import Console

from mpilm.telemetry.live import LiveView, draw_curve

START = {
    "event": "start", "step": 0, "time": 1000.0, "ranks": 2, "layout": {"data": 1, "pipeline": 2, "zero": 3},
    "predicted_memory_bytes": 300 << 20,
}  # fmt: skip
STOPPED = {"event": "stopped", "step": 100, "time": 1100.0, "why": "stopped after step 100, as its stop file asked"}
RANKS = {
    "memory_bytes": [100 << 20, 250 << 20],
    "rank_s": {
        "compute": [1.0, 1.9], "bubble": [0.8, 0.0], "communication": [0.1, 0.0], "data": [0.0, 0.0], "optimizer": [0.1, 0.1],
    },
}  # fmt: skip


def step(number, loss=3.0, **more):
    return {
        "step": number, "time": 1000.0 + number, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "step_s": 2.0,
        "tokens_per_s": 5000.0, **more,
    }  # fmt: skip


def render(rows, now=1010.0, save_every=10):
    view = LiveView("runs/a", 100, save_every)
    for row in rows:
        view.update(row)
    file = io.StringIO()
    with mock.patch("time.time", return_value=now):
        Console(file=file, width=100).print(view)
    return file.getvalue()


def test_live_view_without_rows_says_so():
    assert "no rows yet" in render([])


def test_live_view_shows_progress_speed_memory_and_events():
    rows = [
        START, step(1, 4.0), {"step": 2, "time": 1002.0, "eval_loss": 3.5}, {"step": 2, "time": 1002.0, "eval_loss": 3.75},
        step(3, mfu=0.42, **RANKS), {"event": "saved", "step": 3, "time": 1003.0},
    ]  # fmt: skip
    screen = render(rows)
    for text in (
        "runs/a  2 ranks, pipeline 2, ZeRO-3", "step 3/100", "3m14s left", "3.0000", "3.7500 at step 2, best 3.5000",
        "5,000 tokens/s", "2 s per step", "MFU 42.0%", "compute 72%   bubble 20%", "in 7 steps, 14s",
        "no rank is clearly slower than most", "at most 250 MiB per rank, 300 MiB predicted",
        "started on 2 ranks at step 0", "saved step 3", " 4.000", " 3.000",
    ):  # fmt: skip
        assert text in screen, screen


def compute_rows(rows, every=10):
    others = {name: [0.0] * len(rows[0]) for name in ("bubble", "communication", "data", "optimizer")}
    return [
        step(max(1, i * every), memory_bytes=[1] * len(seconds), rank_s={"compute": seconds, **others})
        for i, seconds in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("every", "rows", "text"),
    [
        (10, [[1.0, 1.0], [1.0, 1.9], [1.0, 1.9]], "rank 1 computes 1.9 times as long as the other rank"),  # within 20 steps
        (4, [[1.0, 1.05, 1.5]] * 5, "rank 2 computes 1.4 times as long as most"),
        (20, [[9.0, 1.0, 1.0]] + [[1.0, 1.0, 1.5]] * 2, "rank 2 computes 1.5 times as long as most"),
        (10, [[1.0, 1.9], [1.0, 1.9]], "no rank is clearly slower"),  # 9 steps
        (1, [[1.0, 1.9]] * 10, "no rank is clearly slower"),
        (10, [[1.0, 1.9], [1.9, 1.0], [1.0, 1.9], [1.9, 1.0]], "no rank is clearly slower"),  # noise of ranks that share cores
        (10, [[1.0, 0.8, 0.9, 1.2, 1.3]] * 9, "no rank is clearly slower"),  # rank 4 differs as the others do
        (10, [[1.0, 1.9]] * 3 + [[1.0, 1.1]], "no rank is clearly slower"),  # any more
        (10, [[1.0]] * 9, "no rank is clearly slower"),
    ],
)
def test_live_view_names_a_rank_that_is_slow_in_several_rows(every, rows, text):
    assert text in render([START, *compute_rows(rows, every)])
    assert "no rank is clearly slower" in render([*compute_rows(rows, every), START, *compute_rows(rows[:1])])


def test_live_view_silent_ended_and_resumed_run_shows_its_state():
    rows = [START, step(50)]
    assert "1m40s left" in render(rows, 1051.0)
    assert "no update for 5m50s" in render(rows, 1400.0)
    rows.append({"event": "end", "step": 100, "time": 1100.0})
    assert "done" in render(rows, 9999.0)
    rows.append({**START, "step": 100})
    assert "done" not in render(rows, 1051.0)
    rows.append(STOPPED)
    assert "stopped\n" in render(rows, 9999.0)
    assert "as its stop file asked" in render(rows, 9999.0)


def test_live_view_stopped_run_keeps_the_last_memory():
    assert "at most 250 MiB per rank" in render([START, step(3, **RANKS), STOPPED])


@pytest.mark.parametrize("row", [{"event": "start"}, {"event": "saved", "time": 1.0}, {"loss": 1.5}, {"eval_loss": 1.5}])
def test_live_view_incomplete_row_is_ignored(row):
    assert render([START, step(3), row]) == render([START, step(3)])


@pytest.mark.parametrize("values", [[], [1.0], [float("nan"), 2.0]])
def test_draw_curve_too_few_values_is_empty(values):
    assert draw_curve(values) == [""] * 4


def test_draw_curve_falling_values_runs_from_top_left_to_bottom_right():
    lines = draw_curve([8.0, 6.0, 4.0, 2.0, float("inf"), 0.0], columns=3, rows=2)
    assert lines == ["⠹⣄⠀ 8.000", "⠀⠘⡆ 0.000"]  # dots at heights 7, 5, 4, 2, 0 of 7, joined upwards


def test_draw_curve_many_values_fills_the_width():
    lines = draw_curve(range(10_000), columns=10, rows=3)
    assert [len(line.split(" ")[0]) for line in lines] == [10, 10, 10]
    assert "⠀" not in (lines[2][0], lines[0][9])
