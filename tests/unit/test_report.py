"""The report: whole and well-formed whatever is in the folder, and what it says is what happened."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.errors import ConfigError, FileError
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import schedule
from mpilm.parallel.pipeline.simulate import simulate
from mpilm.telemetry.report import page, png, words
from mpilm.telemetry.report.charts import curves, log_ticks, short, ticks
from mpilm.telemetry.report.ranks import mean_parts, parts_of, peak_bytes, stragglers
from mpilm.telemetry.report.read import read_run
from mpilm.telemetry.report.rows import COLUMNS, OF_RANKS, parse_heads
from mpilm.telemetry.report.thin import m4, means
from mpilm.telemetry.report.timeline import traced, waits

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br", "img", "input", "hr"}
CONFIG = """[model]
arch = "llama"
n_layers = 4
d_model = 192

[train]
steps = 40
lr = 0.003
dtype = "float32"
"""


def start(ranks=2, step=0, time=1000.0, pipeline=1, **more):
    layout = {"pipeline": pipeline, "data": ranks // pipeline, "context": 1, "tensor": 1, "zero": 0, "schedule": "1f1b"}
    return {
        "event": "start", "step": step, "time": time, "ranks": ranks, "layout": layout, "parameters": 1234567,
        "predicted_memory_bytes": 300 << 20, "predicted_memory_on_rank_bytes": [300 << 20] * ranks, "threads": 1,
        "device": "cpu", "versions": {"mpilm": "0.1.0", "torch": "2.13.0"}, "hosts": [f"node{r}" for r in range(ranks)],
        "command": "mpirun -n 2 python -m mpilm.train --run.dir 'a b'", "peak_flops": 2e11, "peak_source": "measured",
        **more,
    }  # fmt: skip


def logged(step, ranks=2, loss=None, compute=None):
    seconds = {"compute": compute or [0.3] * ranks, "bubble": [0.0] * ranks, "communication": [0.05] * ranks}
    return {
        "step": step, "time": 1000.0 + step, "tokens": 4096 * step, "loss": 3 + 4 / step if loss is None else loss,
        "grad_norm": 0.5, "lr": 1e-3, "step_s": 0.5, "tokens_per_s": 8192.0, "mfu": 0.3,
        "memory_bytes": [200 << 20] * ranks, "rank_s": {**seconds, "data": [0.01] * ranks, "optimizer": [0.04] * ranks},
    }  # fmt: skip


def whole(ranks=2, steps=40):
    rows = [start(ranks), *(logged(step, ranks) for step in range(1, steps + 1))]
    rows.insert(21, {"step": 20, "time": 1020.5, "eval_loss": 3.75})
    rows.insert(22, {"event": "saved", "step": 20, "time": 1020.7, "took_s": 0.8, "waited_s": 0.1})
    return [*rows, {"event": "end", "step": steps, "time": 1050.0, "peak_memory_on_rank_bytes": [310 << 20] * ranks}]


@pytest.fixture
def made(tmp_path):
    def make(rows=None, name="run", config=CONFIG, trace=None, tail=""):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if rows is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        if config is not None:
            (folder / "config.toml").write_text(config)
        if trace is not None:
            (folder / "trace-7-8.json").write_text(trace if isinstance(trace, str) else json.dumps(trace))
        return folder

    return make


def trace_of(name="1f1b", p=2, v=1, m=4, replicas=1, cost=None):
    """A trace of two steps in which everything takes as long as it should, and the timeline it was made from."""
    costs = cost or {"F": 0.02, "B": 0.04, "I": 0.02, "W": 0.02, "REDUCE": 0.005}
    programs = [lower(actions, p * v) for actions in schedule(name, p, v, m)]
    line = simulate(programs, lambda kind, stage: costs.get(kind, 0.0))
    events = []
    for step in (7, 8):
        for place, program in enumerate(programs):
            for replica in range(replicas):
                rank, ended_s, seen = place * replicas + replica, 0.0, iter(e for e in line.by_rank[place] if not e.waiting)
                for i, action in enumerate(program):
                    start_s, length_s = ended_s, 0.0
                    if "SEND" not in action.kind and "RECV" not in action.kind:
                        event = next(seen)
                        start_s, length_s = event.start_s, event.end_s - event.start_s
                        ended_s = event.end_s
                    events.append({
                        "ph": "X", "pid": rank, "ts": 1e6 * (step + start_s) + 1e-3 * i, "dur": 1e6 * length_s,
                        "name": str(action), "args": {"step": step, "action": str(action)},
                        "cat": {"F": "forward", "REDUCE": "reduce", "SEND_F": "send", "SEND_B": "send",
                                "RECV_F": "receive", "RECV_B": "receive"}.get(action.kind, "backward"),
                    })  # fmt: skip
                events.append({"ph": "X", "pid": rank, "ts": 1e6 * step, "dur": 2e3, "name": "receive", "cat": "wait",
                               "args": {"step": step, "axis": "pipeline", "bytes": 1 << 20}})  # fmt: skip
    layout = {"pipeline": p, "data": replicas, "context": 1, "tensor": 1}
    return {"traceEvents": events, "mpilm": {"steps": [7, 8], "ranks": p * replicas, "layout": layout}}, line


class Checked(HTMLParser):
    """Every tag closes in order, no id is there twice, and nothing is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.words = [], [], []
        self.inputs(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        twice = {each for each in self.ids if self.ids.count(each) > 1}
        assert not twice, f"ids that are there twice: {twice}"

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "data", "action"):
                assert value.startswith(("#", "data:")), f"<{tag} {key}={value}> would be fetched"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            assert "http" not in data
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def report(*folders):
    return Checked(page.write(folders).read_text(encoding="utf-8"))


