"""The interpreter of pipeline programs: every action in order, every message to its receiver, also with unbuffered sends."""

from collections import Counter
from functools import cache, partialmethod
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from runs import assemble, differing, layout, serial_config, small_config, train_on_threads, train_steps
from thread_ranks import PeerFailedError, ThreadComm, run_ranks

from mpilm.comm.base import Request, SelfComm, unpack_into
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.ops.tree import block_of_rank
from mpilm.parallel.pipeline.actions import Action, Message
from mpilm.parallel.pipeline.execute import StageMessenger, execute
from mpilm.parallel.pipeline.schedules import SCHEDULES, forward_only, lower

ALL_SCHEDULES = {**SCHEDULES, "forward only": forward_only}


class UnbufferedComm(ThreadComm):
    """Sends end once their receive is posted, and data move as late as possible: when one of the two ranks waits.

    Posting a receive overwrites its buffer; a sender that changes a tensor in flight is detected.
    """

    def split(self, color, key, name):
        return unbuffered(super().split(color, key, name))

    def _isend(self, x, to, tag):
        request, sent = self._match(self._next_message("send", self.rank, to, tag), "from", x), x.clone()

        def finish():
            request.wait()
            assert torch.equal(x, sent), "changed while it was sent"

        return Request(finish)

    def _irecv(self, out, source, tag):
        return self._match(self._next_message("receive", source, self.rank, tag), "to", out.fill_(-99))

    def _match(self, key, end, buffer):
        world = self._world
        with world.condition:
            (ends := world.messages.setdefault(key, {}))[end] = buffer
            world.condition.notify_all()

        def finish():
            with world.condition:
                matched = world.condition.wait_for(lambda: world.failure or len(ends) > 1, world.timeout_s)
                if world.failure or not matched:
                    raise PeerFailedError(world.failure or f"nobody is at the other end of {key}")
                if "arrived" not in ends:
                    unpack_into([ends["from"]], ends["to"])
                ends["arrived"] = True

        return Request(finish)


def unbuffered(comm):
    return UnbufferedComm(comm._world, comm._group, comm.rank, comm.name, comm._path)


class NumberStage:
    """A stage whose activations and gradients are numbers: which of the two, of which stage, microbatch and step.

    `steps`: receives the actions of all stages of a rank, step by step. Microbatches from `present` on do not exist.
    """

    def __init__(self, stage, stages, steps, present=None, data=None, on_action=lambda action: None):
        self.stage, self.stages, self.steps, self.present, self.on_action = stage, stages, steps, present, on_action
        self.data, self.received, self.gradients = data or SelfComm("data"), {}, torch.tensor(0)

    def _record(self, kind, microbatch=None):
        self.steps[-1].append(Action(self.stage, kind, microbatch))
        self.on_action(self.steps[-1][-1])

    def _message(self, direction, stage, microbatch):
        return torch.tensor([["FB".index(direction), stage], [microbatch, len(self.steps)]])

    def _compute(self, kind, microbatch):
        self._record(kind, microbatch)
        direction, neighbour = ("F", self.stage - 1) if kind == "F" else ("B", self.stage + 1)
        if self.present is None or microbatch < self.present:
            self.gradients += kind in ("B", "W")
            if kind != "W" and 0 <= neighbour < self.stages:
                assert torch.equal(self.received.pop((direction, microbatch)), self._message(direction, neighbour, microbatch))

    def receive_buffer(self, direction, microbatch):
        self._record(f"RECV_{direction}", microbatch)
        return self.received.setdefault((direction, microbatch), torch.zeros(2, 2, dtype=torch.int64))

    def pop_outgoing(self, direction, microbatch):
        self._record(f"SEND_{direction}", microbatch)
        return self._message(direction, self.stage, microbatch)

    def reduce(self):
        self._record("REDUCE")
        self.data.all_reduce(self.gradients)

    forward, backward = partialmethod(_compute, "F"), partialmethod(_compute, "B")
    backward_input, backward_weight = partialmethod(_compute, "I"), partialmethod(_compute, "W")


