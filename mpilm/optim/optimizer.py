"""The optimizers of train.optimizer. Each updates the parameters of its kind that this rank owns.

AdamW and SGD treat each element separately and call torch's fused kernels: torch.optim.AdamW imports the compiler, which costs
each rank a second and 70 MiB (torch 2.13). The kernels run on whole spans of the flat vector, padding included: their last bits
depend on the ends of a span, which are multiples of the layout's alignment on any number of ranks.

Adafactor and Muon need a full parameter at once, and compute what torch.optim's do, to the last bit. ZeRO leaves it unsharded:
the one rank that owns a parameter updates it, so ZeRO sends nothing more. Tensor ranks gather a divided parameter and update it
alike.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpilm.config.schema import TrainConfig
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.ops.tree import Interval
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.flat_layout import ParamSlice, intersect_intervals, merge_intervals
from mpilm.parallel.layout import FlatKey, ParamLayout, Shape
from mpilm.parallel.reduce.diloco import OUTER_MOMENTUM, DiLoCo
from mpilm.parallel.tensor import gather_parts, slice_part

EPS = 1e-8  # of AdamW
BETA2_DECAY = -0.8  # of Adafactor, as are the smallest deviation of a gradient and the smallest size of a parameter:
EPS_1, EPS_2 = torch.finfo(torch.float32).eps, 1e-3
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Muon: coefficients of a x + b x^3 + c x^5
ITERATIONS, EPS_NORM = 5, 1e-7  # of Muon
MAX_SAMPLED = 64  # times the size of a sample: larger parameters that are updated as a whole are not drawn
BLOCK_NUMEL = 1 << 22  # elements of a block of moments on its way
Tensors = list[Tensor]


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step `step`, counted from 0: linear warm-up, then the schedule down to min-lr."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    progress = min(1.0, (step + 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    remaining = 1.0 - progress if train.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * remaining


class UpdateSample(NamedTuple):
    """Elements of one flat vector, or one parameter that is updated as a whole: the (first) parameter, whether weight decay
    applies, value, gradient and moments, the number of the optimizer, and `runs` (ParamPart.runs) of the parts of this rank if
    the parameter is divided."""

    name: str
    decays: bool
    tensors: Tensors
    optimizer: int = 0
    runs: Sequence[Sequence[int]] = ()

    @property
    def updated(self) -> list[Tensor]:
        """The value and the moments: of those that are divided, the parts of this rank."""
        value, _, *moments = self.tensors
        if not self.runs:
            return [value, *moments]
        divided = [x for x in (value, *moments) if x.shape == value.shape]
        parts = [x.reshape(-1, distance)[:, first : first + run] for x in divided for first, run, distance in self.runs]
        return [*parts, *(x for x in moments if x.shape != value.shape)]


class ElementwiseOptimizer(ABC):
    """Updates the parameters that ZeRO may divide anywhere. Gradients are flat vectors by stage, and so are the moments, which
    have the shapes of the parameters and are named in `STATE_NAMES`."""

    STATE_NAMES: Sequence[str]

    @classmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        return dict.fromkeys(cls.STATE_NAMES, shape)

    def __init__(self, flats: Mapping[FlatKey, FlatParameters], train: TrainConfig, tensor: TensorAxis):
        self.flats, self.train, self.count = flats, train, 0  # updates that the moments have seen
        self.spans = {
            decays: [(key, span) for key, flat in flats.items() for span in _owned_intervals(flat, decays)]
            for decays in (True, False)
        }
        self.moments = {
            name: {key: flat.zeros("moments", _owned_intervals(flat, True, False)) for key, flat in flats.items()}
            for name in self.STATE_NAMES
        }

    def step(self, gradients: Mapping[FlatKey, FlatVector], lr: float) -> None:
        self.count += 1
        values = {key: flat.values for key, flat in self.flats.items()}
        for decays, spans in self.spans.items():
            if not spans:
                continue  # a small model on many ranks: some ranks have nothing to update
            moments = [_views(self.moments[name], spans) for name in self.STATE_NAMES]
            update = self.update if moments[0][0].device == next(iter(values.values())).tensor.device else self.update_in_blocks
            update(_views(values, spans), _views(gradients, spans), moments, lr, self.train.weight_decay * decays)

    @abstractmethod
    def update(self, values: Tensors, gradients: Tensors, moments: list[Tensors], lr: float, weight_decay: float) -> None:
        """Change `values` and `moments` (a list for each name) in place."""

    def update_in_blocks(
        self, values: Tensors, gradients: Tensors, moments: list[Tensors], lr: float, weight_decay: float
    ) -> None:
        """Update with moments that lie in the memory of the host: each block of them is copied to the device and back."""
        for value, gradient, *kinds in zip(values, gradients, *moments):
            for block in (slice(start, start + BLOCK_NUMEL) for start in range(0, value.numel(), BLOCK_NUMEL)):
                copies = [kind[block].to(value.device, copy=True) for kind in kinds]
                self.update([value[block]], [gradient[block]], [[copy] for copy in copies], lr, weight_decay)
                for kind, copy in zip(kinds, copies):
                    kind[block].copy_(copy)

    def draw_sample(self, gradients: Mapping[FlatKey, FlatVector], key: int, most: int) -> list[UpdateSample]:
        """Return about `most` adjacent elements that this rank updates, drawn by `key`, in pieces."""
        pieces, at = list[UpdateSample](), 0
        total = sum(stop - start for spans in self.spans.values() for _, (start, stop) in spans)
        first = key % max(1, -(-total // most)) * most  # the spans one after the other are cut into blocks
        for decays, spans in self.spans.items():
            for flat_key, (start, stop) in spans:
                begin, end = max(start, start + first - at), min(stop, start + first + most - at)
                at += stop - start
                if begin < end:
                    flat = self.flats[flat_key]
                    vectors = flat.values, gradients[flat_key], *(self.moments[name][flat_key] for name in self.STATE_NAMES)
                    name = next(iter(flat.layout.param_slices([(begin, end)]))).name
                    pieces.append(UpdateSample(name, decays, [vector.view(begin, end) for vector in vectors]))
        return pieces

    def repeat_update(self, sample: UpdateSample, lr: float) -> None:
        """Repeat the last update, in place, for a sample from before it."""
        value, gradient, *moments = sample.tensors
        self.update([value], [gradient], [[x] for x in moments], lr, self.train.weight_decay * sample.decays)

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        slices: dict[str, dict[ParamSlice, Tensor]] = {name: {} for name in self.STATE_NAMES}
        for name, vectors in self.moments.items():
            for key, flat in self.flats.items():
                for item, at in flat.layout.param_slices(vectors[key].intervals).items():
                    slices[name][item] = vectors[key].view(at, at + item.numel)
        return slices


def _views(vectors: Mapping[FlatKey, FlatVector], spans: list[tuple[FlatKey, Interval]]) -> Tensors:
    return [vectors[key].view(*span) for key, span in spans]


def _owned_intervals(flat: FlatParameters, *decays: bool) -> list[Interval]:
    """Return the intervals that this rank updates of the parameters that may be divided, with weight decay or without."""
    names = (name for name, (_, layout) in flat.layout.spans.items() if not layout.unsharded and layout.decays in decays)
    return intersect_intervals(merge_intervals(map(flat.layout.padded_span, names)), flat.owned)


class AdamW(ElementwiseOptimizer):
    """AdamW with decoupled weight decay on matrices only (Loshchilov and Hutter, arXiv 1711.05101)."""

    STATE_NAMES = ("exp_avg", "exp_avg_sq")

    def update(self, values: Tensors, gradients: Tensors, moments: list[Tensors], lr: float, weight_decay: float) -> None:
        fused_adamw(values, gradients, moments, self.count, self.train, lr, weight_decay)


def fused_adamw(
    values: Tensors, grads: Tensors, moments: list[Tensors], count: int, train: TrainConfig, lr: float, weight_decay: float
) -> None:
    """Update `values` and their first and second `moments` in place, for the `count`-th time."""
    settings: dict[str, Any] = {"lr": lr, "beta1": train.beta1, "beta2": train.beta2, "weight_decay": weight_decay, "eps": EPS}
    (exp_avgs, exp_avg_sqs), counts = moments, [torch.full((), float(count), device=values[0].device)] * len(values)
    torch._fused_adamw_(values, grads, exp_avgs, exp_avg_sqs, [], counts, **settings, amsgrad=False, maximize=False)


class SGD(ElementwiseOptimizer):
    """Gradient descent with momentum; weight decay, on matrices only, is part of the gradient, as in torch."""

    STATE_NAMES = ("momentum_buffer",)

    def update(self, values: Tensors, gradients: Tensors, moments: list[Tensors], lr: float, weight_decay: float) -> None:
        buffers = moments[0] if self.train.momentum else []  # as the kernel expects it
        settings: dict[str, Any] = {"lr": lr, "momentum": self.train.momentum, "dampening": 0.0, "weight_decay": weight_decay}
        torch._fused_sgd_(values, gradients, buffers, **settings, nesterov=False, maximize=False, is_first_step=False)


class UnshardedOptimizer(ABC):
    """Updates the unsharded parameters one after the other. Gradients are flat vectors by stage. All ranks of the tensor axis
    update a divided parameter alike, from its gathered parts, and each keeps its own."""

    STATE_NAMES: tuple[str, ...]

    @classmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        """Return the shapes of the moments, by name, of a parameter of this shape."""
        return dict.fromkeys(cls.STATE_NAMES, shape)

    def __init__(self, flats: Mapping[FlatKey, FlatParameters], train: TrainConfig, tensor: TensorAxis):
        self.flats, self.train, self.tensor, self.count = flats, train, tensor, 0
        self.moments = defaultdict[str, dict[str, Tensor]](dict)
        self.sources = defaultdict[str, list[ParamLayout]](list)  # the parameters, each with its parts here or itself
        for flat in flats.values():
            for name, (_, layout) in reversed(flat.layout.spans.items()):  # parts in ascending order
                span = flat.layout.padded_span(name)
                if layout.unsharded and intersect_intervals(flat.owned, [span]) == [span]:  # this rank updates it
                    self.sources[layout.source].append(layout)
                    for state, shape in self.state_shapes(layout.global_shape).items():
                        piece, own = layout.piece_of(shape)
                        self.moments[piece].setdefault(state, flat.offload.zeros("moments", prod(own), flat.device).view(own))

    def step(self, gradients: Mapping[FlatKey, FlatVector], lr: float) -> None:
        self.count += 1
        for layouts in self.sources.values():
            own, full = self._gather_tensors(layouts, gradients)
            moments = {name: x for name, x in full.items() if name in self.STATE_NAMES}
            with torch.no_grad():
                self.update(full["value"], full["gradient"], moments, lr, self.train.weight_decay * layouts[0].decays)
            for layout, tensors in zip(layouts, own):
                for name in tensors.keys() - {"gradient"} if layout.part is not None else ():
                    tensors[name].copy_(slice_part(full[name], layout.part))

    def draw_sample(self, gradients: Mapping[FlatKey, FlatVector], key: int, most: int) -> list[UpdateSample]:
        """Return a parameter that this rank updates, in full, drawn by `key` from those of at most MAX_SAMPLED times `most`
        elements. Collective over the tensor axis."""
        small = [each for each in self.sources.values() if prod(each[0].global_shape) <= MAX_SAMPLED * most]
        if not small:
            return []
        layouts = small[key % len(small)]
        first, (_, full) = layouts[0], self._gather_tensors(layouts, gradients)
        tensors = [full[name] for name in ("value", "gradient", *self.state_shapes(first.global_shape))]
        runs = [layout.part.runs for layout in layouts if layout.part is not None]
        return [UpdateSample(first.source, first.decays, tensors, runs=runs)]

    def repeat_update(self, sample: UpdateSample, lr: float) -> None:
        """Repeat the last update, in place, for a sample from before it."""
        value, gradient, *rest = sample.tensors
        moments = dict(zip(self.state_shapes(tuple(value.shape)), rest))
        with torch.no_grad():
            self.update(value, gradient, moments, lr, self.train.weight_decay * sample.decays)

    def _gather_tensors(
        self, layouts: Sequence[ParamLayout], gradients: Mapping[FlatKey, FlatVector]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return what this rank has of a parameter, by part, and all of it: value, gradient and moments by name. Collective
        over the tensor axis."""
        own = [self._tensors(layout, gradients[layout.flat_key]) for layout in layouts]
        full = {name: gather_parts([each[name] for each in own], layouts[0].part, self.tensor) for name in own[0]}
        return own, full | self.moments[layouts[0].source]

    def _tensors(self, layout: ParamLayout, gradients: FlatVector) -> dict[str, Tensor]:
        """Return a parameter, or a part of one, its gradient, and its moments of the same shape."""
        flat = self.flats[layout.flat_key]
        value, gradient = flat.parameter(layout.name, flat.values), flat.parameter(layout.name, gradients)
        return {"value": value, "gradient": gradient, **self.moments[layout.name]}

    @abstractmethod
    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        """Change a parameter and its moments in place."""

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        return {
            state: {ParamSlice(name, 0, x[state].numel()): x[state].view(-1) for name, x in self.moments.items() if state in x}
            for state in self.STATE_NAMES
        }


