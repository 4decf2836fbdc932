"""Trace of all ranks: one file, one clock, every action of the schedule, and the same time breakdown as the rows."""

import json
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
from helpers import read_metrics
from runs import layout
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.parallel.layout_check import partition_by_cost
from mpilm.parallel.pipeline.actions import parse_action
from mpilm.parallel.pipeline.schedules import lower, schedule
from mpilm.telemetry.trace import CATEGORIES, ClockOffset, measure_clock_offset, to_root_time
from mpilm.trainer.loop import train

SETTINGS = {"run__trace_steps": "2:3", "model__n_layers": 4, "train__steps": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


def train_and_read_trace(config, size):
    run_ranks(size, lambda comm: train(config, comm))
    return json.loads((Path(config.run.dir) / "trace-2-3.json").read_text())


def spans(trace, category="", **args):
    """Return the events of a category, or all, with these arguments (pid: the rank)."""
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == "X"
        and (not category or event["cat"] == category)
        and all({**event["args"], "pid": event["pid"]}[key] == value for key, value in args.items())
    ]


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, layout()),
        (3, layout()),
        (2, layout(2)),
        (4, layout(2, "interleaved", zero=1)),
        (2, layout(2, "zero-bubble")),
        (4, layout(2, tensor=2)),
    ],
)
def test_trace_has_every_action_of_the_schedule_in_order(tmp_path, data, size, layout):
    config = tiny_config(data, tmp_path / "run", **SETTINGS, **layout)
    trace = train_and_read_trace(config, size)
    parallel = config.parallel
    stages, replicas = parallel.pipeline * parallel.chunks, size // (parallel.pipeline * parallel.tensor)
    assert trace["mpilm"] | {"clock_error_us": 0.0} == {
        "steps": [2, 3], "ranks": size, "clock_error_us": 0.0,
        "layout": {"pipeline": parallel.pipeline, "data": replicas, "expert": 1, "context": 1, "tensor": parallel.tensor,
                   "zero": parallel.zero, "schedule": parallel.schedule,
                   "cut": list(partition_by_cost(config, 256)) if stages > 1 else [4]},
    }  # fmt: skip
    count = -(-8 // replicas)
    compute = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, count)
    programs = [lower(actions, stages, count) for actions in compute]
    for rank in range(size):
        for step in (2, 3):
            events = [event for event in spans(trace, step=step, pid=rank) if "action" in event["args"]]
            actions = [parse_action(event["name"]) for event in sorted(events, key=lambda event: event["ts"])]
            assert (
                actions == programs[rank // (replicas * parallel.tensor)]
            )  # with the third microbatch, padding on the last of 3 ranks
            assert len(spans(trace, "step", step=step, pid=rank)) == 1
            assert len(spans(trace, "optimizer", step=step, pid=rank)) == 3  # check of the state, norm and update


def test_trace_messages_are_arrows_between_ranks_forward_in_time(tmp_path, data):
    trace = train_and_read_trace(tiny_config(data, tmp_path / "run", model__tie_embeddings=False, **SETTINGS, **layout(2)), 2)
    ends = {kind: {e["id"]: e for e in trace["traceEvents"] if e["ph"] == kind} for kind in ("s", "f")}
    assert len(ends["s"]) == 2 * 2 * 8  # steps, directions, microbatches
    assert ends["s"].keys() == ends["f"].keys()
    for message, sent in ends["s"].items():
        assert {sent["pid"], ends["f"][message]["pid"]} == {0, 1}
        assert sent["ts"] <= ends["f"][message]["ts"] + 2 * trace["mpilm"]["clock_error_us"] + 0.01
    received = spans(trace, "wait", axis="pipeline")
    assert {event["args"]["bytes"] for event in received} == {2 * 16 * 32 * 4}
    assert all(event["args"]["peer"] == 1 - event["pid"] for event in received)


@pytest.mark.parametrize(("size", "layout"), [(1, layout()), (2, layout(zero=3)), (2, layout(2, "interleaved"))])
def test_trace_events_of_a_rank_nest(tmp_path, data, size, layout):
    """Exactly, by the sums that viewers compute: Perfetto drops an event that ends after the one around it."""
    trace = train_and_read_trace(tiny_config(data, tmp_path / "run", **SETTINGS, **layout), size)
    for rank in range(size):
        ends: list[float] = []
        for event in sorted(spans(trace, pid=rank), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1], event
            ends.append(end)


@pytest.mark.parametrize(("size", "layout"), [(1, layout()), (3, layout(zero=3)), (4, layout(2)), (2, layout(2, "gpipe"))])
def test_trace_and_metrics_rows_agree_on_the_breakdown(tmp_path, data, size, layout):
    """The seconds of each category, computed here from the events alone: every moment belongs to the innermost event."""
    config = tiny_config(data, tmp_path / "run", **SETTINGS, **layout)
    trace = train_and_read_trace(config, size)
    rows = {row["step"]: row for row in read_metrics(Path(config.run.dir) / "metrics.jsonl") if "rank_s" in row}
    pipelined = config.parallel.pipeline > 1
    for step in (2, 3):
        for rank in range(size):
            (around,) = spans(trace, "step", step=step, pid=rank)
            events = [
                e for e in spans(trace, step=step, pid=rank) if e["cat"] != "step" and e["ts"] < around["ts"] + around["dur"]
            ]
            expected = dict.fromkeys(CATEGORIES, 0.0)
            edges = sorted({t for e in events for t in (e["ts"], e["ts"] + e["dur"])})
            for start, stop in pairwise(edges):
                over = [e for e in events if e["ts"] <= start and stop <= e["ts"] + e["dur"] + 1e-3]
                if over:
                    inner = min(over, key=lambda e: e["dur"])
                    expected[categorize(inner, pipelined)] += (stop - start) / 1e6
            logged = {category: rows[step]["rank_s"][category][rank] for category in CATEGORIES}
            assert logged == pytest.approx(expected, rel=0.02, abs=2e-5)
            assert rank > 0 or sum(logged.values()) <= rows[step]["step_s"]


def categorize(event, pipelined):
    if event["cat"] == "wait":
        return "bubble" if pipelined and event["args"]["axis"] in ("pipeline", "world") else "communication"
    return {"forward": "compute", "backward": "compute", "send": "communication", "receive": "communication",
            "reduce": "communication"}.get(event["cat"], event["cat"])  # fmt: skip


def test_trace_stopped_run_writes_the_steps_so_far(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", run__trace_steps="1:9", run__time_limit=1e-6)
    with pytest.raises(CollectiveError, match="stopped after step 1 "):
        run_ranks(2, lambda comm: train(config, comm))
    trace = json.loads((tmp_path / "run" / "trace-1-1.json").read_text())
    assert {event["args"]["step"] for event in spans(trace)} == {1}
    assert trace["mpilm"]["steps"] == [1, 1]
    end = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (end["event"], end["step"]) == ("stopped", 1)
    for text in (end["why"], (tmp_path / "run" / "log.txt").read_text(), (tmp_path / "run" / "report.html").read_text()):
        assert "stopped after step 1 of 6" in text


def test_trace_resumed_run_writes_another_file(tmp_path, data):
    for steps, window in ((2, "1:3"), (4, "1:4")):
        config = tiny_config(data, tmp_path / "run", **layout(2), train__steps=steps, run__trace_steps=window)
        run_ranks(2, lambda comm, config=config: train(config, comm))
    assert {path.name for path in (tmp_path / "run").glob("trace*")} == {"trace-1-2.json", "trace-3-4.json"}
    assert "Step 4 on ranks 0, 1, the first replica" in (tmp_path / "run" / "report.html").read_text()


def test_trace_steps_already_done_prints_a_note(tmp_path, data, capsys):
    for steps in (2, 3):
        config = tiny_config(data, tmp_path / "run", train__steps=steps, run__trace_steps="1:2" if steps == 3 else "")
        run_ranks(2, lambda comm, config=config: train(config, comm))
    assert capsys.readouterr().out.count("nothing to trace: the steps 1:2 of --run.trace-steps are already completed") == 1
    assert "Last start only. Predicted" in (tmp_path / "run" / "report.html").read_text()


def test_trace_not_requested_writes_no_file(tmp_path, data):
    run_ranks(2, lambda comm: train(tiny_config(data, tmp_path / "run"), comm))
    assert not list((tmp_path / "run").glob("trace*"))


def test_trace_unwritable_file_does_not_end_the_run(tmp_path, data, capsys):
    config = tiny_config(data, tmp_path / "run", **SETTINGS)
    (tmp_path / "run" / "trace-2-3.json").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text("")  # makes it a run folder
    with mock.patch("mpilm.trainer.run_folder._check_is_same_run"):
        run_ranks(3, lambda comm: train(config, comm))
    assert f"no trace: {tmp_path / 'run' / 'trace-2-3.json'} cannot be written: Is a directory" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["event"] == "end"


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_clock_offset_is_within_its_error(ranks_per_node):
    """The clocks of the nodes are hours apart."""

    def body(comm):
        hours = 3600.0 * (comm.rank // ranks_per_node)
        offset = measure_clock_offset(comm, lambda: time.monotonic() + hours)
        return offset.ahead_s + hours, offset.error_s

    for ahead_s, error_s in run_ranks(5, body, ranks_per_node=ranks_per_node):
        assert abs(ahead_s) <= error_s + 1e-6


def test_clock_offset_one_rank_is_zero():
    assert measure_clock_offset(SelfComm("world"))[1:] == (0.0, 0.0)


def test_to_root_time_interpolates_between_offsets():
    before, after = ClockOffset(100.0, 5.0, 0.0), ClockOffset(200.0, 6.0, 0.0)
    assert [to_root_time(before, after, at) for at in (100.0, 150.0, 200.0)] == [105.0, 155.5, 206.0]
    assert to_root_time(before, before, 130.0) == 135.0
