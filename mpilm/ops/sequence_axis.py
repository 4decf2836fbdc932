"""The sequence parts of a model on the ranks of the context axis, and the exchange of parts between them.

A sequence is divided into parts of equal length, whose number does not depend on the number of ranks. Ranks have equal numbers
of them, dealt from both ends (0, S-1, 1, S-2, ...), so that causal attention is equal work for all. Sums over parts follow the
tree of ops/tree.py in this order.

Letters in shapes: B sequences, N tokens of all ranks, n tokens of this rank, S sequence parts.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mpilm.comm.base import Comm, Request
from mpilm.ops.tree import TreeNode, leaf_slots

KEYS_VALUES, GRADIENTS = range(2)  # tags of messages


class SequenceAxis:
    """`parts` parts of each sequence on the ranks of `comm`. `sliced`: each rank has its parts; otherwise all tokens."""

    def __init__(self, comm: Comm, parts: int = 1):
        self.comm, self.parts, self.sliced = comm, parts, True
        order = [part // 2 if part % 2 == 0 else parts - 1 - part // 2 for part in range(parts)]
        each = parts // comm.size
        self.parts_of_ranks = [order[rank * each : (rank + 1) * each] for rank in range(comm.size)]
        self.local_parts = self.parts_of_ranks[comm.rank]
        self.holders = {part: rank for rank, held in enumerate(self.parts_of_ranks) for part in held}

    def select_own(self, x: Tensor, dim: int = 1) -> Tensor:  # (B, N, ...) -> (B, n, ...)
        """Return this rank's tokens from all tokens, which lie along `dim`."""
        if not self.sliced or self.parts == 1:
            return x
        own = torch.tensor(self.local_parts, device=x.device)
        return x.unflatten(dim, (self.parts, -1)).index_select(dim, own).flatten(dim, dim + 1)

    def split(self, x: Tensor, dim: int) -> list[Tensor]:
        """Return the tokens of each part of this rank, contiguous."""
        return [part.contiguous() for part in x.unflatten(dim, (len(self.local_parts), -1)).unbind(dim)]

    def gradient_nodes(self) -> tuple[list[TreeNode], int]:
        """Return the node of each rank's parts in a tree over all parts, and the number of leaves that such a tree has."""
        slots, each = leaf_slots(self.parts), self.parts // self.comm.size
        return [(slots[at][0], slots[at + each - 1][1]) for at in range(0, self.parts, each)], slots[-1][1]


class KeyValueRing:
    """Keys and values of all sequence parts, which pass the queries of this rank, and the gradients that come back (ring
    attention; Liu et al., arXiv 2310.01889).

    In step t = 0 .. S-1 query part i meets key part (i - t) modulo S, or none if that is later and attention is causal. So each
    query part meets the key parts in descending order, from its own on, and each key part the query parts in ascending order.
    `own`: keys and values of this rank's parts. Collective over the context axis."""

    def __init__(self, axis: SequenceAxis, own: Mapping[int, Tensor], causal: bool):
        self.axis, self.own, self.causal = axis, own, causal
        self.gradients: dict[int, Tensor] = {}  # of `own`, in float32 or wider
        self._sends: list[Request] = []
        self._arriving = deque[list[tuple[int, Tensor, Request]]]()  # gradients: part, contribution; by step

    def steps(self) -> Iterator[dict[int, Tensor]]:
        """Yield the keys and values of each step, by query part; those of the next step travel meanwhile."""
        following = self._fetch(0)
        for step in range(self.axis.parts):
            blocks, receives = following
            if step + 1 < self.axis.parts:
                following = self._fetch(step + 1)
            for request in receives:
                request.wait()
            yield blocks
        self._finish_sends()

    def add_gradients(self, step: int, contributions: Mapping[int, Tensor]) -> None:
        """Exchange the gradients that the queries of a step contribute, by query part. They are added some steps later, so that
        no rank waits for a slower one."""
        arriving = []
        for query, key, querier, owner in self._pairs(step):
            if querier == owner == self.axis.comm.rank:
                arriving.append((key, contributions[query], Request()))
            elif querier == self.axis.comm.rank:
                self._sends.append(self.axis.comm.isend(contributions[query], owner, GRADIENTS))
            elif owner == self.axis.comm.rank:
                buffer = torch.empty_like(self.own[key])
                arriving.append((key, buffer, self.axis.comm.irecv(buffer, querier, GRADIENTS)))
        self._arriving.append(arriving)
        if len(self._arriving) > self.axis.comm.size:
            self._add_oldest()

    def finish_gradients(self) -> dict[int, Tensor]:
        """Return the gradients of this rank's keys and values, by part, once all contributions have been added."""
        while self._arriving:
            self._add_oldest()
        self._finish_sends()
        return self.gradients

    def _add_oldest(self) -> None:
        for key, x, request in self._arriving.popleft():
            request.wait()
            wide = x if x.dtype == torch.float64 else x.float()
            self.gradients[key] = self.gradients[key].add_(wide) if key in self.gradients else wide

    def _fetch(self, step: int) -> tuple[dict[int, Tensor], list[Request]]:
        blocks, receives = dict[int, Tensor](), []
        for query, key, querier, owner in self._pairs(step):
            if querier == owner == self.axis.comm.rank:
                blocks[query] = self.own[key]
            elif owner == self.axis.comm.rank:
                self._sends.append(self.axis.comm.isend(self.own[key], querier, KEYS_VALUES))
            elif querier == self.axis.comm.rank:
                blocks[query] = torch.empty_like(next(iter(self.own.values())))
                receives.append(self.axis.comm.irecv(blocks[query], owner, KEYS_VALUES))
        return blocks, receives

    def _pairs(self, step: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield query and key part of each pair of a step, and the ranks that have them, in the same order on all ranks."""
        parts, holders = self.axis.parts, self.axis.holders
        for key in range(parts - step if self.causal else parts):
            query = (key + step) % parts
            yield query, key, holders[query], holders[key]

    def _finish_sends(self) -> None:
        while self._sends:
            self._sends.pop().wait()


class HeadsForTokens(Function):
    """All tokens of some heads for some tokens of all heads: (B, H, n, K) -> (B, H / ranks, N, K), with the parts of all ranks
    one after the other (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509). Backward, and `inverse`, do the opposite.
    Collective over the context axis."""

    @staticmethod
    def forward(ctx: Any, axis: SequenceAxis, x: Tensor, inverse: bool) -> Tensor:
        ctx.axis, ctx.inverse = axis, inverse
        return exchange_heads(axis.comm, x, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, exchange_heads(ctx.axis.comm, gradient, not ctx.inverse), None


def exchange_heads(comm: Comm, x: Tensor, inverse: bool) -> Tensor:
    """Return (B, H / ranks, N, K) of (B, H, n, K), or the `inverse`. Collective over `comm`."""
    dim = 2 if inverse else 1  # what is sent is divided along it; what is received is concatenated along the other
    sent = torch.stack([part.contiguous() for part in x.detach().chunk(comm.size, dim)])
    received = torch.empty_like(sent)
    comm.all_to_all(sent.view(-1), received.view(-1))
    if inverse:  # in memory (B, n, H, K), so that heads are merged without a copy
        return torch.cat([part.transpose(1, 2) for part in received], dim=2).transpose(1, 2)
    return torch.cat(received.unbind(), dim=2)