def test_all_that_is_asked_for_is_there(made):
    trace, _ = trace_of()
    text = report(made(whole(), trace=trace)).text
    for words_ in (
        "3.1000", "at step 40", "3.7500", "8,192", "30%", "500 ms", "Gradient norm", "Learning rate", "Throughput", "MFU",
        "compute", "communication", "optimizer", "checkpoint", "Predicted for the rank that needs most: 300 MiB",
        "it was 310 MiB, +3.3%", "No straggler", "checkpoint saved; took 0.8 s, training waited 0.1 s",
        "the end of the training",
        "mpirun -n 2 python -m mpilm.train --run.dir 'a b'", "d_model = 192", "2.13.0", "node0, node1", "bubble",
    ):  # fmt: skip
        assert words_ in text, f"{words_!r} is not in the report"
    assert "What is not in this report" not in text


def test_a_report_leaves_nothing_beside_it(made):
    folder = made(whole())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    page.write([folder])
    page.write([folder])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != page.NAME} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [row for row in rows if row.get("event") != "end"], "There is no end row"),
        (lambda rows: rows[1:], "has no start row"),
        (lambda rows: rows[:1], "No step has been logged yet."),
        (lambda rows: [], "No step has been logged yet."),
        (lambda rows: [{k: v for k, v in row.items() if k != "mfu"} for row in rows], "there is no MFU"),
        (lambda rows: [row for row in rows if "loss" not in row], "No step has been logged yet."),
    ],
)
def test_rows_that_are_missing(made, change, said):
    assert said in report(made(change(whole()))).text


def test_a_cut_last_line_is_left_out(made):
    run = read_run(made(whole()[:-1], tail='{"step": 41, "time": 1041.0, "loss": 77.125, "memory_bytes": [12'))
    assert run.rows.count == 40
    assert "The last line of metrics.jsonl is cut" in " ".join(run.missing)
    assert "77.12" not in page.page([run])


def test_lines_that_are_no_rows_are_counted(made):
    folder = made(whole(), tail='[1, 2]\nnot json\n\x00\x00\n{"step": 50, "loss": 2.5}\n')
    run = read_run(folder)
    assert run.rows.columns["loss"][-1] == 2.5
    assert "3 lines of metrics.jsonl cannot be read" in " ".join(run.missing)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.toml"])
def test_a_file_that_is_missing(made, missing):
    folder = made(whole())
    (folder / missing).unlink()
    assert f"There is no {missing}" in report(folder).text


def test_files_that_are_broken(made):
    folder = made(whole(), config="[model\n", trace='{"traceEvents": [{"ph"')
    text = report(folder).text
    assert "config.toml: is not valid TOML" in text
    assert "trace-7-8.json cannot be read: it is not whole" in text


def test_an_older_version(made):
    old = start()
    for key in ("hosts", "command", "peak_flops", "peak_source", "predicted_memory_on_rank_bytes"):
        del old[key]
    rows = [old]
    for step in range(1, 6):
        row = logged(step)
        for key in ("mfu", "memory_bytes", "rank_s"):
            del row[key]
        rows.append(row | {"rank_busy_s": [0.45, 0.4]})
    text = report(made(rows)).text
    assert "This run wrote down computing alone" in text
    assert "--config" in text
    assert "The memory that was used was not written down" in text


