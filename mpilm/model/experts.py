"""Several feed-forward layers, of which each token uses the few that a router chooses (Jiang et al., arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpilm.config import Model
from mpilm.model.layers import Linear, SwiGLU
from mpilm.model.rows import EMPTY, Rows


class Experts(nn.Module):
    """The weighted sum of the `experts_per_token` likeliest experts of each token.

    A loss that grows when some experts get more tokens than others (Fedus et al., arXiv 2101.03961, section 2.2) reaches the
    router in backward; it is no part of the loss that is reported.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.chosen, self.balance = model.experts_per_token, model.router_loss / model.n_layers
        self.router = Linear(model.d_model, model.n_experts)
        self.experts = nn.ModuleList(SwiGLU(model.d_model, model.d_ff) for _ in range(model.n_experts))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (B, T, D) -> (B, T, D)
        flat = x.flatten(0, -2)  # (N, D)
        likely = self.router(flat).softmax(dim=-1, dtype=torch.float32)  # (N, E)
        weights, chosen = likely.topk(self.chosen, dim=-1)  # (N, k)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):  # also those that nobody chose: their gradients are zero, not missing
            token, place = (chosen == number).nonzero(as_tuple=True)
            given = expert(flat.index_select(0, token))
            y = y.index_add(0, token, (given * weights[token, place, None]).to(y.dtype))
        if torch.is_grad_enabled() and self.balance and rows.share:
            there = slice(None) if rows.documents is None else (rows.documents != EMPTY).flatten()
            y = Beside.apply(y, self.balance * rows.share * imbalance(likely[there], chosen[there]))
        return y.view(x.shape)


def imbalance(likely: Tensor, chosen: Tensor) -> Tensor:  # (N, E), (N, k) -> ()
    """Experts times the sum of each one's share of tokens times its mean probability: `k` where all get the same."""
    taken = torch.zeros(likely.shape[1], device=likely.device).index_add_(
        0, chosen.flatten(), torch.ones(chosen.numel(), device=likely.device)
    )
    return likely.shape[1] * (taken / len(likely) * likely.mean(dim=0)).sum()


class Beside(torch.autograd.Function):
    """y, in whose backward `loss` has a gradient of one: a loss of a layer's own, which travels to no one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=torch.float32)
