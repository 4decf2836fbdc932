"""The report: complete and well-formed whatever is in the folder, and its numbers are those of the rows."""

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from mpilm.errors import ConfigError, FileError
from mpilm.parallel.pipeline.schedules import lower, schedule
from mpilm.planner.simulate import simulate
from mpilm.report import figures, summary
from mpilm.report.page import MARKER, save_images, write_report
from mpilm.report.read import read_run
from mpilm.report.trace import find_traced_step, sum_waits
from mpilm.telemetry.metrics import PER_RANK

CONFIG = '[model]\narch = "llama"\nn_layers = 4\nd_model = 192\n\n[train]\nsteps = 40\nlr = 0.003\ndtype = "float32"\n'


def start_row(ranks=2, step=0, time=1000.0):
    layout = {"pipeline": 1, "data": ranks, "context": 1, "tensor": 1, "zero": 0, "schedule": "1f1b"}
    return {
        "event": "start", "step": step, "time": time, "ranks": ranks, "layout": layout, "parameters": 1234567,
        "predicted_memory_bytes": 300 << 20, "predicted_memory_on_rank_bytes": [300 << 20] * ranks, "threads": 1,
        "device": "cpu", "versions": {"mpilm": "0.1.0", "torch": "2.13.0"}, "hosts": [f"node{r}" for r in range(ranks)],
        "command": "mpirun -n 2 python -m mpilm.train --run.dir 'a b'", "peak_flops": 2e11, "peak_source": "measured",
    }  # fmt: skip


def step_row(step, ranks=2, loss=None, compute=None):
    seconds = {"compute": compute or [0.3] * ranks, "bubble": [0.0] * ranks, "communication": [0.05] * ranks}
    return {
        "step": step, "time": 1000.0 + step, "tokens": 4096 * step, "loss": 3 + 4 / step if loss is None else loss,
        "grad_norm": 0.5, "lr": 1e-3, "step_s": 0.5, "tokens_per_s": 8192.0, "mfu": 0.3,
        "memory_bytes": [200 << 20] * ranks, "rank_s": {**seconds, "data": [0.01] * ranks, "optimizer": [0.04] * ranks},
    }  # fmt: skip


def run_rows(ranks=2):
    rows = [start_row(ranks), *(step_row(step, ranks) for step in range(1, 41))]
    rows.insert(21, {"step": 20, "time": 1020.5, "eval_loss": 3.75})
    rows.insert(22, {"event": "saved", "step": 20, "time": 1020.7, "took_s": 0.8, "waited_s": 0.1})
    return [*rows, {"event": "end", "step": 40, "time": 1050.0, "peak_memory_on_rank_bytes": [310 << 20] * ranks}]


