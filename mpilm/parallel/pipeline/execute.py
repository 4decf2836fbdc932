"""The interpreter of a program: walks the list, holds no scheduling logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from mpilm.comm.activity import Activity
from mpilm.comm.base import Comm, Request
from mpilm.parallel.pipeline.actions import Action, Message

POINTS = {"F": "forward", "B": "backward", "I": "backward", "REDUCE": "reduce.before"}


class Stage(Protocol):
    """What a part of the model can do with a microbatch, and the memory of what it sends and receives."""

    def forward(self, microbatch: int) -> None: ...
    def backward(self, microbatch: int) -> None: ...
    def backward_input(self, microbatch: int) -> None: ...
    def backward_weight(self, microbatch: int) -> None: ...
    def reduce(self) -> None: ...
    def input(self, microbatch: int) -> Tensor: ...
    def output(self, microbatch: int) -> Tensor: ...
    def output_gradient(self, microbatch: int) -> Tensor: ...
    def input_gradient(self, microbatch: int) -> Tensor: ...


class Wire:
    """Messages between stages over `comm`, the pipeline axis, on which stage s is rank s modulo the number of ranks.

    One send is under way on a channel at a time: the next one waits for it.
    """

    def __init__(self, comm: Comm):
        self.comm = comm
        self.going: dict[tuple[int, str], Request] = {}
        self.coming: dict[Message, Request] = {}

    def send(self, message: Message, tensor: Tensor) -> None:
        if message.channel in self.going:
            self.going[message.channel].wait()
        self.going[message.channel] = self.comm.isend(tensor, message.stage % self.comm.size, _tag(message))

    def post(self, message: Message, buffer: Tensor) -> None:
        source = message.stage + (1 if message.direction == "B" else -1)
        self.coming[message] = self.comm.irecv(buffer, source % self.comm.size, _tag(message))

    def wait(self, message: Message | None) -> None:
        """Returns when a message for which a receive was posted is there; there is none at the ends of the pipeline."""
        if message in self.coming:
            self.coming.pop(message).wait()

    def drain(self) -> None:
        while self.going:
            self.going.popitem()[1].wait()


def _tag(message: Message) -> int:
    return 2 * message.stage + (message.direction == "B")


def execute(program: Sequence[Action], stages: Mapping[int, Stage], wire: Wire, activity: Activity) -> None:
    """Carry out the actions in their order. Collective over the pipeline axis, and over the data axis through REDUCE.
    `activity` is told of each, without the waiting for its message."""
    for action in program:
        if action.kind in ("F", "B", "I"):
            wire.wait(action.message)
        with activity.span(action):
            if action.kind in POINTS:
                activity.at(POINTS[action.kind])
            _carry_out(action, stages[action.stage], wire)
            if action.kind == "REDUCE":
                activity.at("reduce.after")
    wire.drain()


def _carry_out(action: Action, stage: Stage, wire: Wire) -> None:
    if action.kind == "REDUCE":
        return stage.reduce()
    m, message = action.microbatch, action.message
    assert m is not None
    if action.kind == "W":
        return stage.backward_weight(m)
    assert message is not None
    match action.kind:
        case "F":
            stage.forward(m)
        case "B":
            stage.backward(m)
        case "I":
            stage.backward_input(m)
        case "SEND_F":
            wire.send(message, stage.output(m))
        case "SEND_B":
            wire.send(message, stage.input_gradient(m))
        case "RECV_F":
            wire.post(message, stage.input(m))
        case "RECV_B":
            wire.post(message, stage.output_gradient(m))
