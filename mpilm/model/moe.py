"""Mixture of experts: a router sends each token to a few of several feed-forward layers (Jiang et al., arXiv 2401.04088)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.config.schema import ModelConfig
from mpilm.model.layers import Linear, SwiGLU
from mpilm.model.sequence_info import NO_DOCUMENT, SequenceInfo


class MixtureOfExperts(nn.Module):
    """The weighted sum of the `experts_per_token` most probable experts of each token. The router is also trained by a
    load-balancing loss, which only backward sees: the reported loss does not include it."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.top_k, self.balance_weight = model.experts_per_token, model.router_loss / model.n_layers
        self.router = Linear(model.d_model, model.n_experts, bias=False)
        self.n_experts = model.n_experts
        self.experts = nn.ModuleDict({str(i): SwiGLU(model.d_model, model.d_ff) for i in range(model.n_experts)})

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:  # (B, T, D) -> (B, T, D)
        flat = x.flatten(0, -2)  # (N, D)
        return self.run_experts(flat, *self.route(flat, info)).view(x.shape)

    def route(self, flat: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:  # (N, D) -> 2 x (N, k)
        """Return the chosen experts of each token and their weights, to which the balance loss is attached."""
        probs = self.router(flat).softmax(dim=-1, dtype=torch.float32)  # (N, E)
        # torch.topk states no rule for equal probabilities; on a CPU, its choice depends on the token's own row and k alone.
        weights, chosen = probs.topk(self.top_k, dim=-1)  # (N, k)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(flat.dtype)
        # Attached to the weights, not to the output: torch.compile drops a Function whose result is a view of a graph input.
        if torch.is_grad_enabled() and self.balance_weight and info.loss_weight:
            real = slice(None) if info.documents is None else (info.documents != NO_DOCUMENT).flatten()
            loss = load_balancing_loss(probs[real], chosen[real])
            weights = AddAuxLoss.apply(weights, self.balance_weight * info.loss_weight * loss)
        return chosen, weights

    def run_experts(self, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # (N, D), 2 x (N, k) -> (N, D)
        """Return the weighted sum of the `chosen` experts of each token, added in ascending expert number."""
        places = [(chosen == number).nonzero(as_tuple=True) for number in range(self.n_experts)]  # tokens, and slots of k
        outputs = self.apply_experts([flat.index_select(0, token) for token, _ in places])
        y = torch.zeros_like(flat)
        for (token, slot), output in zip(places, outputs):
            y = y.index_add(0, token, (output * weights[token, slot, None]).to(y.dtype))
        return y

    def apply_experts(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:  # of each expert (n, D) -> (n, D)
        """Return the outputs of all experts. An expert without tokens runs too: its gradients are zero, not None. An instance
        can have another function in the place of this one."""
        return [expert(x) for expert, x in zip(self.experts.values(), inputs, strict=True)]


def load_balancing_loss(probs: Tensor, chosen: Tensor) -> Tensor:  # (N, E), (N, k) -> ()
    """Return E times the sum over experts of their share of tokens times their mean probability: k if they share evenly, else
    more (Fedus et al., arXiv 2101.03961, section 2.2)."""
    ones = torch.ones(chosen.numel(), device=probs.device)
    tokens_per_expert = torch.zeros(probs.shape[1], device=probs.device).index_add_(0, chosen.flatten(), ones)
    return probs.shape[1] * (tokens_per_expert / len(probs) * probs.mean(dim=0)).sum()


class AddAuxLoss(torch.autograd.Function):
    """The identity on `x`, which also back-propagates an auxiliary loss with a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=torch.float32)