@pytest.fixture
def make_run(tmp_path):
    def make(rows, name="run", config=CONFIG, trace=""):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        files = {"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows), "config.toml": config}
        for file, content in (files | {"trace-7-8.json": trace if isinstance(trace, str) else json.dumps(trace)}).items():
            if content:
                (folder / file).write_text(content)
        return folder

    return make


def make_trace(name="1f1b", p=2, v=1, m=4, replicas=1):
    """Return a trace of two steps in which every action takes as long as it should, and the timeline it was made from."""
    costs = {"F": 0.02, "B": 0.04, "I": 0.02, "W": 0.02, "REDUCE": 0.005}
    categories = {"F": "forward", "REDUCE": "reduce", "SEND": "send", "RECV": "receive"}
    programs = [lower(actions, p * v) for actions in schedule(name, p, v, m)]
    timeline, events = simulate(programs, lambda kind, stage: costs.get(kind, 0.0)), []

    def record(step, rank, start_s, length_s, category, name, **args):
        start_us, args = 1e6 * (step + start_s) + 1e-3 * len(events), {"step": step, **args}
        events.append({"pid": rank, "cat": category, "name": name, "ts": start_us, "dur": 1e6 * length_s, "args": args})

    for step, stage, replica in itertools.product((7, 8), range(p), range(replicas)):
        rank, end_s, timed = stage * replicas + replica, 0.0, (e for e in timeline.by_rank[stage] if not e.waiting)
        for action in programs[stage]:
            category = categories.get(action.kind.split("_")[0], "backward")
            event = None if category in ("send", "receive") else next(timed)
            start_s, end_s = (event.start_s, event.end_s) if event else (end_s, end_s)
            record(step, rank, start_s, end_s - start_s, category, str(action))
        record(step, rank, 0.0, 2e-3, "wait", "receive", axis="pipeline", bytes=1 << 20)
    return {"traceEvents": events, "mpilm": {"layout": {"pipeline": p, "data": replicas}}}, timeline


class Page(HTMLParser):
    """A page whose tags close in order, whose ids are unique, and that fetches nothing; with its text and charts."""

    def __init__(self, path):
        super().__init__()
        content, plotly = path.read_text(encoding="utf-8"), get_plotlyjs()
        assert (content.count(plotly), len(content) < 6e6) == (1, True)
        self.open, self.ids, self.words, self.scripts = [], [], [], []
        self.feed(content.replace(plotly, ""))
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids))
        self.text, self.charts = " ".join(" ".join(self.words).split()), json.loads(self.scripts[1])
        assert not re.search(r"http|url\(|@import|fetch\(|import\(", self.scripts[0] + "".join(self.scripts[2:]))

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        fetched = [value for key, value in attrs if key in ("src", "href", "data", "action")]
        assert all(value.startswith(("#", "data:")) for value in fetched), f"<{tag}> would fetch {fetched}"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        (self.scripts if self.open[-1:] in (["script"], ["style"]) else self.words).append(data)

    def series(self, chart):
        return {each["name"]: each for each in self.charts[chart]["series"]}


def report(*folders):
    return Page(write_report(folders)[0])


def test_report_of_run_shows_everything(make_run):
    text = report(make_run(run_rows(), trace=make_trace()[0])).text
    for words in (
        "llama, 4 blocks of width 192, 1,234,567 parameters; 2 ranks (data 2); float32 on cpu; started 1970-01-01",
        "3.1000", "at step 40", "3.7500", "8,192", "30%", "500 ms", "Gradient norm", "Learning rate", "Throughput", "MFU",
        "Predicted for the rank that uses most: 300 MiB; measured: 310 MiB, +3.3%", "No straggler", "bubble", "optimizer",
        "checkpoint saved; writing took 0.8 s, training waited 0.1 s", "training completed", "receive 2 2 on rank 0 1 1",
        "mpirun -n 2 python -m mpilm.train --run.dir 'a b'", "d_model = 192", "torch 2.13.0", "node0, node1",
    ):  # fmt: skip
        assert words in text, f"{words!r} is not in the report"
    assert "Missing from this report" not in text


def test_charts_hold_the_numbers_of_the_rows(make_run):
    rows, (trace, timeline) = run_rows(), make_trace()
    page = report(make_run(rows, trace=trace))
    steps = [row for row in rows if "loss" in row]
    for chart, name, key, scale in (("loss", "Loss", "loss", 1), ("lr", "Learning rate", "lr", 1), ("mfu", "MFU", "mfu", 100)):
        series = page.series(chart)[name]
        assert (series["x"], series["y"]) == ([row["step"] for row in steps], [scale * row[key] for row in steps])
    assert page.series("loss")["Evaluation"].items() >= {"x": [20], "y": [3.75]}.items()
    bars, memory = page.series("time"), page.series("memory")
    assert bars["compute"]["x"] == bars["communication"]["start"] == pytest.approx([300, 300])
    assert (memory["memory"]["x"], memory["predicted"]["x"]) == ([310, 310], [300, 300])
    forward = page.series("timeline")["forward"]
    measured = [(e.rank, 1000 * e.start_s) for e in timeline.events if e.action.kind == "F" and not e.waiting]
    drawn = list(zip(forward["y"], forward["start"]))
    assert drawn[: len(measured)] == [(rank, pytest.approx(start_ms, abs=0.1)) for rank, start_ms in measured]
    assert [rank for rank, _ in drawn[len(measured) :]] == [rank + 3 for rank, _ in measured]  # the simulated ones, below


