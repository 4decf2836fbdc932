"""AdamW over the flat parameters, by torch's own fused implementation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpilm.config import Train
from mpilm.parallel.flat import FlatParameters

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Decoupled weight decay on matrices only (Loshchilov and Hutter, arXiv 1711.05101); updates `flat` in place.

    `flat_moments` holds each moment as one long vector laid out like the parameters, `moments` the same by name.
    """

    def __init__(self, flat: FlatParameters, train: Train):
        self.parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in flat.by_name.items()}
        self.flat_moments = {kind: torch.zeros_like(flat.values) for kind in MOMENTS}
        self.moments = {kind: flat.owned.views(moment) for kind, moment in self.flat_moments.items()}
        layouts = {name: layout for name, (_, layout) in flat.owned.slots.items()}
        decayed = [p for name, p in self.parameters.items() if layouts[name].decays]
        others = [p for name, p in self.parameters.items() if not layouts[name].decays]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.inner = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=1e-8, fused=True)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Say how many steps the moments have seen."""
        for name, p in self.parameters.items():
            moments = {kind: self.moments[kind][name] for kind in MOMENTS}
            self.inner.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}

    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One update of every parameter; gradients are by name."""
        for name, p in self.parameters.items():
            p.grad = gradients[name]
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