def test_losses_that_are_no_numbers(made):
    rows = whole()
    rows[5]["loss"], rows[6]["loss"], rows[7]["grad_norm"] = float("nan"), float("inf"), None
    text = report(made(rows)).text
    assert "2 logged losses are no finite numbers, first at step 5." in text


def test_nothing_but_numbers_that_are_none(made):
    rows = [start(), *(logged(step, loss=float("nan")) for step in range(1, 9))]
    assert "8 logged losses are no finite number" in report(made(rows)).text


@pytest.mark.parametrize("value", ["high", None, [1], {"a": 1}, True, 10**400, -(10**400)])
@pytest.mark.parametrize("key", ["step", "time", "loss", "step_s", "memory_bytes", "rank_s", "mfu"])
def test_values_of_another_kind(made, key, value):
    rows = whole()
    for row in rows[3:9]:
        row[key] = value
    text = report(made(rows)).text
    assert "3.1000" in text  # of the last row, which is as it should be
    assert "the end of the training" in text


@pytest.mark.parametrize("value", ["x", None, 3, [], {}, [None], {"pipeline": "two"}])
@pytest.mark.parametrize(
    "key", ["ranks", "layout", "versions", "hosts", "peak_flops", "parameters", "predicted_memory_bytes", "step", "time"]
)
def test_a_start_of_another_kind(made, key, value):
    trace, _ = trace_of()
    text = report(made([start() | {key: value}, *whole()[1:]], trace=trace)).text
    assert "3.1000" in text
    assert "the end of the training" in text


def test_what_is_written_is_text_and_not_markup(made):
    rows = whole()
    rows.insert(9, {"event": "skipped", "step": 9, "time": 1009.0, "why": "<script>alert(1)</script> \ud800", "since": 7})
    text = report(made(rows, name='<b onclick="x">&')).text
    assert "left out, from step 7: <script>alert(1)</script>" in text
    assert '<b onclick="x">&' in text


def test_runs_are_compared(made):
    first = made(whole(), "first")
    second = made(whole(4), "second", config=CONFIG.replace("0.003", "0.001"))
    checked = report(first, second)
    assert (first / page.COMPARED).exists()
    assert "train.lr 0.003 0.001" in checked.text
    assert "2 ranks (data 2) 4 ranks (data 4)" in checked.text
    assert "train.dtype float32" not in checked.text.split("Curves")[0]
    loss = curves([read_run(first), read_run(second)])[0]
    assert [(each.name, each.color) for each in loss.series] == [
        ("first: loss", 0), ("first: evaluation", 0), ("second: loss", 1), ("second: evaluation", 1),
    ]  # fmt: skip


def test_runs_that_are_alike(made):
    assert "Nothing that is known" in report(made(whole(), "a"), made(whole(), "b")).text


def test_many_ranks_are_few_lines(made):
    slow = [0.3] * 2000
    slow[1234] = 0.6
    rows = [start(2000), *(logged(step, 2000, compute=slow) for step in range(1, 5))]
    checked = report(made(rows))
    assert "mean of 2,000" in checked.text
    assert "rank 1234 node1234" in checked.text
    assert len(page.page([read_run(made(rows))])) < 150_000


def test_many_events_are_few_lines(made):
    rows = whole()
    saves = [{"event": "saved", "step": i, "time": 1000.0 + i, "took_s": 2.0, "waited_s": 0.25} for i in range(300)]
    skips = [{"event": "skipped", "step": i, "time": 1000.0 + i, "why": "spike", "since": i} for i in range(300)]
    run = read_run(made([*rows, *saves, *skips]))
    assert "301 checkpoints were saved; writing one took 2 s (median), 2 s at most" in words.saves(run)
    assert len(words.events(run)) == words.MANY + 1


def test_a_spike_of_one_step_is_drawn(made):
    rows = [start(), *(logged(step, loss=3.0) for step in range(1, 9001))]
    rows[4321]["loss"] = 8.25
    folder = made(rows)
    loss = curves([read_run(folder)])[0]
    faint = next(each for each in loss.series if each.style == "faint")
    assert len(faint.x) < 3300
    assert (faint.x[faint.y.argmax()], faint.y.max()) == (4321, 8.25)
    assert page.write([folder]).stat().st_size < 300_000


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 40))
def test_thinning_keeps_extremes(values, buckets):
    y = np.array(values)
    kept = m4(y, buckets)
    assert list(kept) == sorted(set(kept))
    assert len(kept) <= max(4 * buckets, 1)
    assert {0, len(y) - 1} <= set(kept)
    assert y[kept].min() == y.min()
    assert y[kept].max() == y.max()
    if len(y) > 4 * buckets:
        edges = np.linspace(0, len(y), buckets + 1).astype(int)
        for low, high in pairwise(edges.tolist()):
            inside = y[kept[(kept >= low) & (kept < high)]]
            assert (inside.min(), inside.max()) == (y[low:high].min(), y[low:high].max())


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300), st.integers(1, 50))
def test_means_are_of_everything(values, buckets):
    x, y = means(np.arange(len(values)), np.array(values), buckets)
    assert (np.diff(x) > 0).all()
    assert min(values) - 1e-9 <= y.min() <= y.max() <= max(values) + 1e-9
    if len(values) % buckets == 0:
        assert y.mean() == pytest.approx(np.mean(values), abs=1e-9)


