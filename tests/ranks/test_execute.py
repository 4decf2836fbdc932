"""The interpreter: what the list says, in its order, and each message to whom it is for, also where nothing is buffered."""

from collections import Counter
from functools import cache, partialmethod
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from runs import differing, joined, on, run, run_threads, serial, small

from mpilm.comm.base import Request, SelfComm, unpack_into
from mpilm.comm.progress import Progress
from mpilm.comm.threads import PeerFailedError, ThreadComm, run_ranks
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.ops.tree import block_of_rank
from mpilm.parallel.pipeline.actions import Action, Message
from mpilm.parallel.pipeline.execute import StageMessenger, execute
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import SCHEDULES, forward_only

COMPUTE = {**SCHEDULES, "forward only": forward_only}


class Unbuffered(ThreadComm):
    """A send is over once its receive is posted, no earlier, and the data travel as late as may be: when one of the two ranks
    waits. Posting a receive spoils its buffer; whoever writes on what is still being sent is found out."""

    def split(self, color, key, name):
        return unbuffered(super().split(color, key, name))

    def _isend(self, x, to, tag):
        request, sent = self._meet(self._next_message("send", self.rank, to, tag), "from", x), x.clone()

        def finish():
            request.wait()
            assert torch.equal(x, sent), "written on while it was being sent"

        return Request(finish)

    def _irecv(self, out, source, tag):
        return self._meet(self._next_message("receive", source, self.rank, tag), "to", out.fill_(-99))

    def _meet(self, key, end, buffer):
        world = self._world
        with world.condition:
            (ends := world.messages.setdefault(key, {}))[end] = buffer
            world.condition.notify_all()

        def finish():
            with world.condition:
                there = world.condition.wait_for(lambda: world.failure or len(ends) > 1, world.timeout_s)
                if world.failure or not there:
                    raise PeerFailedError(world.failure or f"nobody is at the other end of {key}")
                if "arrived" not in ends:
                    unpack_into([ends["from"]], ends["to"])
                ends["arrived"] = True

        return Request(finish)


def unbuffered(comm):
    return Unbuffered(comm._world, comm._group, comm.rank, comm.name, comm._path)


class Numbers:
    """A stage whose activations and gradients are numbers: which of the two, of which stage, microbatch and step.

    `said`: what the stages of a rank are asked, step by step. Nothing is received for microbatches from `present` on.
    """

    def __init__(self, stage, stages, said, present=None, data=None, hears=lambda action: None):
        self.stage, self.stages, self.said, self.present, self.hears = stage, stages, said, present, hears
        self.data, self.received, self.gradients = data or SelfComm("data"), {}, torch.tensor(0)

    def _say(self, kind, microbatch=None):
        self.said[-1].append(Action(self.stage, kind, microbatch))
        self.hears(self.said[-1][-1])

    def _numbers(self, way, stage, microbatch):
        return torch.tensor([["FB".index(way), stage], [microbatch, len(self.said)]])

    def _compute(self, kind, microbatch):
        self._say(kind, microbatch)
        way, neighbour = ("F", self.stage - 1) if kind == "F" else ("B", self.stage + 1)
        if self.present is None or microbatch < self.present:
            self.gradients += kind in ("B", "W")
            if kind != "W" and 0 <= neighbour < self.stages:
                assert torch.equal(self.received.pop((way, microbatch)), self._numbers(way, neighbour, microbatch))

    def _receive(self, way, microbatch):
        self._say(f"RECV_{way}", microbatch)
        return self.received.setdefault((way, microbatch), torch.zeros(2, 2, dtype=torch.int64))

    def _send(self, way, microbatch):
        self._say(f"SEND_{way}", microbatch)
        return self._numbers(way, self.stage, microbatch)

    def reduce(self):
        self._say("REDUCE")
        self.data.all_reduce(self.gradients)

    forward, backward = partialmethod(_compute, "F"), partialmethod(_compute, "B")
    backward_input, backward_weight = partialmethod(_compute, "I"), partialmethod(_compute, "W")
    input, output_gradient = partialmethod(_receive, "F"), partialmethod(_receive, "B")
    output, input_gradient = partialmethod(_send, "F"), partialmethod(_send, "B")


