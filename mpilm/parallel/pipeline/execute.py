"""The interpreter of a pipeline program: it walks the list of actions and contains no scheduling logic."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mpilm.comm.base import Comm, Request
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.parallel.pipeline.actions import Action, Message
from mpilm.parallel.pipeline.stage import ModelStage


class StageMessenger:
    """Messages between stages over `comm`; stage s is on rank s modulo its size. A send waits for the last of its channel."""

    def __init__(self, comm: Comm):
        self.comm = comm
        self.sends: dict[int, Request] = {}
        self.receives: dict[Message, Request] = {}

    def send(self, message: Message, tensor: Tensor) -> None:
        self.sends.pop(message.channel, Request()).wait()
        self.sends[message.channel] = self.comm.isend(tensor, message.stage % self.comm.size, message.channel)

    def post_receive(self, message: Message, buffer: Tensor) -> None:
        source = message.stage + (1 if message.direction == "B" else -1)
        self.receives[message] = self.comm.irecv(buffer, source % self.comm.size, message.channel)

    def wait(self, message: Message | None) -> None:
        """Return when a message has arrived. At the ends of the pipeline no receive was posted."""
        if message in self.receives:
            self.receives.pop(message).wait()

    def drain(self) -> None:
        while self.sends:
            self.sends.popitem()[1].wait()


def execute(
    program: Sequence[Action], stages: Mapping[int, ModelStage], messenger: StageMessenger, recorder: FlightRecorder
) -> None:
    """Execute the actions in order, recorded without the waits for messages. Collective over the pipeline and reduce axes."""
    for action in program:
        if action.kind in ("F", "B", "I"):
            messenger.wait(action.message)
        with recorder.span(action):
            _execute_action(action, stages[action.stage], messenger)
    messenger.drain()


def _execute_action(action: Action, stage: ModelStage, messenger: StageMessenger) -> None:
    m, message = action.microbatch, action.message
    if m is None:  # REDUCE
        return stage.reduce()
    if message is None:  # W
        return stage.backward_weight(m)
    match action.kind:
        case "F":
            stage.forward(m)
        case "B":
            stage.backward(m)
        case "I":
            stage.backward_input(m)
        case "SEND_F" | "SEND_B":
            messenger.send(message, stage.pop_outgoing(message.direction, m))
        case "RECV_F" | "RECV_B":
            messenger.post_receive(message, stage.receive_buffer(message.direction, m))
