"""Schedules as lists of actions: complete and in order."""

import re

import pytest

from mpilm.parallel.pipeline.actions import Action, parse_action
from mpilm.parallel.pipeline.schedules import SCHEDULES, find_schedule_problem, forward_only, schedule

RANKS = range(1, 9)
MICROBATCHES = range(1, 17)


def valid_sizes(name):
    for p in RANKS:
        for v in (2, 3) if name == "interleaved" else (1,):
            yield from ((p, v, m) for m in MICROBATCHES if find_schedule_problem(name, p, v, m) is None)


def join(actions):
    return " ".join(map(str, actions))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_treats_every_microbatch_once_in_order(name):
    for p, v, m in valid_sizes(name):
        ranks = schedule(name, p, v, m)
        assert len(ranks) == p
        for rank, actions in enumerate(ranks):
            assert {action.stage for action in actions} == {chunk * p + rank for chunk in range(v)}
            kinds = "FIW" if name == "zero-bubble" else "FB"
            assert len(actions) == len(kinds) * m * v
            for stage in range(rank, p * v, p):
                for kind in kinds:
                    assert [a.microbatch for a in actions if (a.stage, a.kind) == (stage, kind)] == list(range(m))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_runs_backward_after_forward(name):
    for p, v, m in valid_sizes(name):
        for actions in schedule(name, p, v, m):
            at = {(a.stage, a.kind, a.microbatch): i for i, a in enumerate(actions)}
            for (stage, kind, microbatch), i in at.items():
                before = {"B": "F", "I": "F", "W": "I"}.get(kind)
                assert before is None or at[stage, before, microbatch] < i


@pytest.mark.parametrize(
    ("name", "p", "v", "m", "rank", "expected"),
    [
        ("1f1b", 1, 1, 3, 0, "0F0 0B0 0F1 0B1 0F2 0B2"),  # gradient accumulation
        ("1f1b", 3, 1, 4, 0, "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"),
        ("1f1b", 3, 1, 4, 1, "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3"),
        ("1f1b", 3, 1, 4, 2, "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"),
        ("1f1b", 5, 1, 2, 0, "0F0 0F1 0B0 0B1"),
        ("gpipe", 2, 1, 3, 1, "1F0 1F1 1F2 1B0 1B1 1B2"),
        # Narayanan et al., arXiv 2104.04473, figure 4: two ranks' worth of it, read off
        ("interleaved", 2, 2, 4, 0, "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"),
        ("interleaved", 2, 2, 4, 1, "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"),
        ("interleaved", 1, 2, 2, 0, "0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1"),
        # Qi et al., arXiv 2401.10241, figure 3: the first rank runs W at once, the last one p - 1 microbatches late
        ("zero-bubble", 3, 1, 4, 0, "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3"),
        ("zero-bubble", 3, 1, 4, 2, "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3"),
        ("zero-bubble", 1, 1, 2, 0, "0F0 0I0 0W0 0F1 0I1 0W1"),
    ],
)
def test_schedule_matches_the_papers(name, p, v, m, rank, expected):
    assert join(schedule(name, p, v, m)[rank]) == expected


def test_forward_only_any_sizes_groups_microbatches():
    assert [join(actions) for actions in forward_only(2, 1, 3)] == ["0F0 0F1 0F2", "1F0 1F1 1F2"]
    assert join(forward_only(2, 2, 3)[1]) == "1F0 1F1 3F0 3F1 1F2 3F2"
    assert join(forward_only(1, 2, 2)[0]) == "0F0 1F0 0F1 1F1"


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        (("2f2b", 2, 1, 4), "unknown schedule 2f2b; choose from 1f1b, gpipe, interleaved, zero-bubble"),
        (("1f1b", 2, 2, 4), "--parallel.chunks 2 needs --parallel.schedule interleaved; 1f1b has 1 chunk a rank"),
        (("zero-bubble", 2, 3, 4), "--parallel.chunks 3 needs --parallel.schedule interleaved; zero-bubble has 1 chunk a rank"),
        (("interleaved", 2, 1, 4), "--parallel.schedule interleaved needs --parallel.chunks 2 or more, not 1"),
        (("interleaved", 4, 2, 6), "not 6; the nearest: 4 or 8"),
        (("interleaved", 4, 2, 3), "not 3; the nearest: 4"),
        (("1f1b", 2, 1, 0), "a pipeline needs 1 or more microbatches, not 0"),
        (("gpipe", 0, 1, 1), "a pipeline needs 1 or more ranks, not 0"),
    ],
)
def test_schedule_problem_names_the_nearest_valid_sizes(sizes, problem):
    assert problem in find_schedule_problem(*sizes)
    with pytest.raises(ValueError, match=re.escape(problem)):
        schedule(*sizes)


def test_schedule_problem_valid_sizes_is_none():
    assert find_schedule_problem("interleaved", 1, 2, 7) is None  # several stages on one rank
    for name in ("1f1b", "gpipe", "zero-bubble"):
        assert all(find_schedule_problem(name, p, 1, m) is None for p in RANKS for m in MICROBATCHES)


@pytest.mark.parametrize(
    "action",
    [
        Action(0, "F", 0), Action(12, "B", 345), Action(1, "I", 2), Action(1, "W", 10), Action(3, "REDUCE"),
        Action(2, "SEND_F", 0), Action(3, "RECV_F", 0), Action(2, "SEND_B", 11), Action(1, "RECV_B", 0),
    ],
)  # fmt: skip
def test_parse_action_restores_str(action):
    assert parse_action(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F1 ", "-1F0", "0f0", "2F", "1REDUCE3", "1SEND0", "²F0"])
def test_parse_action_invalid_text_raises(text):
    with pytest.raises(ValueError, match="is not an action"):
        parse_action(text)


@pytest.mark.parametrize(
    ("send", "receive", "waits"),
    [("2SEND_F0", "3RECV_F0", "3F0"), ("3SEND_B5", "2RECV_B5", "2B5"), ("3SEND_B5", "2RECV_B5", "2I5")],
)
def test_message_is_the_same_for_sender_receiver_and_waiter(send, receive, waits):
    assert parse_action(send).message == parse_action(receive).message == parse_action(waits).message
    assert parse_action(waits).input_receive(stages=4) == parse_action(receive)


@pytest.mark.parametrize(
    ("compute", "receive", "send"),
    [
        ("0F1", None, "0SEND_F1"),
        ("1F1", "1RECV_F1", "1SEND_F1"),
        ("2F1", "2RECV_F1", None),
        ("2B1", None, "2SEND_B1"),
        ("1I1", "1RECV_B1", "1SEND_B1"),
        ("0B1", "0RECV_B1", None),
        ("1W1", None, None),
        ("1REDUCE", None, None),
    ],
)
def test_compute_action_has_the_messages_of_its_stage(compute, receive, send):
    assert parse_action(compute).input_receive(3) == (receive and parse_action(receive))
    assert parse_action(compute).output_send(3) == (send and parse_action(send))
