"""Simulated steps of every schedule against the formulas of the papers."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.parallel.pipeline.actions import parse_action
from mpilm.parallel.pipeline.schedules import analytic_bubble, find_schedule_problem, forward_only, lower, schedule
from mpilm.planner.simulate import TimelineEvent, simulate

RANKS, MICROBATCHES = range(1, 9), range(1, 17)
COSTS = (1.0, 2.0, 1.0, 1.0)


def run(name, p, v, m, costs=COSTS, **options):
    seconds = {kind: cost / v for kind, cost in zip("FBIW", costs)}
    programs = [lower(actions, p * v) for actions in schedule(name, p, v, m)]
    return simulate(programs, lambda kind, stage: seconds.get(kind, 0.0), **options)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_simulate_one_chunk_has_the_bubble_of_the_papers(name, p):
    for m in MICROBATCHES:
        timeline = run(name, p, 1, m)
        assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert timeline.step_s == pytest.approx(3 * (m + p - 1))
        assert analytic_bubble(name, p, 1, m) == pytest.approx(timeline.bubble)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("v", [2, 3, 4])
def test_simulate_interleaved_divides_the_bubble_by_the_chunks(p, v):
    for m in (m for m in MICROBATCHES if m % p == 0):
        timeline = run("interleaved", p, v, m)
        assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
        assert analytic_bubble("interleaved", p, v, m) == pytest.approx(timeline.bubble)
        assert timeline.step_s == pytest.approx(3 * (m + (p - 1) / v))


@pytest.mark.parametrize("p", RANKS)
def test_simulate_zero_bubble_idles_less_than_1f1b_with_the_same_memory(p):
    for m in MICROBATCHES:
        zero, one = run("zero-bubble", p, 1, m), run("1f1b", p, 1, m)
        assert zero.step_s <= one.step_s
        if p > 1 and m >= p:
            assert zero.bubble < one.bubble
            assert zero.bubble == pytest.approx((p - 1) / (3 * m + p - 1))  # (p - 1) (F + I - W), Qi et al., table 1
        assert max(zero.peak_in_flight(rank) for rank in range(p)) == min(p, m) == one.peak_in_flight(0)


@pytest.mark.parametrize("costs", [(1, 2.0, 1.2, 0.8), (1, 1, 1, 0.25), (2, 3, 2, 1), (1, 3, 1, 2), (1, 2, 0.5, 1.5)])
def test_simulate_zero_bubble_uneven_costs_matches_the_formula(costs):
    for p in RANKS:
        for m in MICROBATCHES:
            zero, formula = run("zero-bubble", p, 1, m, costs), analytic_bubble("zero-bubble", p, 1, m, costs)
            assert formula is None or zero.bubble == pytest.approx(formula)
            joined = (costs[0], costs[2] + costs[3], 0, 0)
            assert zero.step_s <= run("1f1b", p, 1, m, joined).step_s + 1e-9
    assert (analytic_bubble("zero-bubble", 2, 1, 4, costs) is None) == (costs[3] > costs[2])
    assert analytic_bubble("zero-bubble", 4, 1, 3, costs) is None


@pytest.mark.parametrize("p", RANKS)
def test_peak_in_flight_matches_the_papers(p):
    for m in MICROBATCHES:
        one, gpipe = run("1f1b", p, 1, m), run("gpipe", p, 1, m)
        assert [one.peak_in_flight(rank) for rank in range(p)] == [min(p - rank, m) for rank in range(p)]
        assert [gpipe.peak_in_flight(rank) for rank in range(p)] == [m] * p
        if find_schedule_problem("interleaved", p, 2, m) is None:
            ahead = [2 * (p - 1 - rank) + p + 1 for rank in range(p)]
            interleaved = run("interleaved", p, 2, m)
            assert [interleaved.peak_in_flight(rank) for rank in range(p)] == [min(each, 2 * m) for each in ahead]
    programs = [lower(actions, p) for actions in forward_only(p, 1, 3)]
    assert simulate(programs, lambda kind, stage: 1.0).peak_in_flight(0) == 1  # nothing is kept for a backward


def test_simulate_by_hand_gives_the_same_events():
    programs = [lower(actions, 2) for actions in schedule("1f1b", 2, 1, 1)]
    costs = {("F", 0): 1.0, ("F", 1): 2.0, ("B", 1): 3.0, ("B", 0): 4.0, ("REDUCE", 1): 0.5}
    timeline = simulate(programs, costs, transfer_s=0.25)
    assert timeline.by_rank == (
        (
            TimelineEvent(0, parse_action("0F0"), 0.0, 1.0),
            TimelineEvent(0, parse_action("0B0"), 1.0, 6.5, waiting=True),
            TimelineEvent(0, parse_action("0B0"), 6.5, 10.5),
            TimelineEvent(0, parse_action("0REDUCE"), 10.5, 10.5),
        ),
        (
            TimelineEvent(1, parse_action("1F0"), 0.0, 1.25, waiting=True),
            TimelineEvent(1, parse_action("1F0"), 1.25, 3.25),
            TimelineEvent(1, parse_action("1B0"), 3.25, 6.25),
            TimelineEvent(1, parse_action("1REDUCE"), 6.25, 6.75),
        ),
    )
    assert timeline.step_s == 10.5
    assert timeline.bubble == pytest.approx(1 - (5 + 5.5) / 2 / 10.5)
    assert timeline.ranks == 2
    assert len(timeline.events) == 8


def test_simulate_receive_posted_ahead_hides_the_transfer():
    """The receive is posted an action ahead: where the steady state has work to do, transfers cost nothing."""
    programs = [
        [parse_action(word) for word in text.split()] for text in ("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1RECV_F1 1F0 1F1")
    ]
    timeline = simulate(programs, {("F", 0): 1.0, ("F", 1): 1.0}, transfer_s=0.5)
    assert [(e.start_s, e.end_s) for e in timeline.by_rank[1] if not e.waiting] == [(1.5, 2.5), (2.5, 3.5)]
    late = [programs[0], [parse_action(word) for word in ("1RECV_F0", "1F0", "1RECV_F1", "1F1")]]  # and this is what it saves
    assert simulate(late, lambda kind, stage: 1.0, transfer_s=0.5).step_s == 4.0


def test_simulate_send_waits_for_the_previous_send_of_its_channel():
    """Nothing buffers: rank 1 is busy for 5 s before it posts its first receive."""
    programs = [
        [parse_action(word) for word in text.split()] for text in ("0F0 0SEND_F0 0F1 0SEND_F1 0F2", "3F0 1RECV_F0 1RECV_F1 1F0")
    ]
    timeline = simulate(programs, {("F", 0): 1.0, ("F", 3): 5.0, ("F", 1): 1.0})
    assert [(str(e.action), e.start_s, e.end_s) for e in timeline.by_rank[0] if e.waiting] == [("0SEND_F1", 2.0, 5.0)]


def test_simulate_padding_microbatches_cost_nothing():
    full = run("1f1b", 2, 1, 2)
    programs = [lower(actions, 2, real_microbatches=2) for actions in schedule("1f1b", 2, 1, 4)]
    half = simulate(programs, lambda kind, stage: {"F": 1.0, "B": 2.0}.get(kind, 0.0), real_microbatches=2)
    assert half.step_s == full.step_s
    none = simulate([lower(a, 2, 0) for a in schedule("1f1b", 2, 1, 4)], lambda kind, stage: 1.0, real_microbatches=0)
    assert none.step_s == 1.0  # the sums over the data axis take place all the same
    assert simulate([[]], {}).step_s == simulate([[]], {}).bubble == 0.0


@given(st.integers(1, 5), st.integers(1, 8), st.lists(st.floats(0.1, 10), min_size=5, max_size=5), st.floats(0, 3))
def test_simulate_any_costs_stays_within_bounds(p, m, weights, transfer_s):
    unit = dict(zip("FBIW", COSTS))
    for name in ("1f1b", "gpipe", "zero-bubble"):
        programs = [lower(actions, p) for actions in schedule(name, p, 1, m)]
        timeline = simulate(programs, lambda kind, stage: unit.get(kind, 0.0) * weights[stage], transfer_s)
        busiest_s = max(3 * m * weights[stage] for stage in range(p))
        one_microbatch_s = sum(weights[:p]) * 2 + weights[0] + 2 * (p - 1) * transfer_s  # W may come later, but not the first's
        assert timeline.step_s >= max(busiest_s, one_microbatch_s) * (1 - 1e-9)
        assert 0 <= timeline.bubble < 1
        for events in timeline.by_rank:  # no gaps but those at the end, no overlaps
            assert all(a.end_s == b.start_s for a, b in pairwise(events))
        alone_s = m * (3 * sum(weights[:p]) + 2 * (p - 1) * transfer_s)  # one microbatch after the other
        assert timeline.step_s <= alone_s * (1 + 1e-9)