def test_missing_rows_are_listed(make_run):
    def drop(rows, *keys):
        return [{key: value for key, value in row.items() if key not in keys} for row in rows]

    rows, infinite = run_rows(), [row | {"loss": float("inf")} for row in run_rows() if "event" not in row]
    for changed, message in (
        (rows[:-1], "metrics.jsonl has no end row"),
        (rows[1:], "metrics.jsonl has no start row"),
        (rows[:1], "No step has been logged yet."),
        (drop(rows, "mfu"), "The run logged no MFU"),
        (drop(rows, *PER_RANK), "The run logged no times of its ranks."),
        (infinite, "41 logged losses are not finite, first at step 1."),
    ):
        assert message in report(make_run(changed)).text.split("Curves")[0]


def test_missing_and_broken_files_are_listed(make_run):
    text = report(make_run([], "a"), make_run(run_rows(), "b", config="", trace='{"traceEvents": [{"ph"')).text
    assert "a: metrics.jsonl cannot be read: No such file or directory" in text
    assert re.search("b: config.toml.*No such file", text)
    assert "b: trace-7-8.json cannot be read: it is not complete JSON" in text
    assert "config.toml is not valid TOML" in report(make_run(run_rows(), config="[model\n")).text


@pytest.mark.parametrize("key", [*start_row(), *step_row(1), "since"])
def test_values_of_another_type_do_not_break_it(make_run, key):
    folders = []
    for value in ("high", None, [1], [None], {}, {"pipeline": "two"}, True, 10**400, -(10**400)):
        events = [{"event": kind, "step": 9, "why": "?"} for kind in ("saved", "skipped", "stopped", "?")]
        rows = [row | {key: value} for row in (start_row(), *events, step_row(1), step_row(2))]
        folders.append(make_run([*rows, *run_rows()[1:]], str(value)[:20], trace=make_trace()[0]))
    text = report(*folders).text
    assert text.count("3.1000 at step 40") == text.count("training completed") == len(folders)


def test_markup_in_rows_and_names_is_text(make_run):
    row = {"event": "skipped", "step": 9, "time": 1009.0, "why": "</script><script>alert(1)</script> \ud800", "since": 7}
    text = report(make_run([*run_rows(), row], name='<b onclick="x">&')).text
    assert text.startswith('<b onclick="x">&')
    assert "skipped from step 7: </script><script>alert(1)</script>" in text


def test_several_runs_are_overlaid_and_compared(make_run):
    first, second = make_run(run_rows(), "first"), make_run(run_rows(4), "second", config=CONFIG.replace("0.003", "0.001"))
    page = report(first, second)
    differences = page.text.split("Curves")[0]
    for words in ("train.lr 0.003 0.001", "ranks 2 4", "layout.data 2 4", "hosts node0, node1 node0, node1, node2, node3"):
        assert words in differences
    assert ("train.dtype" in differences, (first / "comparison.html").exists()) == (False, True)
    assert [*page.series("loss")] == ["first", "first: evaluation", "second", "second: evaluation"]
    assert [each["color"] for each in page.charts["loss"]["series"]] == [0, 0, 1, 1]
    assert {"time-0", "memory-0", "time-1", "memory-1"} < page.charts.keys()
    assert "Settings, layout and versions are the same" in report(first, make_run(run_rows(), "third")).text


def test_many_ranks_and_events_are_few_lines(make_run):
    slow = [0.6 if rank == 1234 else 0.3 for rank in range(2000)]
    rows = [start_row(2000), *(step_row(step, 2000, compute=slow) for step in (1, 10, 20))]
    rows += [{"event": "saved", "step": i, "time": 1000.0 + i, "took_s": 2.0, "waited_s": 0.25} for i in range(300)]
    rows += [{"event": "skipped", "step": i, "time": 1000.0 + i, "why": "spike", "since": i} for i in range(300)]
    page = report(make_run(rows))
    names = page.charts["time"]["rows"]
    assert (len(names), names[:2]) == (9, ["mean of 2,000", "rank 1234 node1234"])
    assert re.search("1 rank computes more than 1.2 times as long .*rank 1234 node1234 2.00 3 of 3 sampled rows", page.text)
    assert "300 checkpoints were saved; writing one took 2 s (median), 2 s at most; training waited 75 s in total." in page.text
    assert ("243 more events" in page.text, page.text.count("skipped: spike")) == (True, 57)