def test_a_row_is_read_without_what_ranks_say():
    rows = [logged(3), logged(4) | {"extra": 'text, "memory_bytes": 3'}, start(), {"step": 5, "memory_bytes": [1], "loss": 2.0}]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    heads, unreadable = parse_heads(lines)
    assert unreadable == 0
    assert heads[0] == {key: value for key, value in rows[0].items() if key not in OF_RANKS}
    assert heads[1]["loss"] == rows[1]["loss"]
    assert heads[2] == rows[2]


def test_all_rows_are_in_the_columns(made):
    """Rows with other keys, in another order, are read as well as those that are alike."""
    rows = [logged(step) for step in range(1, 200)]
    del rows[50]["mfu"]
    rows[60] = dict(reversed(rows[60].items()))
    rows[70]["new"] = 3
    columns = read_run(made([start(), *rows])).rows.columns
    for key in COLUMNS:
        wanted = np.array([row.get(key, np.nan) for row in rows])
        np.testing.assert_array_equal(columns[key], wanted)


def test_parts_of_a_step_add_up(made):
    run = read_run(made(whole()))
    parts = mean_parts(run)
    assert sum(seconds[0] for part, seconds in parts.items() if part != "checkpoint") == pytest.approx(0.5)
    assert parts["other"] == pytest.approx([0.1, 0.1])
    assert parts["checkpoint"] == pytest.approx([0.1 / 40] * 2)


def test_ranks_that_changed_in_number(made):
    """A run taken up on other ranks is shown with those it has now."""
    rows = [start(4), *(logged(step, 4) for step in range(1, 9)), start(2, 8, 1008.5), *(logged(step) for step in range(9, 20))]
    run = read_run(made(rows))
    assert len(mean_parts(run)["compute"]) == 2
    text = report(run.folder).text
    assert "resumed on 2 ranks" in text
    assert "in 2 starts" in text


def test_a_broken_row_of_ranks_is_left_out():
    assert parts_of({"step_s": 1.0, "rank_s": {"compute": [1.0, 2.0], "data": [0.1]}}) is None
    assert parts_of({"step_s": 1.0, "rank_s": 7}) is None
    assert parts_of({"step_s": 1.0}) is None


def test_stragglers_are_named(made):
    rows = [start(4), *(logged(step, 4, compute=[0.3, 0.3, 0.3 + 0.2 * (step % 2), 0.31]) for step in range(1, 21))]
    run = read_run(made(rows))
    (slow,), looked_at = stragglers(run)
    assert (slow.rank, slow.host, slow.rows, looked_at) == (2, "node2", 10, 20)
    assert slow.times == pytest.approx(4 / 3)
    assert "1 rank computes clearly longer than most" in report(run.folder).text


def test_memory_without_an_end_is_what_was_seen(made):
    peak, how = peak_bytes(read_run(made(whole()[:-1])))
    assert peak.tolist() == [200 << 20] * 2
    assert how == "the highest use that was logged"


@pytest.mark.parametrize(("name", "p", "v"), [("1f1b", 2, 1), ("gpipe", 3, 1), ("interleaved", 2, 2), ("zero-bubble", 4, 1)])
def test_a_step_that_took_what_it_costs_is_the_simulated_one(name, p, v):
    trace, line = trace_of(name, p, v, replicas=2)
    step = traced(trace)
    assert (step.step, step.ranks) == (8, tuple(range(0, 2 * p, 2)))
    for timeline in (step.measured, step.simulated):
        assert timeline.step_s == pytest.approx(1000 * line.step_s, rel=1e-3)
        assert timeline.bubble == pytest.approx(line.bubble, abs=1e-3)
        assert timeline.chunks == v
    assert [[e.action for e in events] for events in step.measured.by_rank] == [
        [e.action for e in events if not e.waiting] for events in line.by_rank
    ]


