"""Where each parameter of a model goes: the first column of its plan. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

PLACES = {"embed": "first", "blocks": "block", "norm": "last", "head": "last"}
"""Top-level module of any family -> the pipeline stage that has it; blocks are shared out by the cut."""


def stage_of(name: str, cut: Sequence[int]) -> int:
    """The stage of the parameter or module `name`; `cut` holds the number of blocks of each stage."""
    module, number = re.match(r"(\w+)(?:\.(\d+))?", name).groups()  # type: ignore[union-attr]
    match PLACES[module]:
        case "first":
            return 0
        case "last":
            return len(cut) - 1
    return next(stage for stage, stop in enumerate(accumulate(cut)) if int(number) < stop)


def unit_of(name: str) -> str:
    """The module whose parameters are exchanged together, and with ZeRO-3 gathered together: a block, or what stands beside."""
    return re.match(r"\w+(\.\d+)?", name).group()  # type: ignore[union-attr]