def carried_out(program, stages, wire):
    progress = Progress()
    progress.drain_spans()
    execute(program, stages, wire, progress)
    return progress.drain_spans()


def walked(comm, program, steps=1, **options):
    """What the stages of a rank are asked in each step of a program, and how many gradients each has in the end."""
    said, wire, own = [], StageMessenger(comm), {action.stage for action in program}
    stages = {stage: Numbers(stage, comm.size * len(own), said, **options) for stage in own}
    for _ in range(steps):
        said.append([])
        assert [span.event for span in carried_out(program, stages, wire)] == program
        assert not any([wire.sends, wire.receives, *(stage.received for stage in stages.values())])  # all is sent and used
    return said, [int(stage.gradients) for stage in stages.values()]


def programs(name, size, chunks, microbatches, present=None):
    return [lower(actions, size * chunks, present) for actions in COMPUTE[name](size, chunks, microbatches)]


def cases():
    """Schedule, ranks, chunks, microbatches, and how many of them are there (None: all)."""
    for size in (1, 2, 3, 4, 8):
        for name in ("1f1b", "gpipe", "zero-bubble"):
            yield from ((name, size, 1, 1, None), (name, size, 1, 3, 2), (name, size, 1, size + 1, None))
        yield from (("interleaved", size, 2, max(8 // size, 1) * size, None), ("interleaved", size, 3, size, size - 1))
        yield from (("forward only", size, 2, size + 1, size), ("forward only", size, 3, 2, 0))


@pytest.mark.parametrize("wire", [lambda comm: comm, unbuffered], ids=["copied", "not copied"])
@pytest.mark.parametrize(("name", "size", "chunks", "count", "present"), list(cases()))
def test_stages_do_what_the_list_says_and_receive_what_their_neighbours_sent(name, size, chunks, count, present, wire):
    each = programs(name, size, chunks, count, present)
    found = run_ranks(size, lambda comm: walked(wire(comm), each[comm.rank], steps=2, present=present), timeout_s=20.0)
    assert [steps for steps, _ in found] == [[program, program] for program in each]


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("gpipe", 1), ("zero-bubble", 1), ("interleaved", 3)])
def test_one_rank_alone_runs_the_same_list(name, chunks):
    (program,) = programs(name, 1, chunks, 4)
    assert walked(SelfComm("pipeline"), program)[0] == [program]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("pipeline", "data", "total"), [(1, 3, 7), (2, 2, 7), (2, 3, 11), (3, 2, 11)])
