"""One thing a rank does within a step. Text form: "2F0" is stage 2, forward, microbatch 0."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE"]
COMPUTE = ("F", "B", "I", "W")
INPUT_GRADIENT = ("B", "I")  # what makes the gradient of a stage's input
WEIGHT_GRADIENT = ("B", "W")  # what makes the gradient of its parameters
PATTERN = re.compile(r"([0-9]+)(?:(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)([0-9]+)|(REDUCE))")


class Message(NamedTuple):
    """What one stage sends to its neighbour; messages of equal stage and direction keep their order, as MPI's do."""

    stage: int
    """The stage that receives it."""
    direction: Literal["F", "B"]
    """F: an activation, from the stage before; B: its gradient, from the stage after."""
    microbatch: int

    @property
    def channel(self) -> tuple[int, str]:
        """What messages are ordered within: the receiving stage and the direction."""
        return self.stage, self.direction


@dataclass(frozen=True)
class Action:
    """`kind` says what the rank does with a microbatch of one of its stages.

    F: forward; B: backward; I and W: the halves of B, the gradient of the input and that of the weights (zero bubble,
    Qi et al., arXiv 2401.10241). SEND_F: send the activation to the next stage; RECV_F: post the receive of the input;
    SEND_B: send the gradient of the input to the stage before; RECV_B: post the receive of the gradient of the output.
    REDUCE: sum the gradients of the stage over the data axis, without a microbatch.
    """

    stage: int
    kind: Kind
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @property
    def message(self) -> Message | None:
        """What it sends, receives or, in the middle of a pipeline, waits for."""
        if self.microbatch is None or self.kind == "W":
            return None
        match self.kind:
            case "F" | "RECV_F":
                return Message(self.stage, "F", self.microbatch)
            case "SEND_F":
                return Message(self.stage + 1, "F", self.microbatch)
            case "SEND_B":
                return Message(self.stage - 1, "B", self.microbatch)
        return Message(self.stage, "B", self.microbatch)

    def absent(self, present: int | None) -> bool:
        """Whether its microbatch does not exist on a replica that has the first `present` ones; None: it has all."""
        return present is not None and self.microbatch is not None and self.microbatch >= present

    def receive(self, stages: int) -> Action | None:
        """The receive that this compute action waits for, in a pipeline of so many stages."""
        if self.kind == "F" and self.stage > 0:
            return replace(self, kind="RECV_F")
        if self.kind in INPUT_GRADIENT and self.stage < stages - 1:
            return replace(self, kind="RECV_B")
        return None

    def send(self, stages: int) -> Action | None:
        """The send of what this compute action makes for another stage."""
        if self.kind == "F" and self.stage < stages - 1:
            return replace(self, kind="SEND_F")
        if self.kind in INPUT_GRADIENT and self.stage > 0:
            return replace(self, kind="SEND_B")
        return None


def parse(text: str) -> Action:
    """The action written as `text`; raises ValueError."""
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no action; write for example 2F0, 0B3, 1SEND_F2, 1REDUCE")
    stage, kind, microbatch, reduce = match.groups()
    return Action(int(stage), kind or reduce, int(microbatch) if microbatch else None)  # type: ignore[arg-type]