def test_spike_of_one_step_in_a_long_run_is_drawn(make_run):
    page = report(make_run([start_row(), *(step_row(step, loss=8.25 if step == 4321 else 3.0) for step in range(1, 9001))]))
    [curve] = page.charts["loss"]["series"]
    (mean_x, mean_y), stretch = curve["mean"], 9000 // len(curve["mean"][0])
    assert len(curve["x"]) <= 4 * len(mean_x) < 9000
    assert dict(zip(curve["x"], curve["y"]))[4321] == max(curve["y"]) == 8.25
    assert max(mean_y) == pytest.approx(3 + 5.25 / stretch)


READER = """<script>
const result = { errors }, press = (key) => plot("lr").dispatchEvent(new KeyboardEvent("keydown", { key }));
const plot = (key) => document.querySelector(`[data-chart=${key}]`), range = (key) => plot(key)._fullLayout.xaxis.range;
const legend = [...document.querySelectorAll("#plot-loss .legend button")], reset = document.querySelector("#plot-loss .reset");
const look = () => [range("loss"), range("lr"), reset.hidden], values = () => plot("loss").data.map(({ name, y }) => [name, y]);
result.before = [look(), values()];
document.querySelector("[data-smoothing='0.1']").click();
result.smooth = values();
press("+");
result.zoomed = look();
reset.click();
result.reset = look();
legend[0].dispatchEvent(new Event("pointerenter"));
result.front = plot("loss").data.map(({ name, opacity }) => [name, opacity > 0.2]);
legend[0].dispatchEvent(new Event("pointerleave"));
legend[0].click();
result.hidden = plot("loss").data.map(({ name }) => name);
result.tooWide = document.documentElement.scrollWidth > innerWidth;
document.body.innerHTML = "<pre></pre>";
document.querySelector("pre").textContent = JSON.stringify(result);
</script></body>"""


