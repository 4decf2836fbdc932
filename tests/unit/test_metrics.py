"""metrics.jsonl: rows that belong to a checkpoint stay byte for byte, all later ones go."""

import json

import pytest

from mpilm.telemetry.metrics import Metrics, Tail, kept_bytes, read_rows

ROWS = [json.dumps({"step": step, "loss": 1 / (step + 1)}).encode() + b"\n" for step in (0, 1, 2, 3, 4)]
WHOLE = b"".join(ROWS)


@pytest.mark.parametrize("step", [0, 2, 4, 9])
def test_rows_up_to_the_step_are_kept(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE)
    metrics = Metrics(path, step)
    metrics.write({"step": step, "event": "start"})
    metrics.close()
    assert path.read_bytes() == b"".join(ROWS[: step + 1]) + json.dumps({"step": step, "event": "start"}).encode() + b"\n"


@pytest.mark.parametrize("cut", range(1, len(ROWS[4])))
def test_a_cut_last_line_goes(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE[:-cut])
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]
    Metrics(path, 4).close()
    assert path.read_bytes() == b"".join(ROWS[:4])


@pytest.mark.parametrize("rubbish", [b"\0" * 40 + b"\n", b"{\n", b"\xff\xfe\n", b"[1, 2]\n", b'{"step": "x"}\n'])
def test_a_line_that_is_no_row_takes_none_away(tmp_path, rubbish):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS[0] + rubbish + ROWS[1] + ROWS[2])
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
    Metrics(path, 1).close()
    assert path.read_bytes() == ROWS[0] + rubbish + ROWS[1]


def test_a_row_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write({"step": 0, "loss": 0.1})
    assert read_rows(path) == [{"step": 0, "loss": 0.1}]
    metrics.close()


def test_floats_come_back_with_every_bit(tmp_path):
    metrics = Metrics(tmp_path / "m", 0)
    metrics.write({"loss": 0.1 + 0.2})
    metrics.close()
    assert read_rows(tmp_path / "m")[0]["loss"] == 0.1 + 0.2


def test_rows_without_a_step_belong_to_the_start():
    assert kept_bytes(b'{"event": "note"}\n', 0) == 18


def test_a_tail_gives_whole_rows_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)  # the run has not begun
    path.write_bytes(ROWS[0] + ROWS[1][:5])
    assert tail.read() == ([{"step": 0, "loss": 1.0}], False)
    path.write_bytes(ROWS[0] + ROWS[1] + ROWS[2])
    assert [row["step"] for row in tail.read()[0]] == [1, 2]
    assert tail.read() == ([], False)
    path.write_bytes(ROWS[0] + ROWS[1])  # taken up again from an earlier step
    rows, anew = tail.read()
    assert anew
    assert [row["step"] for row in rows] == [0, 1]


def test_a_tail_notices_that_rows_have_gone_also_where_the_file_is_longer_then(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS[0] + ROWS[1])
    tail = Tail(path)
    tail.read()
    path.write_bytes(ROWS[0] + b'{"step": 0, "event": "start", "why": "a resume, the row of which is long"}\n')
    rows, anew = tail.read()
    assert anew
    assert [row["step"] for row in rows] == [0, 0]


def test_a_tail_passes_over_what_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS[0] + b'[1, 2]\nrubbish\n{"step": "x"}\n' + ROWS[1])
    assert [row["step"] for row in Tail(path).read()[0]] == [0, 1]
