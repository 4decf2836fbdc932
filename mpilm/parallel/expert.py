"""Expert parallelism: the experts of each mixture divided over the ranks of the expert axis.

A rank computes the tokens of each rank with another copy of its experts. Copies share their values, but each has gradients of
its own: these belong to microbatches of different ranks, and the tree adds them in the order of microbatches.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.model.moe import MixtureOfExperts
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.expert_axis import ExchangeRows, ExpertAxis


def divide_experts(model: nn.Module, axis: ExpertAxis) -> None:
    """Keep this rank's experts of each mixture in `model`, which is on the meta device, with a copy for each other rank."""
    for module in list(model.modules()):
        if isinstance(module, MixtureOfExperts):
            module.experts = nn.ModuleDict({str(number): module.experts[str(number)] for number in axis.local_experts})
            copies = {str(number): copy.deepcopy(module.experts) for number in range(1, axis.comm.size)}
            module.copies = nn.ModuleDict(copies)
            module.apply_experts = partial(_apply_experts, module, axis)  # type: ignore[method-assign]


def _apply_experts(mixture: Any, axis: ExpertAxis, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    sends, receives = axis.count_rows(inputs)
    arrived = ExchangeRows.apply(axis.comm, sends, receives, *inputs)
    experts = [expert for each in (mixture.experts, *mixture.copies.values()) for expert in each.values()]
    outputs = [expert(x) for expert, x in zip(experts, arrived, strict=True)]
    return ExchangeRows.apply(axis.comm, receives, sends, *outputs)


class ExpertLoad:
    """Counts the tokens that training sends to each expert, over all mixtures of a rank."""

    def __init__(self, experts: int, device: torch.device):
        self._counts, self._is_paused = torch.zeros(experts, dtype=torch.int64, device=device), False

    def observe(self, model: nn.Module) -> None:
        """Count what the routers of `model` choose where gradients are computed: once if blocks are recomputed, too."""
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.route = partial(self._route, module.route)  # type: ignore[method-assign]

    def _route(self, route: Callable[..., tuple[Tensor, Tensor]], flat: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        chosen, weights = route(flat, info)
        if torch.is_grad_enabled() and not self._is_paused:
            self._counts += torch.bincount(chosen.flatten(), minlength=len(self._counts))
        return chosen, weights

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count meanwhile."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def take_shares(self, world: Comm) -> list[float]:
        """Return the share of all tokens that each expert has had since the last call. Collective."""
        counts = self._counts.to("cpu", torch.float64)
        self._counts.zero_()
        world.all_reduce(counts)
        return (counts / counts.sum().clamp(min=1)).tolist()