def read_in_browser(path):
    """Return what READER saw in a page on a narrow screen."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium in PATH")
    page, watch = path.read_text(encoding="utf-8"), "<head><script>const errors = []; onerror = (e) => errors.push(e)</script>"
    path.write_text(page.replace("<head>", watch, 1).replace("</body>", READER), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=390,844",
        f"--user-data-dir={path.parent}",
    ]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=100)
    return json.loads(html.unescape(re.findall("<pre>(.*)</pre>", done.stdout, re.S)[0]))


def test_reader_zooms_smooths_and_brings_a_run_to_the_front(make_run, tmp_path):
    noise = np.random.default_rng(0).normal(5, 1, 40)
    rows = [start_row(), *(step_row(step, loss=loss) for step, loss in enumerate(noise, 1))]
    path, _ = write_report([make_run(rows, "first"), make_run(run_rows(), "second")], tmp_path / "page.html")
    seen = read_in_browser(path)
    (full, names) = seen["before"][0], [name for name, _ in seen["before"][1]]
    assert (seen["errors"], seen["tooWide"], names) == ([], False, ["first", "second", "second: evaluation"])
    assert (full[0], full[2]) == (full[1], True)
    low, high = full[0]
    middle = [pytest.approx(low + (high - low) / 4), pytest.approx(high - (high - low) / 4)]
    assert seen["zoomed"] == [middle, middle, False]  # all curves
    assert seen["reset"] == full
    steps, curves = np.arange(1, 41), dict(reversed(seen["smooth"]))  # the smooth curves are drawn after those of the values
    width = 1 + np.minimum(4, steps - 1)[:, None]  # a tenth of the steps
    weights = np.maximum(0, 1 - np.abs(steps - steps[:, None]) / width)
    assert dict(seen["smooth"])["first"] == pytest.approx(weights @ noise / weights.sum(1), rel=1e-6)
    assert curves["first"] == pytest.approx(noise)
    assert seen["front"][-1] == ["first", True]
    assert [is_clear for name, is_clear in seen["front"] if name != "first"] == [False] * 3
    assert set(seen["hidden"]) == {"second", "second: evaluation"}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 40))
def test_downsampling_keeps_extremes_and_means(values, buckets):
    y, width = np.array(values), -(-len(values) // buckets)
    kept, (mean_x, mean_y) = figures.downsample_m4(y, buckets), figures.average_buckets(np.arange(len(y)), y, buckets)
    assert list(kept) == sorted({0, len(y) - 1, *kept})
    assert len(kept) <= 4 * buckets
    for i, low in enumerate(range(0, len(y), width)):
        inside, drawn = y[low : low + width], y[kept[(kept >= low) & (kept < low + width)]]
        assert (drawn.min(), drawn.max()) == (inside.min(), inside.max())
        assert (mean_x[i], mean_y[i]) == (low + (len(inside) - 1) / 2, pytest.approx(inside.mean(), abs=1e-6))


def test_charts_of_experts_show_their_load_against_an_even_share(make_run):
    shares = [{"expert_share": [0.5, 0.25, 0.25, 0.0], "expert_rank_share": [0.75, 0.25]}, {"expert_share": [0.3] * 3 + [0.1]}]
    rows = [start_row(), *({**step_row(step), **shares[step % 2]} for step in range(1, 9))]
    charts = {chart.key: chart for chart in figures.make_charts([read_run(make_run(rows))])}
    bars = charts["expert_share"].series[0]
    assert bars.x.tolist() == pytest.approx([1.6, 1.1, 1.1, 0.2])
    assert charts["expert_share"].rows == ("expert 0", "expert 1", "expert 2", "expert 3")
    assert charts["expert_rank_share"].series[0].x.tolist() == [1.5, 0.5]


def test_rank_statistics_are_those_of_the_rows(make_run):
    parts = summary.average_parts(read_run(make_run(run_rows())))
    assert sum(seconds[0] for part, seconds in parts.items() if part != "checkpoint") == pytest.approx(0.5)
    assert parts["other"] == pytest.approx([0.1, 0.1])
    assert parts["checkpoint"] == pytest.approx([0.1 / 40] * 2)
    assert summary.split_step({"step_s": 1.0, "rank_s": {"compute": [1.0, 2.0], "data": [0.1]}}) is None
    compute = [[0.3 + 0.4 * (step % 2), 0.3, 0.3 + 0.2 * (step > 9), 0.31] for step in range(1, 21)]  # rank 0: noise
    run = read_run(make_run([start_row(4), *(step_row(i + 1, 4, compute=seconds) for i, seconds in enumerate(compute))]))
    assert summary.find_stragglers(run) == ([(2, pytest.approx(0.41 / 0.31), 11)], 20)
    peak, source = summary.measure_peak_memory(read_run(make_run(run_rows()[:-1])))
    assert (peak.tolist(), source) == ([200 << 20] * 2, "highest logged value")


def test_resume_on_other_ranks_shows_the_last_ranks(make_run):
    rows = [start_row(4), *(step_row(step, 4) for step in range(1, 9))]
    rows += [start_row(2, 8, 1008.5), *(step_row(step) for step in range(9, 20))]
    page = report(make_run(rows))
    assert page.charts["time"]["rows"] == ["rank 0 node0", "rank 1 node1"]
    assert page.charts["loss"]["marks"] == [[8, "resumed"]]
    assert re.search(r"in 2 starts .*resumed on 2 ranks \(data 2\)", page.text)


@pytest.mark.parametrize(("name", "p", "v"), [("1f1b", 2, 1), ("gpipe", 3, 1), ("interleaved", 2, 2), ("zero-bubble", 4, 1)])
def test_step_that_took_its_costs_equals_the_simulated_one(name, p, v):
    trace, expected = make_trace(name, p, v, replicas=2)
    step = find_traced_step(trace)
    assert (step.step, step.ranks) == (8, tuple(range(0, 2 * p, 2)))
    for timeline in (step.measured, step.simulated):
        assert timeline.step_s == pytest.approx(1000 * expected.step_s, rel=1e-3)
        assert timeline.bubble == pytest.approx(expected.bubble, abs=1e-3)
        assert timeline.chunks == v
    programs = [[e.action for e in events if not e.waiting] for events in expected.by_rank]
    assert [[e.action for e in events] for events in step.measured.by_rank] == programs
    assert [wait[:5] for wait in sum_waits(trace)] == [("pipeline", "receive", pytest.approx(2.0), pytest.approx(2.0), 0)]


def test_incomplete_or_odd_trace_is_explained(make_run, monkeypatch):
    events, about = make_trace()[0].values()
    for trace, message in (
        ({"traceEvents": [e for e in events if e["name"] != "0SEND_F1"], "mpilm": about}, "cannot be simulated: deadlock"),
        ({"traceEvents": [e for e in events if e["pid"] == 0], "mpilm": about}, "no step that all ranks of the first replica"),
        ({"traceEvents": [3, {"cat": "forward"}]}, "no step that all ranks of the first replica traced"),
        ({"traceEvents": 3}, "trace-7-8.json is not a trace."),
    ):
        assert message in report(make_run(run_rows(), trace=trace)).text
    monkeypatch.setattr(figures, "MAX_ACTIONS", 17)
    assert "Its 18 actions are too many to draw" in report(make_run(run_rows(), trace=make_trace()[0])).text


def test_only_run_folders_are_read_and_only_reports_overwritten(make_run, tmp_path):
    folder, mine = make_run(run_rows()), tmp_path / "mine.html"
    mine.write_text("my own page")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report([folder], write_report([folder], tmp_path / "other.html")[0])
    for source, output, message in (
        (tmp_path / "none", "", "does not exist"),
        (tmp_path, "", r"neither metrics\.jsonl nor config\.toml"),
        (folder / "metrics.jsonl", "", "is a file; pass the run folder"),
        (folder, mine, "is not a report of mpilm"),
        (folder, tmp_path, "is a folder"),
        (folder, tmp_path / "none" / "report.html", "cannot be written: No such file or directory"),
    ):
        with pytest.raises(FileError, match=message):
            write_report([source], output)
    assert mine.read_text() == "my own page"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "other.html", "run"]


def test_images_are_the_charts_of_the_page(make_run, tmp_path):
    path, runs = write_report([make_run(run_rows(), trace=make_trace()[0])])
    (tmp_path / "loss.png").write_bytes(b"something else")
    with pytest.raises(FileError, match="is not a report of mpilm"):
        save_images(runs, tmp_path)
    images, charts = save_images(runs, tmp_path / "plots"), Page(path).charts
    assert {image.stem for image in images} == charts.keys()
    assert charts.keys() == {"loss", "grad_norm", "lr", "tokens_per_s", "mfu", "step_time", "time", "memory", "timeline"}
    assert all(MARKER in image.read_bytes()[:1024] for image in images)  # so that they may be overwritten


def test_missing_library_is_named(make_run, tmp_path, monkeypatch):
    folder = make_run(run_rows())
    for module in ("matplotlib.figure", "plotly.offline"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"--png needs matplotlib: pip install 'mpilm\[report\]'"):
        save_images([read_run(folder)], tmp_path / "plots")
    with pytest.raises(ConfigError, match=r"needs plotly: pip install 'mpilm\[report\]'"):
        write_report([folder])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_command_writes_page_or_says_what_is_wrong(make_run, tmp_path):
    folder, output = str(make_run(run_rows()[:-1])), str(tmp_path / "x.html")
    imports = "import sys, mpilm.report.__main__; print({'torch', 'mpi4py', 'matplotlib', 'plotly'} & sys.modules.keys())"
    for arguments, code, message in (
        (("-m", "mpilm.report", folder, "--output", output), 0, r"no end row(.|\n)*report +.*x\.html"),
        (("-m", "mpilm.report"), 78, "no run folder given"),
        (("-m", "mpilm.report", "nowhere"), 74, "nowhere does not exist"),
        (("-m", "mpilm.report", "--outptu", "x"), 78, "--outptu"),
        (("-c", imports), 0, r"set\(\)"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert re.search(message, done.stderr if code else done.stdout)
