"""One thing a rank does within a step. Text form: "2F0" is stage 2, forward, microbatch 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "REDUCE"]
PATTERN = re.compile(r"(\d+)(F|B|REDUCE)(\d*)")


@dataclass(frozen=True)
class Action:
    """`kind` F: forward of a microbatch; B: its backward; REDUCE: sum the gradients of the stage over the data axis."""

    stage: int
    kind: Kind
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


def parse(text: str) -> Action:
    """The action written as `text`; raises ValueError."""
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no action; write for example 2F0, 0B3, 1REDUCE")
    stage, kind, microbatch = match.groups()
    return Action(int(stage), kind, int(microbatch) if microbatch else None)  # type: ignore[arg-type]