def test_a_stage_meets_its_replicas_once_when_all_its_gradients_are_there(name, pipeline, data, total):
    chunks, count = 2 if name == "interleaved" else 1, -(-total // data)  # some replicas have one fewer

    def body(comm):
        mesh = Mesh.build(MeshShape(pipeline=pipeline, data=data), comm)
        start, stop = block_of_rank(mesh.coordinate["data"], data, total)
        program = programs(name, pipeline, chunks, count, stop - start)[mesh.coordinate["pipeline"]]
        return walked(mesh.comm("pipeline"), program, present=stop - start, data=mesh.comm("data"))

    for (said,), gradients in run_ranks(pipeline * data, body):
        assert gradients == [total] * chunks
        assert Counter(a.stage for a in said if a.kind == "REDUCE") == dict.fromkeys({a.stage for a in said}, 1)


def test_a_program_that_needs_a_buffer_gets_stuck_without_one():
    """So that not getting stuck above means something."""
    program = lower([Action(stage, "F", microbatch) for stage in (0, 1) for microbatch in (0, 1, 2)], 2)
    assert run_ranks(1, lambda comm: walked(comm, program)[0]) == [[program]]
    with pytest.raises(PeerFailedError, match="nobody is at the other end"):
        run_ranks(1, lambda comm: walked(unbuffered(comm), program), timeout_s=0.05)


LAYOUTS = [(2, on(2, "zero-bubble")), (2, on(2, "gpipe")), (3, on(3)), (4, on(2, "interleaved", 3))]


@cache
def alone(config):
    return run_threads(1, config, steps=1)


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_no_memory_of_a_model_is_used_again_while_its_message_is_under_way(size, layout):
    """Without dropout, which would copy on the way."""
    config = small(**layout, model__dropout=0.0)
    left = run_ranks(size, lambda comm: run(config, unbuffered(comm), steps=1), timeout_s=30.0)
    numbers, tensors = alone(serial(config))
    assert [theirs.numbers for theirs in left] == [numbers] * size
    assert differing(joined([theirs.held for theirs in left]), tensors) == []


def test_a_channel_has_one_send_under_way():
    said = []

    def isend(x, to, tag):
        said.append(f"send {x:g}")
        return Request(lambda: said.append(f"sent {x:g}"))

    wire = StageMessenger(SimpleNamespace(size=4, isend=isend))
    for stage, way, microbatch in [(1, "F", 0), (1, "B", 1), (2, "F", 2), (1, "F", 3), (1, "F", 4), (2, "F", 5)]:
        wire.send(Message(stage, way, microbatch), torch.tensor(float(microbatch)))
    assert said == ["send 0", "send 1", "send 2", "sent 0", "send 3", "sent 3", "send 4", "sent 2", "send 5"]
    wire.drain()
    assert sorted(said[9:]) == ["sent 1", "sent 4", "sent 5"]


def test_messages_find_their_receives_in_any_order_of_the_channels():
    wire, messages = StageMessenger(SelfComm("pipeline")), [Message(stage, way, 0) for stage in (1, 2) for way in "FB"]
    buffers = [torch.tensor(-1), torch.tensor(-1), torch.tensor(-1), torch.tensor(-1)]
    for number in (3, 1, 0, 2):
        wire.post_receive(messages[number], buffers[number])
    for number, message in enumerate(messages):
        wire.send(message, torch.tensor(number))
        wire.wait(message)
    assert buffers == [0, 1, 2, 3]


@pytest.mark.parametrize("action", programs("zero-bubble", 3, 1, 2)[1], ids=str)
def test_what_a_stage_raises_comes_out_as_it_was_and_nothing_is_done_after_it(action):
    each, error, done = programs("zero-bubble", 3, 1, 2), ArithmeticError(), []

    def hears(heard):
        done.append(heard)
        if heard == action:
            raise error

    with pytest.raises(ArithmeticError) as caught:
        run_ranks(3, lambda comm: walked(comm, each[comm.rank], hears=hears if comm.rank == 1 else str))
    assert caught.value is error
    assert done == each[1][: each[1].index(action) + 1]


def test_times_are_those_of_the_actions_without_the_wait_for_what_they_need():
    clock = SimpleNamespace(seconds=5.0)
    cost_s = {"F": 1, "B": 2, "REDUCE": 4, "RECV_F": 8, "RECV_B": 16, "SEND_F": 32, "SEND_B": 64}

    def hears(action):
        clock.seconds += cost_s[action.kind]

    class SlowWire(StageMessenger):
        def wait(self, message):
            clock.seconds += 100.0 if message in self.receives else 0.0
            super().wait(message)

    (program,) = programs("interleaved", 1, 2, 1)
    assert " ".join(map(str, program)) == "1RECV_F0 0F0 0SEND_F0 1F0 0RECV_B0 1B0 1SEND_B0 1REDUCE 0B0 0REDUCE"
    stages = {stage: Numbers(stage, 2, [[]], hears=hears) for stage in (0, 1)}
    with mock.patch("mpilm.comm.progress.time", SimpleNamespace(monotonic=lambda: clock.seconds)):
        spans = carried_out(program, stages, SlowWire(SelfComm("pipeline")))
    assert [span.end_s - span.start_s for span in spans] == [cost_s[action.kind] for action in program]
    waits = [span.start_s - before for span, before in zip(spans, [5.0, *(span.end_s for span in spans)])]
    assert waits == [100.0 if str(action) in ("1F0", "0B0") else 0.0 for action in program]
