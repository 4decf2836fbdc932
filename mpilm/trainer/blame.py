"""Where a step went wrong whose loss or gradient is not finite: computed once more, and looked at on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.trainer.sharded import ShardedModel
from mpilm.trainer.step import Source, gradients


def blame(model: ShardedModel, source: Source, step: int) -> str:
    """The rank and the microbatch of a step that are not finite, and what in them. Collective; leaves the sums as they come."""
    mine: list[tuple[int, str]] = []
    with contextlib.ExitStack() as stack:
        for stage in model.stages.values():
            stack.enter_context(_watched(stage, mine))
        gradients(model, source, step)
    losses = [(m, "loss") for m, loss in model.results().items() if not torch.isfinite(loss).all()]
    everyone = model.mesh.world.all_gather_json(min(losses or mine, default=None))
    found = [(rank, *bad) for rank, bad in enumerate(everyone) if bad is not None]
    if not found:
        return "not so when computed once more: a processor or its memory may be failing"
    words = [f"rank {rank}, microbatch {m}: {what}" for rank, m, what in sorted(found, key=lambda bad: bad[1])]
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more ranks" if len(words) > 3 else "")


@contextlib.contextmanager
def _watched(stage: ModelStage, found: list[tuple[int, str]]) -> Iterator[None]:
    """Note each gradient of a stage that is not finite, with its microbatch."""

    def note(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            found.append((stage.feed.numbers[stage.in_backward], f"gradient of {name}"))

    def noted(microbatch: int) -> Iterator[tuple[str, Tensor]]:
        for name, gradient in deferred(microbatch):
            note(name, gradient)
            yield name, gradient

    deferred, hooks = stage.store.gradients, list[Any]()
    for name, parameter in stage.model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(lambda gradient, name=name: note(name, gradient)))
    stage.store.gradients = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        del stage.store.gradients
        for hook in hooks:
            hook.remove()