class Adafactor(UnshardedOptimizer):
    """Adafactor: second moments of a matrix as the product of those of its rows and columns, steps relative to the size of the
    parameter (Shazeer and Stern, arXiv 1804.04235, with torch's settings)."""

    STATE_NAMES = ("row_var", "col_var", "variance")

    @classmethod
    def state_shapes(cls, shape: Shape) -> Mapping[str, Shape]:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        size = max(EPS_2, float(value.norm(2)) / math.sqrt(value.numel()))
        value.mul_(1 - lr * weight_decay)
        variance = self._update_variance(gradient, moments, self.count**BETA2_DECAY)
        direction = variance.clamp_(min=EPS_1 * EPS_1).rsqrt_().mul_(gradient)
        excess = max(1.0, float(direction.norm(2)) / math.sqrt(direction.numel()))
        value.add_(direction, alpha=-size * min(lr, 1 / math.sqrt(self.count)) / excess)

    def _update_variance(self, gradient: Tensor, moments: Mapping[str, Tensor], weight: float) -> Tensor:
        """Update the running mean of the squared gradient, to which this one contributes `weight`, and return it."""
        if gradient.dim() < 2:
            return moments["variance"].lerp_(gradient * gradient, weight).clone()
        row, column = moments["row_var"], moments["col_var"]
        row.lerp_(torch.norm(gradient, dim=-1, keepdim=True).square_().div_(gradient.size(-1)), weight)
        column.lerp_(torch.norm(gradient, dim=-2, keepdim=True).square_().div_(gradient.size(-2)), weight)
        return (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp_(min=EPS_1))