def execute_recorded(program, stages, messenger):
    recorder = FlightRecorder()
    recorder.drain_spans()
    execute(program, stages, messenger, recorder)
    return recorder.drain_spans()


def run_program(comm, program, steps=1, **options):
    """Return the actions of a rank's stages in each step of a program, and the number of gradients of each stage."""
    recorded, messenger, own = [], StageMessenger(comm), {action.stage for action in program}
    stages = {stage: NumberStage(stage, comm.size * len(own), recorded, **options) for stage in own}
    for _ in range(steps):
        recorded.append([])
        assert [span.event for span in execute_recorded(program, stages, messenger)] == program
        assert not any([messenger.sends, messenger.receives, *(stage.received for stage in stages.values())])
    return recorded, [int(stage.gradients) for stage in stages.values()]


def programs(name, size, chunks, microbatches, present=None):
    return [lower(actions, size * chunks, present) for actions in ALL_SCHEDULES[name](size, chunks, microbatches)]


def program_cases():
    """Yield schedule, ranks, chunks, microbatches, and how many of these exist (None: all)."""
    for size in (1, 2, 3, 4, 8):
        for name in ("1f1b", "gpipe", "zero-bubble"):
            yield from ((name, size, 1, 1, None), (name, size, 1, 3, 2), (name, size, 1, size + 1, None))
        yield from (("interleaved", size, 2, max(8 // size, 1) * size, None), ("interleaved", size, 3, size, size - 1))
        yield from (("forward only", size, 2, size + 1, size), ("forward only", size, 3, 2, 0))


@pytest.mark.parametrize("wrap", [lambda comm: comm, unbuffered], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("name", "size", "chunks", "count", "present"), list(program_cases()))
def test_stages_follow_the_program_and_receive_their_neighbours_messages(name, size, chunks, count, present, wrap):
    each = programs(name, size, chunks, count, present)
    found = run_ranks(size, lambda comm: run_program(wrap(comm), each[comm.rank], steps=2, present=present), timeout_s=20.0)
    assert [steps for steps, _ in found] == [[program, program] for program in each]


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("gpipe", 1), ("zero-bubble", 1), ("interleaved", 3)])
def test_single_rank_follows_the_program(name, chunks):
    (program,) = programs(name, 1, chunks, 4)
    assert run_program(SelfComm("pipeline"), program)[0] == [program]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("pipeline", "data", "total"), [(1, 3, 7), (2, 2, 7), (2, 3, 11), (3, 2, 11)])
