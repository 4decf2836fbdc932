"""Breakdown of a step's time: each second counts once, for the innermost span."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.comm.flight_recorder import CommCall, FlightRecorder, Span
from mpilm.parallel.pipeline.actions import parse_action
from mpilm.telemetry.trace import CATEGORIES, break_down

FORWARD, REDUCE, SEND = map(parse_action, ("0F0", "0REDUCE", "0SEND_F0"))
RECEIVE = CommCall("receive", "pipeline", 1, (1,))
GATHER = CommCall("all_gather", "data", 2, (0, 1))
SYNC = CommCall("all_reduce", "world", 3, (0, 1))


def test_break_down_nested_spans_counts_the_innermost():
    spans = [
        Span("data", 1.0, 2.0), Span(GATHER, 3.0, 3.5), Span(FORWARD, 0.0, 4.0), Span(SEND, 4.0, 4.25),
        Span(RECEIVE, 4.25, 6.0), Span(GATHER, 7.0, 8.0), Span(REDUCE, 6.0, 9.0), Span(SYNC, 9.0, 10.0),
        Span(GATHER, 11.0, 11.5), Span("optimizer", 10.0, 12.0), Span("evaluation", 12.0, 20.0),
    ]  # fmt: skip
    seconds = break_down(spans, pipelined=True)
    assert seconds == {"compute": 2.5, "bubble": 2.75, "communication": 0.5 + 0.25 + 3.0 + 0.5, "data": 1.0, "optimizer": 1.5}
    assert sum(seconds.values()) == 12.0


def test_break_down_without_pipeline_has_no_bubble():
    assert break_down([Span(SYNC, 0.0, 1.0)], pipelined=False)["communication"] == 1.0
    assert break_down([Span(SYNC, 0.0, 1.0)], pipelined=True)["bubble"] == 1.0


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.sampled_from([FORWARD, RECEIVE, GATHER, "data"])), max_size=9)
)
def test_break_down_successive_spans_adds_up(parts):
    spans, end = [], 0
    for pause, duration, event in parts:
        spans.append(Span(event, end + pause, end + pause + duration))
        end += pause + duration
    seconds = break_down(spans, False)
    assert sum(seconds.values()) == sum(duration for _, duration, _ in parts)
    assert set(seconds) == set(CATEGORIES)


def test_activity_records_spans_after_the_first_take():
    recorder = FlightRecorder()
    with recorder.span("data"):
        pass
    assert recorder.drain_spans() == []
    with recorder.span("outer"), recorder.span("inner"):
        recorder.wait(RECEIVE, lambda: None)
    assert [span.event for span in recorder.drain_spans()] == [RECEIVE, "inner", "outer"]
    with pytest.raises(ZeroDivisionError), recorder.span("data"):
        raise ZeroDivisionError
    assert recorder.drain_spans() == []  # a span that raises is not recorded
