"""Schedules as lists of actions: complete, in order, and with no more microbatches alive than promised."""

import pytest

from mpilm.parallel.pipeline.actions import Action, parse
from mpilm.parallel.pipeline.schedules import SCHEDULES, forward_only, refusal, schedule

RANKS = range(1, 9)
MICROBATCHES = range(1, 17)


def sizes():
    """Every schedule with every size it takes."""
    for name in SCHEDULES:
        for p in RANKS:
            for v in (2, 3) if name == "interleaved" else (1,):
                for m in MICROBATCHES:
                    if refusal(name, p, v, m) is None:
                        yield name, p, v, m


def words(actions):
    return " ".join(map(str, actions))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_treats_every_microbatch_once_backward_in_order(name):
    for _, p, v, m in (size for size in sizes() if size[0] == name):
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
def test_no_backward_before_its_forward(name):
    for _, p, v, m in (size for size in sizes() if size[0] == name):
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
def test_the_textbook_orders(name, p, v, m, rank, expected):
    assert words(schedule(name, p, v, m)[rank]) == expected


def test_forward_only_takes_any_sizes():
    assert [words(actions) for actions in forward_only(2, 1, 3)] == ["0F0 0F1 0F2", "1F0 1F1 1F2"]
    assert words(forward_only(2, 2, 3)[1]) == "1F0 1F1 3F0 3F1 1F2 3F2"
    assert words(forward_only(1, 2, 2)[0]) == "0F0 1F0 0F1 1F1"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (("2f2b", 2, 1, 4), "there is no schedule 2f2b; there are 1f1b, gpipe, interleaved, zero-bubble"),
        (("1f1b", 2, 2, 4), "--parallel.chunks 2 needs --parallel.schedule interleaved; 1f1b has 1 chunk a rank"),
        (("zero-bubble", 2, 3, 4), "--parallel.chunks 3 needs --parallel.schedule interleaved; zero-bubble has 1 chunk a rank"),
        (("interleaved", 2, 1, 4), "--parallel.schedule interleaved needs --parallel.chunks 2 or more, not 1"),
        (("interleaved", 4, 2, 6), "not 6; the nearest: 4 or 8"),
        (("interleaved", 4, 2, 3), "not 3; the nearest: 4"),
        (("1f1b", 2, 1, 0), "a pipeline of 0 microbatches does no work"),
        (("gpipe", 0, 1, 1), "a pipeline of 0 ranks does no work"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_can(sizes, reason):
    assert reason in refusal(*sizes)
    with pytest.raises(ValueError, match=r"\w"):
        schedule(*sizes)


def test_all_else_works():
    assert refusal("interleaved", 1, 2, 7) is None  # several stages on one rank
    assert all(refusal(name, p, 1, m) is None for name in ("1f1b", "gpipe", "zero-bubble") for p in RANKS for m in MICROBATCHES)


@pytest.mark.parametrize(
    "action",
    [
        Action(0, "F", 0), Action(12, "B", 345), Action(1, "I", 2), Action(1, "W", 10), Action(3, "REDUCE"),
        Action(2, "SEND_F", 0), Action(3, "RECV_F", 0), Action(2, "SEND_B", 11), Action(1, "RECV_B", 0),
    ],
)  # fmt: skip
def test_text_and_back(action):
    assert parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F1 ", "-1F0", "0f0", "2F", "1REDUCE3", "1SEND0", "²F0"])
def test_what_is_no_action(text):
    with pytest.raises(ValueError, match="is no action"):
        parse(text)


@pytest.mark.parametrize(
    ("send", "receive", "waits"),
    [("2SEND_F0", "3RECV_F0", "3F0"), ("3SEND_B5", "2RECV_B5", "2B5"), ("3SEND_B5", "2RECV_B5", "2I5")],
)
def test_both_ends_of_a_message_and_who_waits_for_it_name_the_same(send, receive, waits):
    assert parse(send).message == parse(receive).message == parse(waits).message
    assert parse(waits).receive(stages=4) == parse(receive)


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
def test_messages_of_a_compute_action(compute, receive, send):
    assert parse(compute).receive(3) == (receive and parse(receive))
    assert parse(compute).send(3) == (send and parse(send))