def test_stage_reduces_once_after_its_last_gradient(name, pipeline, data, total):
    chunks, count = 2 if name == "interleaved" else 1, -(-total // data)  # some replicas have one fewer

    def body(comm):
        mesh = Mesh(MeshShape(pipeline=pipeline, data=data), comm)
        start, stop = block_of_rank(mesh.coordinate["data"], data, total)
        program = programs(name, pipeline, chunks, count, stop - start)[mesh.coordinate["pipeline"]]
        return run_program(mesh.comm("pipeline"), program, present=stop - start, data=mesh.comm("data"))

    for (actions,), gradients in run_ranks(pipeline * data, body):
        assert gradients == [total] * chunks
        assert Counter(a.stage for a in actions if a.kind == "REDUCE") == dict.fromkeys({a.stage for a in actions}, 1)


def test_program_that_needs_buffered_sends_hangs_without_them():
    """The unbuffered communicator above can therefore tell such programs apart."""
    program = lower([Action(stage, "F", microbatch) for stage in (0, 1) for microbatch in (0, 1, 2)], 2)
    assert run_ranks(1, lambda comm: run_program(comm, program)[0]) == [[program]]
    with pytest.raises(PeerFailedError, match="nobody is at the other end"):
        run_ranks(1, lambda comm: run_program(unbuffered(comm), program), timeout_s=0.05)


@cache
def train_serially(config):
    return train_on_threads(1, config, steps=1)


@pytest.mark.parametrize(
    ("size", "settings"),
    [(2, layout(2, "zero-bubble")), (2, layout(2, "gpipe")), (3, layout(3)), (4, layout(2, "interleaved", 3))],
)
def test_model_reuses_no_memory_of_a_message_in_flight(size, settings):
    """Without dropout, which would copy the activations."""
    config = small_config(**settings, model__dropout=0.0, train__global_batch=4)
    outcomes = run_ranks(size, lambda comm: train_steps(config, unbuffered(comm), steps=1), timeout_s=30.0)
    numbers, tensors = train_serially(serial_config(config))
    assert [outcome.numbers for outcome in outcomes] == [numbers] * size
    assert differing(assemble([outcome.state for outcome in outcomes]), tensors) == []


def test_channel_has_one_send_in_flight():
    events = []

    def isend(x, to, tag):
        events.append(f"send {x:g}")
        return Request(lambda: events.append(f"sent {x:g}"))

    messenger = StageMessenger(SimpleNamespace(size=4, isend=isend))
    for stage, direction, microbatch in [(1, "F", 0), (1, "B", 1), (2, "F", 2), (1, "F", 3), (1, "F", 4), (2, "F", 5)]:
        messenger.send(Message(stage, direction, microbatch), torch.tensor(float(microbatch)))
    assert events == ["send 0", "send 1", "send 2", "sent 0", "send 3", "sent 3", "send 4", "sent 2", "send 5"]
    messenger.drain()
    assert sorted(events[9:]) == ["sent 1", "sent 4", "sent 5"]


def test_messages_match_receives_posted_in_any_order():
    messenger = StageMessenger(SelfComm("pipeline"))
    messages = [Message(stage, direction, 0) for stage in (1, 2) for direction in "FB"]
    buffers = [torch.tensor(-1), torch.tensor(-1), torch.tensor(-1), torch.tensor(-1)]
    for number in (3, 1, 0, 2):
        messenger.post_receive(messages[number], buffers[number])
    for number, message in enumerate(messages):
        messenger.send(message, torch.tensor(number))
        messenger.wait(message)
    assert buffers == [0, 1, 2, 3]


@pytest.mark.parametrize("action", programs("zero-bubble", 3, 1, 2)[1], ids=str)
def test_error_of_a_stage_is_raised_unchanged_and_ends_the_program(action):
    each, error, done = programs("zero-bubble", 3, 1, 2), ArithmeticError(), []

    def on_action(completed):
        done.append(completed)
        if completed == action:
            raise error

    with pytest.raises(ArithmeticError) as caught:
        run_ranks(3, lambda comm: run_program(comm, each[comm.rank], on_action=on_action if comm.rank == 1 else str))
    assert caught.value is error
    assert done == each[1][: each[1].index(action) + 1]


def test_spans_of_actions_exclude_the_wait_for_their_message():
    clock = SimpleNamespace(seconds=5.0)
    cost_s = {"F": 1, "B": 2, "REDUCE": 4, "RECV_F": 8, "RECV_B": 16, "SEND_F": 32, "SEND_B": 64}

    def on_action(action):
        clock.seconds += cost_s[action.kind]

    class SlowMessenger(StageMessenger):
        def wait(self, message):
            clock.seconds += 100.0 if message in self.receives else 0.0
            super().wait(message)

    (program,) = programs("interleaved", 1, 2, 1)
    assert " ".join(map(str, program)) == "1RECV_F0 0F0 0SEND_F0 1F0 0RECV_B0 1B0 1SEND_B0 1REDUCE 0B0 0REDUCE"
    stages = {stage: NumberStage(stage, 2, [[]], on_action=on_action) for stage in (0, 1)}
    with mock.patch("mpilm.comm.flight_recorder.time", SimpleNamespace(monotonic=lambda: clock.seconds)):
        spans = execute_recorded(program, stages, SlowMessenger(SelfComm("pipeline")))
    assert [span.end_s - span.start_s for span in spans] == [cost_s[action.kind] for action in program]
    waits = [span.start_s - before for span, before in zip(spans, [5.0, *(span.end_s for span in spans)])]
    assert waits == [100.0 if str(action) in ("1F0", "0B0") else 0.0 for action in program]
