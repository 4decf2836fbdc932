"""Schedules as lists of actions: complete, in order, and with no more microbatches alive than promised."""

import pytest

from mpilm.parallel.pipeline.actions import Action, parse
from mpilm.parallel.pipeline.execute import execute
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import one_f_one_b

STAGES = range(1, 7)


@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("m", range(1, 13))
def test_1f1b(p, m):
    numbers = range(10, 10 + m)
    schedule = one_f_one_b(p, numbers)
    assert len(schedule) == p
    for stage, actions in enumerate(schedule):
        assert {action.stage for action in actions} == {stage}
        for kind in "FB":  # each once, in order
            assert [action.microbatch for action in actions if action.kind == kind] == list(numbers)
        assert len(actions) == 2 * m
        alive, most = set(), 0
        for action in actions:
            (alive.add if action.kind == "F" else alive.remove)(action.microbatch)  # a backward before its forward raises
            most = max(most, len(alive))
        assert most == min(p - stage, m)


@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_stages_that_wait_for_each_other_get_to_the_end(p, m):
    queues = [list(actions) for actions in one_f_one_b(p, range(m))]
    done = set()
    while any(queues):
        ready = [q for q in queues if q and _needs(q[0], p) <= done]
        assert ready, f"deadlock before {[str(q[0]) for q in queues if q]}"
        for queue in ready:
            done.add(str(queue.pop(0)))


def _needs(action, p):
    """What must have happened on other stages."""
    if action.kind == "F":
        return {f"{action.stage - 1}F{action.microbatch}"} if action.stage else set()
    return {f"{action.stage + 1}B{action.microbatch}"} if action.stage < p - 1 else set()


def test_one_stage_is_gradient_accumulation():
    assert " ".join(map(str, one_f_one_b(1, range(3))[0])) == "0F0 0B0 0F1 0B1 0F2 0B2"
    assert " ".join(map(str, one_f_one_b(3, range(4))[1])) == "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3"


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 4), (3, 5), (6, 2)])
def test_lowering_adds_one_reduce_after_the_last_backward(p, m):
    for stage, actions in enumerate(one_f_one_b(p, range(m))):
        program = lower(actions)
        assert [action for action in program if action.kind != "REDUCE"] == actions
        assert program[-1] == Action(stage, "REDUCE")
        assert len(program) == len(actions) + 1


def test_each_of_several_stages_of_a_rank_is_reduced_as_soon_as_it_is_done():
    program = lower([parse(text) for text in ["0F0", "1F0", "1B0", "0B0", "0F1", "0B1"]])
    assert " ".join(map(str, program)) == "0F0 1F0 1B0 1REDUCE 0B0 0F1 0B1 0REDUCE"


@pytest.mark.parametrize("action", [Action(0, "F", 0), Action(12, "B", 345), Action(3, "REDUCE")])
def test_text_and_back(action):
    assert parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F1 ", "-1F0", "0f0"])
def test_what_is_no_action(text):
    with pytest.raises(ValueError, match="is no action"):
        parse(text)


def test_the_interpreter_does_what_the_list_says():
    said = []

    class Recorder:
        def __init__(self, stage):
            self.stage = stage

        def forward(self, microbatch):
            said.append(f"{self.stage}F{microbatch}")

        def backward(self, microbatch):
            said.append(f"{self.stage}B{microbatch}")

        def reduce(self):
            said.append(f"{self.stage}REDUCE")

    words = ["2F0", "2F1", "2B1", "0F7", "2B0", "2REDUCE", "0B7", "0REDUCE"]
    execute([parse(word) for word in words], {0: Recorder(0), 2: Recorder(2)})
    assert said == words