class Muon(UnshardedOptimizer):
    """Muon: momentum with all singular values brought near one (Jordan et al., 2024), scaled to the size of AdamW's updates, so
    that one learning rate serves both (Liu et al., arXiv 2502.16982, section 2.2)."""

    STATE_NAMES = ("momentum_buffer",)

    def update(self, value: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        momentum = self.train.momentum
        average = moments["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = orthogonalize(gradient.lerp(average, momentum))  # Nesterov momentum
        value.mul_(1 - lr * weight_decay)
        value.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(value.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return roughly the nearest matrix with orthogonal rows or columns, by a Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=EPS_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


ParameterOptimizer = ElementwiseOptimizer | UnshardedOptimizer
OPTIMIZERS: Mapping[str, tuple[type[ParameterOptimizer], type[ParameterOptimizer]]] = {
    "adamw": (AdamW, AdamW),
    "sgd": (SGD, SGD),
    "adafactor": (Adafactor, Adafactor),
    "muon": (Muon, AdamW),
}
"""Name -> the optimizer of unsharded parameters, and that of all others."""


def needs_full_parameter(optimizer: str) -> Callable[[str, Shape], bool]:
    """Return the predicate of the parameters that are updated as a whole: with Muon, the matrices of blocks."""
    if optimizer == "muon":
        return lambda name, shape: name.startswith("blocks.") and len(shape) == 2
    return lambda name, shape: optimizer == "adafactor"


def moment_shapes(optimizer: str, layouts: Iterable[ParamLayout], local_sgd: bool = False) -> dict[str, dict[str, Shape]]:
    """Return the shapes of all moments of these parameters, by name and parameter; with `local_sgd`, also those of DiLoCo."""
    shapes: dict[str, dict[str, Shape]] = {}
    if local_sgd:
        shapes[OUTER_MOMENTUM] = {layout.source: layout.global_shape for layout in layouts}
    unsharded, divisible = OPTIMIZERS[optimizer]
    for layout in layouts:
        for state, shape in (unsharded if layout.unsharded else divisible).state_shapes(layout.global_shape).items():
            shapes.setdefault(state, {})[layout.source] = shape
    return shapes


class Optimizer:
    """Updates the stages of this rank, and holds the outer optimizer of local SGD if replicas synchronize only now and then."""

    def __init__(self, flats: Mapping[FlatKey, FlatParameters], train: TrainConfig, tensor: TensorAxis, diloco: DiLoCo | None):
        self.diloco = diloco
        self.optimizers = [optimizer(flats, train, tensor) for optimizer in dict.fromkeys(OPTIMIZERS[train.optimizer])]

    def set_step(self, step: int) -> None:
        """Set the number of updates that the moments have seen."""
        for optimizer in self.optimizers:
            optimizer.count = step

    def step(self, gradients: Mapping[FlatKey, FlatVector], lr: float) -> None:
        """Update the parameters that this rank owns; gradients are by stage."""
        if self.diloco is not None:
            self.diloco.begin_step()
        for optimizer in self.optimizers:
            optimizer.step(gradients, lr)

    def draw_sample(self, gradients: Mapping[FlatKey, FlatVector], key: int, most: int) -> list[UpdateSample]:
        """Return a part of the update of each optimizer, of about `most` elements, drawn by `key`; the same part after an
        update as before. Collective over the tensor axis."""
        drawn = enumerate(optimizer.draw_sample(gradients, key, most) for optimizer in self.optimizers)
        return [piece._replace(optimizer=number) for number, pieces in drawn for piece in pieces]

    def repeat_update(self, sample: Sequence[UpdateSample], lr: float) -> None:
        """Repeat the last update, in place, for a sample from before it."""
        for piece in sample:
            self.optimizers[piece.optimizer].repeat_update(piece, lr)

    def state_slices(self) -> dict[str, dict[ParamSlice, Tensor]]:
        """Return the flat moments of the parameter slices that this rank updates, by name; all names on every rank."""
        slices = {state: items for optimizer in self.optimizers for state, items in optimizer.state_slices().items()}
        return slices if self.diloco is None else {OUTER_MOMENTUM: self.diloco.owned_slices(), **slices}

    @property
    def memory_bytes(self) -> int:
        """Memory of the moments."""
        moments = (x for optimizer in self.optimizers for items in optimizer.state_slices().values() for x in items.values())
        return sum(4 * x.numel() for x in moments) + (self.diloco.memory_bytes if self.diloco is not None else 0)
