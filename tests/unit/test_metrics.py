"""metrics.jsonl: rows up to a checkpoint stay byte for byte, later ones are removed; followers see new rows."""

import json

import pytest
from helpers import read_metrics

from mpilm.errors import FileError
from mpilm.telemetry.metrics import MetricsFollower, MetricsWriter, length_through_step

ROWS = [json.dumps({"step": step, "loss": 1 / (step + 1)}).encode() + b"\n" for step in (0, 1, 2, 3, 4)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps(rows):
    return [row["step"] for row in rows]


@pytest.mark.parametrize("step", [0, 2, 4, 9])
def test_metrics_writer_resume_keeps_rows_through_the_step(path, step):
    path.write_bytes(b"".join(ROWS))
    row = {"step": step, "loss": 0.1 + 0.2}
    writer = MetricsWriter(path, step)
    writer.write(row)
    assert path.read_bytes() == b"".join(ROWS[: step + 1]) + json.dumps(row).encode() + b"\n"  # at once
    assert read_metrics(path)[-1] == row  # with every bit of the float
    writer.close()


def test_metrics_writer_of_a_removed_file_raises(path):
    writer = MetricsWriter(path, 0)
    writer.write({"step": 1})
    path.unlink()
    with pytest.raises(FileError, match=r"metrics\.jsonl has been removed while the run was writing it"):
        writer.write({"step": 2})
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 2, 12, len(ROWS[4]) - 1])
def test_metrics_writer_cut_last_line_removes_it(path, cut):
    path.write_bytes(b"".join(ROWS)[:-cut])
    assert steps(read_metrics(path)) == [0, 1, 2, 3]
    MetricsWriter(path, 4).close()
    assert path.read_bytes() == b"".join(ROWS[:4])


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 40 + b"\n", b"{\n", b"\xff\xfe\n", b"[1, 2]\n", b'{"step": "x"}\n', b"[" * 9999 + b"\n"]
)
def test_metrics_line_that_is_no_row_affects_no_other(path, rubbish):
    path.write_bytes(ROWS[0] + rubbish + ROWS[1] + ROWS[2])
    assert steps(read_metrics(path)) == steps(MetricsFollower(path).read()[0]) == [0, 1, 2]
    MetricsWriter(path, 1).close()
    assert path.read_bytes() == ROWS[0] + rubbish + ROWS[1]


def test_length_through_step_row_without_step_belongs_to_the_start():
    assert length_through_step([b'{"event": "note"}\n'], 0) == 18


def test_metrics_follower_growing_file_returns_new_complete_rows(path):
    follower = MetricsFollower(path)
    assert follower.read() == ([], False)  # the run has not started
    path.write_bytes(ROWS[0] + ROWS[1][:5])
    assert follower.read() == ([{"step": 0, "loss": 1.0}], False)
    path.write_bytes(ROWS[0] + ROWS[1] + ROWS[2])
    assert steps(follower.read()[0]) == [1, 2]
    assert follower.read() == ([], False)


@pytest.mark.parametrize(
    "row", [b"", b'{"step": 0, "event": "start", "why": "a resume, whose long row hides the removed ones"}\n']
)
def test_metrics_follower_removed_rows_restart(path, row):
    path.write_bytes(ROWS[0] + ROWS[1])
    follower = MetricsFollower(path)
    follower.read()
    path.write_bytes(ROWS[0] + row)
    rows, restarted = follower.read()
    assert restarted
    assert steps(rows) == [0, 0][: 1 + bool(row)]
