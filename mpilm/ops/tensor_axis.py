"""Communication of the tensor axis: all-gather and reduce-scatter of activations, with equal bits for any number of ranks.

The number of tensor parts of a model does not depend on the number of ranks; a rank holds a contiguous range of them. Ranks add
the outputs of all parts in the order of the tree in ops/tree.py. Parts read the tokens of all ranks. Elsewhere the tokens are
divided into one slice per part, and a rank has the slices of its parts (sequence parallelism; Korthikanti et al.,
arXiv 2205.05198, section 4.2.2).

Letters in shapes: B sequences, N tokens of all ranks of the axis, n tokens of this rank, S sequence parts of this rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mpilm.comm.base import Comm, Request, SelfComm
from mpilm.comm.shared_memory import SharedPlaces
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tree import block_of_rank, plan_merges
from mpilm.ops.tree_reduce import TreeMerger, fold_in_tree_order


class TensorAxis:
    """The tensor parts of a model on the ranks of `comm`. `sliced`: between the parts of the model each rank has its slices of
    the tokens, one for each of its tensor parts and of its `sequence_parts`; otherwise it has all tokens. Methods named as
    communication are collective over `comm`."""

    def __init__(self, comm: Comm, parts: int, sequence: SequenceAxis | None = None):
        self.comm, self.parts, self.sequence = comm, parts, sequence or SequenceAxis(SelfComm())
        self.sequence_parts = len(self.sequence.local_parts)
        # Forward keeps all tokens of an input for backward, instead of gathering them again: recomputation needs those of one
        # block at a time anyway, and compiled functions save what they like.
        self.keeps_inputs = False
        self.overlaps = False  # weight gradients are computed while gradients of inputs travel, not left to a later half
        blocks = [block_of_rank(rank, comm.size, parts) for rank in range(comm.size)]
        plans = [plan_merges([(part, part + 1) for part in range(*block)], parts) for block in blocks]
        self.parts_of_ranks = [range(*block) for block in blocks]  # the parts of each rank
        self.local_parts, self.part_counts = self.parts_of_ranks[comm.rank], list(map(len, self.parts_of_ranks))
        self._merges, self._sums = plans[comm.rank]
        self._nodes = [[node for node, _ in remaining] for _, remaining in plans]
        self._merger, self._places = TreeMerger(self._nodes, parts), SharedPlaces(comm)

    @property
    def sliced(self) -> bool:
        return self.sequence.sliced

    @property
    def slice_numbers(self) -> list[int]:
        """Numbers of the slices that this rank has, in the order of its tokens."""
        return [part * self.parts + number for part in self.sequence.local_parts for number in self.local_parts]

    @property
    def slice_count(self) -> int:
        """Number of slices of a sequence."""
        return self.sequence.parts * self.parts

    @property
    def shared_bytes(self) -> int:
        """Bytes of this rank's places in the memory that the ranks of a node share."""
        return self._places.nbytes

    def count_own(self, tokens: int) -> int:
        """Return how many of so many tokens this rank has between the parts of the model."""
        return tokens // self.parts * len(self.local_parts) if self.sliced else tokens

    def all_gather(self, x: Tensor) -> Tensor:  # (B, n, ...) -> (B, N, ...)
        """Return the tokens of all ranks in the order of the sequence, contiguous."""
        return self.start_all_gather(x)()

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to do so; return what waits for the tokens. In shared memory they have come already."""
        if not self.sliced or self.comm.size == 1:
            return x.contiguous  # strides decide in which order a kernel adds
        sizes = [x.numel() // len(self.local_parts) * size for size in self.part_counts]
        ranks, request = self._show(x.detach().contiguous().view(-1), sizes)

        def arrange() -> Tensor:
            if request is not None:
                request.wait()
            if x.shape[0] * self.sequence_parts == 1:
                return torch.cat(ranks).view(1, -1, *x.shape[2:])
            shape, length = (x.shape[0], self.sequence_parts), x.shape[1] // self.sequence_parts // len(self.local_parts)
            by_rank = [flat.view(*shape, count, length, *x.shape[2:]) for flat, count in zip(ranks, self.part_counts)]
            return torch.cat(by_rank, dim=2).flatten(1, 3)

        if request is None:
            full = arrange()
            return lambda: full
        return arrange

    def reduce_scatter(self, partial: Sequence[Tensor]) -> Tensor:  # of each part here (B, N, ...) -> (B, n, ...)
        """Return the sum of the tensors of all parts, for this rank's tokens, in float32 or wider (reduce-scatter)."""
        return self.start_reduce_scatter(partial)()

    def start_reduce_scatter(self, partial: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Start to do so; return what waits for the sum. Collective over `comm`, as is what it returns; nothing else that is
        may come in between."""
        if not self.sliced or self.comm.size == 1:
            return lambda: self.all_reduce(partial)
        nodes, shape = self._fold(partial), partial[0].shape
        own_shape = shape[0], shape[1] // self.parts * len(self.local_parts), *shape[2:]
        sent = [self._order_by_rank(node) for node in nodes]
        each = sent[0].numel() // self.parts
        own, counts = each * len(self.local_parts), [len(held) for held in self._nodes]
        if (places := self._reserve(sent[0], [each * self.parts * count for count in counts])) is not None:
            torch.cat(sent, out=places[self.comm.rank])
            begin, total = each * self.local_parts.start, sent[0].new_empty(own)
            shown = [node[begin : begin + own] for place, count in zip(places, counts) for node in place.view(count, -1)]

            def add_shown() -> Tensor:
                self.comm.barrier()
                self._merger.merge_into(shown, total)  # in place: no other rank reads these elements
                return total.view(own_shape)

            return add_shown
        received, requests = dict[tuple[int, int], Tensor](), []
        for j in range(max(map(len, self._nodes))):
            sources = [rank for rank, held in enumerate(self._nodes) if len(held) > j]
            rows = sent[0].new_empty(len(sources), own)
            received |= {(rank, j): row for rank, row in zip(sources, rows)}
            x = sent[j] if j < len(sent) else sent[0][:0]
            sends = [each * size if j < len(sent) else 0 for size in self.part_counts]
            receives = [own if rank in sources else 0 for rank in range(self.comm.size)]
            requests.append(self.comm.iall_to_all(x, rows.view(-1), sends, receives))

        def add_received() -> Tensor:
            for request in requests:
                request.wait()
            (total,) = self._merger.merge([row for _, row in sorted(received.items(), key=lambda item: item[0])])
            return total.view(own_shape)

        return add_received

    def all_reduce(self, partial: Sequence[Tensor]) -> Tensor:
        """Return the sum of the tensors of all parts, in float32 or wider, on every rank."""
        nodes = self._fold(partial)
        if self.comm.size == 1:
            return nodes[0]
        sizes = [nodes[0].numel() * len(held) for held in self._nodes]
        shown, request = self._show(torch.cat([node.reshape(-1) for node in nodes]), sizes)
        if request is not None:
            request.wait()
        everywhere = torch.cat(shown)
        return self._merger.merge(everywhere.view(self._merger.node_count, *partial[0].shape).unbind())[0]

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Replace each element of x by the largest of all ranks; return x."""
        self.comm.all_reduce(x, "max")
        return x

    def select_own(self, x: Tensor, dim: int = 1) -> Tensor:  # (B, N, ...) -> (B, n, ...)
        """Return this rank's tokens from all tokens, which lie along `dim`."""
        if not self.sliced or self.comm.size == 1:
            return x
        slices = x.unflatten(dim, (self.sequence_parts, self.parts, -1))
        return slices.narrow(dim + 1, self.local_parts.start, len(self.local_parts)).flatten(dim, dim + 2)

    def _fold(self, partial: Sequence[Tensor]) -> list[Tensor]:
        """Add the tensors of this rank's parts in tree order; return the nodes that remain."""
        wide = [x if x.dtype == torch.float64 else x.float() for x in partial]
        for into, other in self._merges:
            wide[into] = wide[into] + wide[other]
        return [wide[position].detach() for _, position in self._sums]

    def _show(self, x: Tensor, sizes: Sequence[int]) -> tuple[list[Tensor], Request | None]:
        """Return the flat tensors of all ranks: once the request is done, or, without one, in shared memory, where the exchange
        after the next one overwrites them."""
        if (places := self._reserve(x, sizes)) is None:
            out = x.new_empty(sum(sizes))
            return list(out.split(list(sizes))), self.comm.iall_gather(x, out, sizes)
        places[self.comm.rank].copy_(x)
        self.comm.barrier()
        return places, None

    def _reserve(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
        """Return the shared memory for a tensor like x, with one size for each rank; None if messages must carry it."""
        return self._places.reserve(sizes, x.dtype) if x.device.type == "cpu" else None

    def _order_by_rank(self, x: Tensor) -> Tensor:  # (B, N, ...) -> flat: the tokens of each rank, one rank after the other
        if x.shape[0] * self.sequence_parts == 1:
            return x.contiguous().view(-1)
        slices = x.unflatten(1, (self.sequence_parts, self.parts, -1))
        return torch.cat([part.reshape(-1) for part in slices.split(self.part_counts, dim=2)])


class RegionInput:
    """The input of parts: this rank's tokens x (B, n, ...) and all tokens (B, N, ...), gathered for forward and again for
    backward. Only x is kept in between (arXiv 2205.05198, section 4.2.2). `weights`: those by which the parts multiply it, if
    their gradients are computed while that of x travels. Collective over the tensor axis."""

    def __init__(self, axis: TensorAxis, x: Tensor, weights: Mapping[str, Tensor] | None = None):
        self.axis, self._own, self.weights = axis, x.detach(), weights or {}
        self._pending = dict[str, Callable[[], Tensor]]()  # gradients of weights
        self._dropped = set[torch.dtype]()  # dtypes in which backward needs all tokens
        self._full: Tensor | None = axis.all_gather(self._own)
        self._finish: Callable[[], Tensor] | None = None  # waits for them if they travel

    def share(self, x: Tensor, has_shared_use: bool = False) -> tuple[Tensor, ...]:
        """Return all tokens for each part here and, if asked, for a use equal on all ranks. x: the input itself."""
        return AllGatherTokens.apply(x, self, has_shared_use, *self.weights.values())

    def gather(self) -> Tensor:
        """Return all tokens, gathered again if they have been dropped. Collective over the tensor axis."""
        if self._full is None:
            finish, self._finish = self._finish or self.axis.start_all_gather(self._own), None
            self._full = finish()
        return self._full

    def restore(self) -> None:
        """Start to gather all tokens again if backward needs them. Collective over the tensor axis."""
        if self._dropped and self._full is None:
            self._finish = self.axis.start_all_gather(self._own)

    def drop(self) -> None:
        """Release all tokens but this rank's."""
        self._full = None

    def push_pending(self, name: str, compute: Callable[[], Tensor]) -> None:
        """Leave the gradient of a weight to `compute_gradients`."""
        self._pending[name] = compute

    def compute_gradients(self) -> Iterator[Tensor | None]:
        """Yield the gradients of `weights`; None for one that has none, or that autograd computes."""
        for name in self.weights:
            compute = self._pending.pop(name, None)
            yield None if compute is None else compute()
            self.axis.comm.progress()

    @contextmanager
    def dropped_after_use(self) -> Iterator[None]:
        """Drop all tokens after this context: autograd saves neither them nor a copy of them in another dtype for backward."""
        if not self.axis.sliced or self.axis.comm.size == 1 or self.axis.keeps_inputs:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        if len(self._dropped) == 1:
            self._own = self._own.to(next(iter(self._dropped)))
        self.drop()

    def _pack(self, saved: Tensor) -> Tensor | tuple[torch.dtype, torch.Size]:
        full = self.gather()
        if saved.numel() != full.numel() or not saved.is_contiguous():
            return saved
        if saved.data_ptr() != full.data_ptr() and not (
            saved.dtype != full.dtype and torch.equal(saved.view(full.shape), full.to(saved.dtype))
        ):
            return saved
        self._dropped.add(saved.dtype)
        return saved.dtype, saved.shape

    def _unpack(self, packed: Tensor | tuple[torch.dtype, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else self.gather().to(packed[0]).view(packed[1])


class AllGatherTokens(Function):
    """All tokens for the parts: x (B, n, ...) -> (B, N, ...) for each part here and, if `shared`, for a use equal on all ranks.
    Backward adds the gradients of all parts, and that of the shared use once; meanwhile it computes the gradients of `weights`,
    those of `entered`. Collective over the tensor axis, in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, entered: RegionInput, shared: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.entered, ctx.dtype, full = entered, x.dtype, entered.gather()
        return tuple(full.view_as(full) for _ in range(len(entered.axis.local_parts) + shared))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.entered.drop()
        axis = ctx.entered.axis
        count = len(axis.local_parts)
        finish = axis.start_reduce_scatter(gradients[:count])
        of_weights = list(ctx.entered.compute_gradients())
        total = finish()
        for gradient in gradients[count:]:
            total = total + axis.select_own(gradient)
        return total.to(ctx.dtype), None, None, *of_weights


class ReduceScatterOutputs(Function):
    """The sum of the outputs of parts: (B, N, ...) of each part here -> (B, n, ...). `entered`: their input; ids have none."""

    @staticmethod
    def forward(ctx: Any, axis: TensorAxis, entered: RegionInput | None, *partial: Tensor) -> Tensor:
        ctx.axis, ctx.entered, ctx.dtype = axis, entered, partial[0].dtype
        return axis.reduce_scatter(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        finish = ctx.axis.start_all_gather(gradient.to(ctx.dtype))
        if ctx.entered is not None:
            ctx.entered.restore()
        full = finish()
        return None, None, *[full] * len(ctx.axis.local_parts)


class ShareParameter(Function):
    """Aliases of x, which is equal on all ranks: for each sequence part, one for each tensor part here or for its slice.
    Backward adds the gradients of all aliases and ranks, first within a sequence part: collective over the tensor axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis, sequence_parts: int) -> tuple[Tensor, ...]:
        ctx.axis, ctx.sequence_parts, ctx.dtype = axis, sequence_parts, x.dtype
        return tuple(x.view_as(x) for _ in range(sequence_parts * len(axis.local_parts)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        count = len(ctx.axis.local_parts)
        by_part = [torch.stack(gradients[i::count]) for i in range(count)]  # (S, ...)
        return fold_in_tree_order(ctx.axis.all_reduce(by_part), ctx.sequence_parts).to(ctx.dtype), None, None


class ContiguousGradient(Function):
    """The identity on x. Its gradient is contiguous, because strides decide in which order a kernel adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
