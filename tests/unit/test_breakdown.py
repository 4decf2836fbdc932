"""What the time of a step went into: each second counts once, for the innermost span."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.comm.progress import CommCall, Progress, Span
from mpilm.parallel.pipeline.actions import parse
from mpilm.telemetry.breakdown import PARTS, breakdown

FORWARD, REDUCE, SEND = parse("0F0"), parse("0REDUCE"), parse("0SEND_F0")
RECEIVE = CommCall("receive", "pipeline", 1, (1,))
GATHER = CommCall("all_gather", "data", 2, (0, 1))
MEETING = CommCall("all_reduce", "world", 3, (0, 1))


def test_each_second_counts_for_the_innermost_span():
    spans = [
        Span("data", 1.0, 2.0), Span(GATHER, 3.0, 3.5), Span(FORWARD, 0.0, 4.0), Span(SEND, 4.0, 4.25),
        Span(RECEIVE, 4.25, 6.0), Span(GATHER, 7.0, 8.0), Span(REDUCE, 6.0, 9.0), Span(MEETING, 9.0, 10.0),
        Span(GATHER, 11.0, 11.5), Span("optimizer", 10.0, 12.0), Span("evaluation", 12.0, 20.0),
    ]  # fmt: skip
    found = breakdown(spans, pipelined=True)
    assert found == {"compute": 2.5, "bubble": 2.75, "communication": 0.5 + 0.25 + 3.0 + 0.5, "data": 1.0, "optimizer": 1.5}
    assert sum(found.values()) == 12.0


def test_without_a_pipeline_all_waiting_is_communication():
    assert breakdown([Span(MEETING, 0.0, 1.0)], pipelined=False)["communication"] == 1.0
    assert breakdown([Span(MEETING, 0.0, 1.0)], pipelined=True)["bubble"] == 1.0


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.sampled_from([FORWARD, RECEIVE, GATHER, "data"])), max_size=9)
)
def test_one_after_the_other_they_add_up(parts):
    spans, at = [], 0
    for pause, lasts, what in parts:
        spans.append(Span(what, at + pause, at + pause + lasts))
        at += pause + lasts
    assert sum(breakdown(spans, False).values()) == sum(lasts for _, lasts, _ in parts)
    assert set(breakdown(spans, False)) == set(PARTS)


def test_spans_are_kept_once_somebody_asks():
    progress = Progress()
    with progress.span("data"):
        pass
    assert progress.drain_spans() == []
    with progress.span("outer"), progress.span("inner"):
        progress.wait(RECEIVE, lambda: None)
    assert [span.event for span in progress.drain_spans()] == [RECEIVE, "inner", "outer"]
    assert progress.drain_spans() == []


def test_what_raises_took_no_time():
    progress = Progress()
    progress.drain_spans()
    with pytest.raises(ZeroDivisionError), progress.span("data"):
        raise ZeroDivisionError
    assert progress.drain_spans() == []
