"""A stage of a pipeline is the whole model less what belongs to other stages: parameter names stay the serial ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mpilm.parallel.plan import stage_of


def keep_stage(model: nn.Module, stage: int, cut: Sequence[int]) -> None:
    """Take away from `model` all modules with parameters that other stages have."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleDict):
            for key in list(child):
                if stage_of(f"{name}.{key}", cut) != stage:
                    del child[key]
        elif next(child.parameters(), None) is not None and stage_of(name, cut) != stage:
            setattr(model, name, None)