def test_a_trace_that_lacks_a_message_is_not_simulated(made):
    trace, _ = trace_of()
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event["name"] != "0SEND_F1"]
    step = traced(trace)
    assert step.simulated is None
    assert "deadlock" in step.why
    assert "It cannot be simulated" in report(made(whole(), trace=trace)).text


def test_a_trace_of_one_rank_only(made):
    trace, _ = trace_of()
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event["pid"] == 0]
    assert "no step that all ranks of the first replica have traced" in report(made(whole(), trace=trace)).text


@pytest.mark.parametrize("trace", [[], {}, {"traceEvents": 3}, {"traceEvents": []}, {"traceEvents": [3, {"cat": "forward"}]}])
def test_traces_of_another_kind(made, trace):
    text = report(made(whole(), trace=trace)).text
    assert "Simulated:" not in text
    assert "trace-7-8.json holds no trace." in text or "The newest trace holds no step that all ranks" in text


def test_waits_are_a_step_and_rank():
    (found,) = waits(trace_of(p=2)[0])
    assert (found.axis, found.operation, found.calls, found.sent_bytes) == ("pipeline", "receive", 1, 1 << 20)
    assert found.mean_ms == pytest.approx(2.0)


def test_a_long_timeline_is_not_drawn(made):
    trace, _ = trace_of(p=4, m=800)
    folder = made(whole(), trace=trace)
    assert "too many to draw" in report(folder).text
    assert (folder / page.NAME).stat().st_size < 300_000


def test_ticks_are_round():
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.2, 7.7, 5) == pytest.approx([4, 5, 6, 7])
    assert ticks(2, 2, 5) == [2]
    assert log_ticks(0.6, 70) == [1, 2, 5, 10, 20, 50]
    assert log_ticks(0.06, 70) == pytest.approx([0.1, 0.3, 1, 3, 10, 30])
    assert [short(value) for value in (0, 0.25, 3e-4, 1250, 12500, 3.2e6, 1e-7)] == [
        "0", "0.25", "0.0003", "1,250", "12.5k", "3.2M", "1e-7",
    ]  # fmt: skip


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        page.write([tmp_path / "none"])
    with pytest.raises(FileError, match=r"neither metrics\.jsonl nor config\.toml"):
        page.write([tmp_path])
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_run_is_refused(made):
    with pytest.raises(FileError, match="is a file; write the folder of a run"):
        page.write([made(whole()) / "metrics.jsonl"])


def test_nothing_else_is_written_over(made, tmp_path):
    folder, mine = made(whole()), tmp_path / "mine.html"
    mine.write_text("my own page")
    with pytest.raises(FileError, match="is no report of mpilm"):
        page.write([folder], mine)
    assert mine.read_text() == "my own page"
    other = page.write([folder], tmp_path / "other.html")
    assert page.write([folder], other) == other
    with pytest.raises(FileError, match="is a folder"):
        page.write([folder], tmp_path)
    with pytest.raises(FileError, match="cannot be written: No such file or directory"):
        page.write([folder], tmp_path / "none" / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "other.html", "run"]


def test_plots_as_images(made, tmp_path):
    pytest.importorskip("matplotlib")
    trace, _ = trace_of()
    run = read_run(made(whole(), trace=trace))
    names = {path.name for path in png.save([run], tmp_path / "plots")}
    keys = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "step_time", "time", "memory", "timeline")
    assert names == {f"{key}.png" for key in keys}
    png.save([run], tmp_path / "plots")  # its own
    (tmp_path / "plots" / "loss.png").write_bytes(b"something else")
    with pytest.raises(FileError, match="is no report of mpilm"):
        png.save([run], tmp_path / "plots")


def test_plots_without_matplotlib(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpilm\[report\]'"):
        png.save([read_run(made(whole()))], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def command(*words_):
    return subprocess.run(
        [sys.executable, "-m", "mpilm.report", *map(str, words_)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_command(made, tmp_path):
    folder = made(whole()[:-1])
    done = command(folder, "--output", tmp_path / "x.html")
    assert done.returncode == 0, done.stderr
    assert re.search(r"report +.*x\.html", done.stdout)
    assert "There is no end row" in done.stdout
    Checked((tmp_path / "x.html").read_text())


@pytest.mark.parametrize(
    ("words_", "code", "said"),
    [((), 78, "say which run"), (("nowhere",), 74, "nowhere does not exist"), (("--outptu", "x"), 78, "--outptu")],
)
def test_a_command_that_cannot_work(words_, code, said):
    done = command(*words_)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_no_torch_is_needed():
    code = "import sys, mpilm.report; sys.exit(any(name in sys.modules for name in ('torch', 'mpi4py', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
