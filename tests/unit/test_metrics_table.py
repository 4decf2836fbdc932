"""metrics.jsonl as arrays: every number of every row, whatever else is in the file."""

import json

import numpy as np

from mpilm.telemetry.metrics import COLUMNS, EVALUATION_COLUMNS, parse_rows, read_metrics_table

STEP = {"time": 5.0, "tokens": 64, "loss": 3.25, "grad_norm": 0.5, "lr": 1e-3, "step_s": 0.5, "tokens_per_s": 128.0, "mfu": 0.3}
RANKS = {"memory_bytes": [1, 2], "rank_s": {"compute": [0.25, 0.5]}}


def to_lines(*rows):
    return [json.dumps(row).encode() + b"\n" for row in rows]


def test_rows_are_parsed_without_per_rank_values():
    rows = [{"step": 3, **STEP, **RANKS}, {"step": 4, **STEP, "extra": 'text, "rank_s": 3', **RANKS}, {**RANKS, "loss": 2.0}]
    parsed = parse_rows([*to_lines(*rows), b'{"loss": 1\n', b'"step": 3}\n', b"[" * 100_000 + b"\n"])
    assert parsed == [{"step": 3, **STEP}, {"step": 4, **STEP, "extra": rows[1]["extra"]}, rows[2]]


def test_rows_with_other_keys_are_in_the_columns(tmp_path):
    steps = [{"step": step, **STEP, **RANKS} for step in range(1, 2000)]
    del steps[50]["mfu"]
    steps[60] = dict(reversed(steps[60].items()))
    steps[70]["new"] = steps[80]["loss"] = "text"
    evaluation, event = {"step": 20, "time": 7.0, "eval_loss": 3.75}, {"event": "start", "step": 0, "hosts": "none", "ranks": 2}
    (tmp_path / "m").write_bytes(b"".join(to_lines(event, *steps[:90], evaluation, *steps[90:])))
    table = read_metrics_table(tmp_path / "m")
    for key in COLUMNS:
        expected = [np.nan if isinstance(row.get(key, "none"), str) else row[key] for row in steps]
        np.testing.assert_array_equal(table.columns[key], expected)
    assert table.evaluations.tolist() == [[evaluation[key] for key in EVALUATION_COLUMNS]]
    assert table.events == ({"event": "start", "step": 0, "ranks": 2},)
    assert 380 < len(table.samples) <= 400
    assert all(row in steps for row in table.samples)
    assert (table.samples[0]["step"], np.ptp([row["step"] for row in table.samples]) > 1980) == (1, True)


def test_lines_that_are_not_rows_are_counted(tmp_path):
    lines = [
        *to_lines({"step": 1, **STEP}),
        b"[1, 2]\nnot json\n\0\0\n",
        b'{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 77.125, "mem',
    ]
    (tmp_path / "m").write_bytes(b"".join(lines))
    table = read_metrics_table(tmp_path / "m")
    assert (table.columns["loss"].tolist(), table.unreadable, table.truncated) == ([3.25, 2.5], 3, True)
