"""Actions: the smallest parts of a step that a rank executes. Text form: "2F0" is stage 2, forward, microbatch 0."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

ActionKind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE"]
Direction = Literal["F", "B"]
COMPUTE = ("F", "B", "I", "W")
INPUT_GRADIENT = ("B", "I")  # kinds that compute the gradient of a stage's input
WEIGHT_GRADIENT = ("B", "W")  # kinds that compute the gradient of its parameters
PATTERN = re.compile(r"([0-9]+)(?:(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)([0-9]+)|(REDUCE))")


class Message(NamedTuple):
    """A tensor that a stage sends to its neighbour."""

    stage: int  # the receiving stage
    direction: Direction  # F: an activation, from the stage before; B: its gradient, from the stage after
    microbatch: int

    @property
    def channel(self) -> int:
        """The MPI tag: one for each receiving stage and direction. Messages with the same keep their order."""
        return 2 * self.stage + (self.direction == "B")


@dataclass(frozen=True)
class Action:
    """One action of a rank on one of its stages.

    F: forward. B: backward. I and W: the halves of B, the gradients of the input and of the weights (zero bubble, Qi et al.,
    arXiv 2401.10241). SEND_F: send the activation to the next stage. RECV_F: post the receive of the input. SEND_B: send
    the gradient of the input to the previous stage. RECV_B: post the receive of the gradient of the output. REDUCE: sum the
    gradients of the stage over the reduce axes, without a microbatch.
    """

    stage: int
    kind: ActionKind
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @property
    def message(self) -> Message | None:
        """The message that this action sends, receives or, if it computes in the middle of a pipeline, waits for."""
        if self.microbatch is None or self.kind == "W":
            return None
        direction: Direction = "F" if self.kind in ("F", "SEND_F", "RECV_F") else "B"
        hop = {"SEND_F": 1, "SEND_B": -1}.get(self.kind, 0)
        return Message(self.stage + hop, direction, self.microbatch)

    def is_padding(self, real_microbatches: int | None) -> bool:
        """Return whether the replica, which has only the first `real_microbatches` (None: all), lacks this microbatch."""
        return real_microbatches is not None and self.microbatch is not None and self.microbatch >= real_microbatches

    def input_receive(self, stages: int) -> Action | None:
        """Return the receive that this compute action waits for in a pipeline of `stages` stages."""
        if self.kind == "F" and self.stage > 0:
            return replace(self, kind="RECV_F")
        if self.kind in INPUT_GRADIENT and self.stage < stages - 1:
            return replace(self, kind="RECV_B")
        return None

    def output_send(self, stages: int) -> Action | None:
        """Return the send of what this compute action computes for another stage."""
        if self.kind == "F" and self.stage < stages - 1:
            return replace(self, kind="SEND_F")
        if self.kind in INPUT_GRADIENT and self.stage > 0:
            return replace(self, kind="SEND_B")
        return None


def parse_action(text: str) -> Action:
    """Return the action written as `text`; raise ValueError if it is not one."""
    if (match := PATTERN.fullmatch(text)) is None:
        raise ValueError(f"{text!r} is not an action; write for example 2F0, 0B3, 1SEND_F2, 1REDUCE")
    stage, kind, microbatch, reduce = match.groups()
    return Action(int(stage), kind or reduce, int(microbatch) if microbatch else None)  # type: ignore[arg-type]
