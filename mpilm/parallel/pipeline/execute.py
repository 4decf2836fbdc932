"""The interpreter of a program: walks the list, holds no scheduling logic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpilm.parallel.pipeline.actions import Action


class Stage(Protocol):
    """What a part of the model can do with a microbatch."""

    def forward(self, microbatch: int) -> None: ...
    def backward(self, microbatch: int) -> None: ...
    def reduce(self) -> None: ...


def execute(program: Sequence[Action], stages: dict[int, Stage]) -> None:
    """Carry out the actions in their order. Collective over the data axis through REDUCE."""
    for action in program:
        stage = stages[action.stage]
        match action.kind:
            case "F":
                stage.forward(_number(action))
            case "B":
                stage.backward(_number(action))
            case "REDUCE":
                stage.reduce()


def _number(action: Action) -> int:
    assert action.microbatch is not None, action
    return action.microbatch
