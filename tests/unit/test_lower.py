"""Lowering compute actions to programs, and the check of programs that are executed together."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from program_check import check_programs

from mpilm.parallel.pipeline.actions import COMPUTE, parse_action
from mpilm.parallel.pipeline.schedules import SCHEDULES, forward_only, lower, schedule


def parse(text):
    return [parse_action(word) for word in text.split()]


def join(program):
    return " ".join(map(str, program))


@st.composite
def computed(draw):
    """The compute actions of each rank of a pipeline, and its number of stages."""
    name = draw(st.sampled_from([*SCHEDULES, "forward only"]))
    p, v, m = draw(st.integers(1, 6)), draw(st.integers(2, 3)), draw(st.integers(1, 10))
    if name == "forward only":
        return forward_only(p, v, m), p * v
    if name == "interleaved":
        return schedule(name, p, v, m * p), p * v
    return schedule(name, p, 1, m), p


@st.composite
def lowered(draw):
    """The programs of each rank, and how many microbatches are not padding (None: all)."""
    ranks, stages = draw(computed())
    real = draw(st.none() | st.integers(0, len(ranks[0])))
    return [lower(each, stages, real) for each in ranks], real


@pytest.mark.parametrize(
    ("compute", "stages", "program"),
    [
        ("0F0 0B0 0F1 0B1", 1, "0F0 0B0 0F1 0B1 0REDUCE"),
        ("0F0 0F1 0B0 0B1", 2, "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1 0REDUCE"),
        ("1F0 1B0 1F1 1B1", 2, "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE"),
        ("1F0 1I0 1W0", 3, "1RECV_F0 1RECV_B0 1F0 1SEND_F0 1I0 1SEND_B0 1W0 1REDUCE"),
        ("0F0 2F0 2B0 0B0", 4, "2RECV_F0 0F0 0SEND_F0 2RECV_B0 2F0 2SEND_F0 0RECV_B0 2B0 2SEND_B0 2REDUCE 0B0 0REDUCE"),
        ("1F0 1F1", 3, "1RECV_F0 1RECV_F1 1F0 1SEND_F0 1F1 1SEND_F1"),  # forward only: nothing to reduce
        ("", 2, ""),
    ],
)
def test_lower_receives_one_action_ahead_sends_at_once_reduces_last(compute, stages, program):
    assert join(lower(parse(compute), stages)) == program


def test_lower_padding_microbatches_are_computed_but_not_sent():
    program = lower(parse("1F0 1F1 1B0 1B1"), 3, real_microbatches=1)
    assert join(program) == "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1F1 1B0 1SEND_B0 1B1 1REDUCE"


@given(computed())
def test_lower_keeps_the_compute_actions(ranks_and_stages):
    ranks, stages = ranks_and_stages
    for compute in ranks:
        program = lower(compute, stages)
        assert [action for action in program if action.kind in COMPUTE] == compute
        backward = {action.stage for action in compute if action.kind != "F"}
        assert Counter(a.stage for a in program if a.kind == "REDUCE") == Counter(backward)


@given(lowered())
def test_check_programs_accepts_every_schedule(programs_and_real):
    check_programs(*programs_and_real)


@given(lowered())
def test_lower_posts_at_most_two_receives_per_channel(programs_and_real):
    for program in programs_and_real[0]:
        posted = Counter()
        for action in program:
            if action.kind in ("RECV_F", "RECV_B"):
                posted[action.message.channel] += 1
                assert posted[action.message.channel] <= 2
            elif action.kind in ("F", "B", "I") and posted[action.message.channel]:
                posted[action.message.channel] -= 1


def extent(programs):
    compute = [action for program in programs for action in program if action.kind in COMPUTE]
    return [max((part(action) for action in compute), default=None) for part in (lambda a: a.stage, lambda a: a.microbatch)]


@given(lowered(), st.data())
def test_check_programs_missing_or_repeated_action_raises(programs_and_real, data):
    programs, real = programs_and_real
    program = programs[data.draw(st.integers(0, len(programs) - 1))]
    i = data.draw(st.integers(0, len(program) - 1))
    if data.draw(st.booleans()):
        program.insert(data.draw(st.integers(0, len(program))), program[i])
    else:
        before = extent(programs)
        program.pop(i)
        assume(extent(programs) == before)  # a whole stage or microbatch less is a smaller step
    with pytest.raises(ValueError, match=r"rank|stage|compute"):
        check_programs(programs, real)


@given(lowered(), st.data())
def test_check_programs_swapped_actions_of_a_kind_raises(programs_and_real, data):
    """Messages of a channel and backwards of a stage."""
    programs, real = programs_and_real
    program = programs[data.draw(st.integers(0, len(programs) - 1))]
    kinds = Counter((action.stage, action.kind) for action in program if action.kind not in ("F", "REDUCE"))
    assume(any(count > 1 for count in kinds.values()))
    stage, kind = data.draw(st.sampled_from([key for key, count in kinds.items() if count > 1]))
    places = [i for i, action in enumerate(program) if (action.stage, action.kind) == (stage, kind)]
    i, j = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True))
    program[i], program[j] = program[j], program[i]
    with pytest.raises(ValueError, match=r"rank \d+"):
        check_programs(programs, real)


@given(lowered(), st.data())
def test_check_programs_action_before_its_prerequisite_raises(programs_and_real, data):
    """Every action but a receive and the forward of the first stage needs something on its own rank."""
    programs, real = programs_and_real
    program = programs[data.draw(st.integers(0, len(programs) - 1))]
    needy = [i for i, a in enumerate(program) if a.kind in ("B", "I", "W", "SEND_F", "SEND_B", "REDUCE")]
    assume(needy)
    program.insert(0, program.pop(data.draw(st.sampled_from(needy))))
    with pytest.raises(ValueError, match=r"rank \d+: \S+ needs \S+ before it"):
        check_programs(programs, real)


def two_ranks():
    return [lower(compute, 2) for compute in schedule("1f1b", 2, 1, 2)]


@pytest.mark.parametrize(
    ("rank", "found", "put", "message"),
    [
        (1, "1B1", "", "rank 1: 1SEND_B1 needs 1B1 before it"),
        (1, "1RECV_F1", "", "rank 1: 1F1 needs 1RECV_F1 before it"),
        (0, "0SEND_F1", "", "rank 0: missing 0SEND_F1"),
        (0, "0REDUCE", "", "rank 0: missing 0REDUCE"),
        (0, "0F1", "0F1 0F1", "rank 0: 0F1 appears twice"),
        (0, "0B0 0B1", "0B1 0B0", "rank 0: 0B1 needs 0B0 before it"),
        (0, "0F1", "0F1 0W1", "the programs compute B, F, W; expected F, or F and B, or F, I and W"),
        (0, "0F0", "0RECV_F0 0F0", "rank 0: 0RECV_F0 does not belong to this step"),
        (0, "0F1", "0F1 1F1", "rank 1: 1RECV_F0 belongs to another rank: stage 1 is on rank 0"),
        (1, "1B1", "1B1 3F0", "no rank has stage 2"),
    ],
)
def test_check_programs_wrong_program_names_rank_and_action(rank, found, put, message):
    programs = two_ranks()
    programs[rank] = parse(join(programs[rank]).replace(found, put))
    with pytest.raises(ValueError, match="^" + message):
        check_programs(programs)


def test_check_programs_messages_out_of_order_raises():
    sender = parse("0F1 0SEND_F1 0F0 0SEND_F0")
    receiver = parse("1RECV_F0 1RECV_F1 1F0 1F1")
    with pytest.raises(ValueError, match="rank 0 has 0SEND_F1 where rank 1 has 1RECV_F0: messages keep their order"):
        check_programs([sender, receiver])


def test_check_programs_empty_programs_raises():
    with pytest.raises(ValueError, match="compute nothing"):
        check_programs([[], []])


def test_check_programs_circular_wait_names_the_deadlock():
    """Rank 1 starts with its second chunk, whose input comes from rank 0's second, which waits for rank 1's first."""
    compute = ["0F0 2F0", "3F0 1F0"]
    with pytest.raises(ValueError, match="deadlock") as caught:
        check_programs([lower(parse(each), 4) for each in compute])
    assert str(caught.value) == (
        "deadlock: rank 0 waits at 2F0 for the send of the activation of microbatch 0 from stage 1 to stage 2; "
        "rank 1 waits at 3F0 for the send of the activation of microbatch 0 from stage 2 to stage 3"
    )


def test_check_programs_second_unbuffered_message_raises():
    """Three forwards of one stage precede the first one of the other stage on the same rank."""
    with pytest.raises(ValueError, match="rank 0 waits at 0SEND_F1 for the receive of the activation of microbatch 0"):
        check_programs([lower(parse("0F0 0F1 0F2 1F0 1F1 1F2"), 2)])
