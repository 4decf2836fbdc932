"""Tensor parallelism: layers divided into parts, which the ranks share out (Shoeybi et al., arXiv 1909.08053), with sequence
parallelism between the layers (Korthikanti et al., arXiv 2205.05198). `divide_model` applies both to a plain model.

A region is a module whose parameters the plan cuts. It computes in parts, which are copies of the module, each with a part of
each cut parameter. The parts of a layer read all tokens, and their outputs are added; those of the head make the logits of a
part of the vocabulary. All parts use the parameters that the plan does not cut. Outside of regions, a parameter has a gradient
for each slice of the tokens, and these are added in tree order. Forward and backward are collective over the tensor axis.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mpilm.comm.base import SelfComm
from mpilm.kernels.base import IGNORE_INDEX
from mpilm.model.attention import AttentionCore
from mpilm.model.layers import Conv1D, Dropout, Embedding, RotaryEmbedding
from mpilm.model.moe import MixtureOfExperts
from mpilm.model.sequence_info import Rotation, SequenceInfo
from mpilm.model.transformer import BertEmbedding
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tensor_axis import ContiguousGradient, ReduceScatterOutputs, RegionInput, ShareParameter, TensorAxis
from mpilm.parallel.context import attend_by_part, linear_by_part
from mpilm.parallel.layout import ParamPart
from mpilm.parallel.plan import Cut, region_of
from mpilm.parallel.split_backward import linear_in_halves

CutOf = Callable[[str], Cut | None]


def divide_model(model: nn.Module, cut_of: CutOf, axis: TensorAxis, exchanges_heads: bool = False) -> None:
    """Divide `model`, which is on the meta device, into parts and keep those of this rank. If the sequence has parts too, each
    layer computes them one by one, and attention mixes them (parallel/context.py): by an exchange of heads if
    `exchanges_heads`, else in a ring."""
    regions = {region_of(name) for name, _ in model.named_parameters() if axis.parts > 1 and cut_of(name)}
    wholes = regions | {path for path, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
    for path, module in list(model.named_modules()):
        if path in regions:
            _divide_region(module, path, cut_of, axis)
        elif not any(path.startswith(f"{whole}.") for whole in wholes):
            _divide_tokens(module, axis)
    if isinstance(rotary := getattr(model, "rotary", None), RotaryEmbedding):
        model.rotary = partial(_rotate_by_part, rotary, axis.sequence)  # type: ignore[assignment]
    for module in model.modules() if axis.sequence.parts > 1 else ():
        if isinstance(module, AttentionCore):
            module.forward = partial(attend_by_part, module, module.forward, axis.sequence, exchanges_heads)  # type: ignore[method-assign]


def _divide_region(region: Any, path: str, cut_of: CutOf, axis: TensorAxis) -> None:
    own = dict(region.named_parameters())
    cuts = {name: cut for name in own if (cut := cut_of(f"{path}.{name}"))}
    biases = [name for name in own if name not in cuts and f"{name.removesuffix('bias')}weight" in cuts]  # added to the sum
    shared = [name for name in own if name not in cuts and name not in biases]
    parts = nn.ModuleDict({str(part): _make_part(region, own, cuts, part, axis.parts) for part in axis.local_parts})
    for name in cuts:
        _set_parameter(region, name, None)
    region.parts = parts
    overlaps = axis.overlaps and axis.sequence.parts == 1 and not isinstance(region, MixtureOfExperts)
    region.first_layers = _split_first_layers(region, cuts) if overlaps else {}
    inside = TensorAxis(SelfComm(), 1, axis.sequence)
    if axis.sequence.parts > 1 and not isinstance(region, MixtureOfExperts):
        for path_in_part, module in (item for part in parts.values() for item in part.named_modules()):
            names = [name.rpartition(".") for name in own if name not in biases]
            _divide_tokens(module, inside, [name for owner, _, name in names if owner == path_in_part])
    if isinstance(region, Embedding):
        region.lookup = partial(_lookup, region, axis, cuts["weight"].ranges(len(own["weight"]), axis.parts))  # type: ignore[method-assign]
        for module in region.children():
            _divide_tokens(module, axis)
    elif isinstance(region, MixtureOfExperts):
        region.forward = partial(_forward_experts, region, axis, inside)  # type: ignore[method-assign]
    elif path == "head":
        region.forward = partial(_forward_head, region, axis, cuts["weight"].ranges(len(own["weight"]), axis.parts))
    else:
        region.forward = partial(_forward_layer, region, axis, shared, biases)


def _make_part(region: nn.Module, own: Mapping[str, Tensor], cuts: Mapping[str, Cut], part: int, parts: int) -> nn.Module:
    """Return a copy of a region that has this part of each cut parameter, and none of the others."""
    module: Any = copy.deepcopy(region)
    for name, parameter in own.items():
        shape = cuts[name].part_shape(parameter.shape, part, parts) if name in cuts else None
        _set_parameter(module, name, None if shape is None else nn.Parameter(torch.empty(shape, device="meta")))
    for inner in module.modules():
        if isinstance(inner, (Dropout, AttentionCore)):  # masks are drawn, and keys and values cached, by path
            inner.path = f"{inner.path}.{part}"
    return module


def _split_first_layers(region: Any, cuts: Mapping[str, Cut]) -> dict[str, nn.Linear | Conv1D]:
    """Let the layers that multiply the input of a region leave their weight gradients to it; return them by their paths."""
    layers = {}
    for path, layer in region.parts.named_modules():
        cut = cuts.get(f"{path.partition('.')[2]}.weight".removeprefix("."))
        if isinstance(layer, (nn.Linear, Conv1D)) and cut is not None and cut.dim == isinstance(layer, Conv1D):
            layers[path] = layer
            layer.forward = partial(_multiply_input, layer, path, region)  # type: ignore[method-assign]
    return layers


def _multiply_input(layer: nn.Linear | Conv1D, path: str, region: Any, x: Tensor) -> Tensor:
    return linear_in_halves(layer, path, region.entered, x)


@contextmanager
def _enter_region(region: Any, axis: TensorAxis, x: Tensor) -> Iterator[RegionInput]:
    """Return the input of a region; forward runs within this context."""
    weights = {path: layer.weight for path, layer in region.first_layers.items() if layer.weight.requires_grad}
    region.entered = RegionInput(axis, x, weights)
    try:
        with region.entered.dropped_after_use():
            yield region.entered
    finally:
        region.entered = None


def _set_parameter(module: nn.Module, name: str, parameter: Tensor | tuple[Tensor, ...] | None) -> None:
    """Replace a parameter by another one, by a tensor that is not a parameter, by its aliases for parts, or by None."""
    owner, _, attribute = name.rpartition(".")
    module.get_submodule(owner)._parameters[attribute] = parameter  # type: ignore[assignment]


def _forward_layer(
    region: Any, axis: TensorAxis, shared: Sequence[str], biases: Sequence[str], x: Tensor, info: SequenceInfo
) -> Tensor:  # (B, n, D) -> (B, n, D)
    count, by_sequence = len(axis.local_parts), axis.sequence.parts > 1
    sequence_parts = axis.sequence_parts if axis.sliced else 1
    aliases = {name: ShareParameter.apply(region.get_parameter(name), axis, sequence_parts) for name in shared}
    outputs = []
    with _enter_region(region, axis, x) as entered:
        for i, (part, full) in enumerate(zip(region.parts.values(), entered.share(x))):
            for name in shared:  # where modules compute by sequence part, they find an alias for each
                _set_parameter(part, name, aliases[name][i::count] if by_sequence else aliases[name][i])
            outputs.append(part(full, info))
            for name in shared:
                _set_parameter(part, name, None)
    y = ReduceScatterOutputs.apply(axis, entered, *outputs)
    for name in biases:
        y = _by_slice(axis, torch.add, [region.get_parameter(name)], y)
    return y


def _forward_experts(
    region: Any, axis: TensorAxis, inside: TensorAxis, x: Tensor, info: SequenceInfo
) -> Tensor:  # (B, n, D) -> (B, n, D)
    def compute(tokens: Sequence[Tensor], info: SequenceInfo) -> list[Tensor]:
        *inputs, full = tokens
        chosen, weights = region.route(full.flatten(0, -2), info)
        shares = ShareParameter.apply(weights, axis, 1)
        return [
            part.run_experts(each.flatten(0, -2), chosen, share).view(full.shape)
            for part, each, share in zip(region.parts.values(), inputs, shares)
        ]

    with _enter_region(region, axis, x) as entered:
        outputs = _by_sequence_part(region, inside, compute, entered.share(x, has_shared_use=True), info)
    return ReduceScatterOutputs.apply(axis, entered, *outputs)


def _by_sequence_part(
    module: nn.Module,
    axis: TensorAxis,
    function: Callable[[Sequence[Tensor], SequenceInfo], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    info: SequenceInfo,
) -> Sequence[Tensor]:
    """Return the concatenated function(inputs, info) of sequence parts. Parameters of `module` have a gradient for each."""
    sequence = axis.sequence
    if sequence.parts == 1 or not sequence.sliced:
        return function(inputs, info)
    parameters = dict(module.named_parameters())
    aliases = zip(*(ShareParameter.apply(parameter, axis, axis.sequence_parts) for parameter in parameters.values()))
    documents = None if info.documents is None else sequence.split(sequence.select_own(info.documents), 1)
    outputs = []
    try:
        for i, (pieces, values) in enumerate(zip(zip(*(sequence.split(x, 1) for x in inputs)), aliases)):
            for name, value in zip(parameters, values):
                _set_parameter(module, name, value)
            own, weight = None if documents is None else documents[i], info.loss_weight / sequence.parts
            outputs.append(function(pieces, replace(info, documents=own, loss_weight=weight)))
    finally:
        for name, parameter in parameters.items():
            _set_parameter(module, name, parameter)
    return [torch.cat(x, dim=1) for x in zip(*outputs)]


def _lookup(region: Any, axis: TensorAxis, ranges: Sequence[range], ids: Tensor) -> Tensor:  # (B, N) -> (B, n, D)
    outputs = []
    for number, part in region.parts.items():
        rows = ranges[int(number)]
        inside = (ids >= rows.start) & (ids < rows.stop)
        found = part.lookup((ids - rows.start).where(inside, 0))
        outputs.append(found * inside[..., None].to(found.dtype))
    return ReduceScatterOutputs.apply(
        axis, None, *outputs
    ).clone()  # a copy: the sum is a view of the receive buffer, which would stay


@dataclass(frozen=True)
class PartLogits:
    """The logits of a microbatch on one rank: those of its tensor parts."""

    axis: TensorAxis
    ranges: Sequence[range]  # of the vocabulary, for each part of the model
    parts: Sequence[Tensor]  # logits (B, N, v) of each part here

    def losses(self, targets: Tensor) -> Tensor:  # (B, N) -> (B, N)
        """Return the cross-entropy of each target, float32; 0 for one that is ignored. Collective over the tensor axis."""
        ranges, sequence = [self.ranges[part] for part in self.axis.local_parts], self.axis.sequence
        if not sequence.sliced:
            return PartCrossEntropy.apply(self.axis, ranges, targets, *self.parts)
        pieces = zip(*(sequence.split(x, 1) for x in (targets, *self.parts)))  # of each sequence part
        return torch.cat([PartCrossEntropy.apply(self.axis, ranges, *piece) for piece in pieces], dim=1)

    def argmax(self) -> Tensor:
        """Return the token with the largest logit, the first of several, (B, N). Collective over the tensor axis."""
        ranges = [self.ranges[part] for part in self.axis.local_parts]
        largest, places = zip(*(x.detach().float().max(dim=-1) for x in self.parts))
        values, tokens = torch.stack(largest), torch.stack([at + rows.start for at, rows in zip(places, ranges)])
        counts = [len(held) * values[0].numel() for held in self.axis.parts_of_ranks]
        everywhere = [x.new_empty(self.axis.parts, *x.shape[1:]) for x in (values, tokens)]
        for x, out in zip((values, tokens), everywhere):
            self.axis.comm.all_gather(x.contiguous().view(-1), out.view(-1), counts)
        best = everywhere[0].argmax(dim=0, keepdim=True)
        return everywhere[1].gather(0, best)[0]

    def gather_last(self) -> Tensor:
        """Return all logits of the last token of the first sequence, float32, (V,). Collective over the tensor axis."""
        own = torch.cat([x[0, -1].detach().float() for x in self.parts])
        counts = [sum(len(self.ranges[part]) for part in held) for held in self.axis.parts_of_ranks]
        out = own.new_empty(sum(counts))
        self.axis.comm.all_gather(own, out, counts)
        return out


def _forward_head(region: Any, axis: TensorAxis, ranges: Sequence[range], x: Tensor) -> PartLogits:  # (B, n, D)
    with _enter_region(region, axis, x) as entered:
        parts = [part(full) for part, full in zip(region.parts.values(), entered.share(x))]
    return PartLogits(axis, ranges, parts)


class PartCrossEntropy(Function):
    """The cross-entropy of targets (B, N) from logits (B, N, v) of each part here; no rank needs all logits (arXiv 1909.08053,
    section 3). The sums of exponentials of all parts are added in tree order. Forward is collective over the tensor axis."""

    @staticmethod
    def forward(ctx: Any, axis: TensorAxis, ranges: Sequence[range], targets: Tensor, *logits: Tensor) -> Tensor:
        wide = [x.float() for x in logits]
        largest = axis.all_reduce_max(torch.stack([x.amax(dim=-1) for x in wide]).amax(dim=0))
        exponentials = [(x - largest[..., None]).exp_() for x in wide]
        total = axis.all_reduce([x.sum(dim=-1) for x in exponentials])
        places = [(targets - rows.start).where((targets >= rows.start) & (targets < rows.stop), -1) for rows in ranges]
        own = [x.gather(-1, at.clamp(min=0)[..., None])[..., 0].where(at >= 0, 0.0) for x, at in zip(wide, places)]
        ctx.save_for_backward(targets, total, *places, *exponentials)
        ctx.dtype = logits[0].dtype
        return (total.log() + largest - axis.all_reduce(own)).where(targets != IGNORE_INDEX, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        targets, total, *saved = ctx.saved_tensors
        places, exponentials = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        gradient = gradient.where(targets != IGNORE_INDEX, 0.0)[..., None]
        gradients = []
        for at, exponential in zip(places, exponentials):
            own = exponential / total[..., None] * gradient
            own.scatter_add_(-1, at.clamp(min=0)[..., None], gradient.neg().where((at >= 0)[..., None], 0.0))
            gradients.append(own.to(ctx.dtype))
        return None, None, None, *gradients


def slice_part(x: Tensor, part: ParamPart | None) -> Tensor:
    """Return this part of the parameter x, or x if `part` is None."""
    if part is None:
        return x
    first, length, distance = part.runs
    return x.reshape(-1, distance)[:, first : first + length].reshape(part.cut.part_shape(part.shape, part.number, part.count))


def gather_parts(own: Sequence[Tensor], part: ParamPart | None, axis: TensorAxis) -> Tensor:
    """Return a whole parameter from the parts of all ranks, of which `own` are those of this one. `part`: any of them, or None
    for a parameter that is not divided: the only element of `own`. Collective over the tensor axis."""
    if part is None:
        return own[0]
    shapes = [part.cut.part_shape(part.shape, number, part.count) for number in range(part.count)]
    flat = torch.cat([x.reshape(-1) for x in own])
    out, full = flat.new_empty(prod(part.shape)), flat.new_empty(part.shape)
    axis.comm.all_gather(flat, out, [sum(prod(shapes[number]) for number in held) for held in axis.parts_of_ranks])
    for number, values in enumerate(out.split([prod(shape) for shape in shapes])):
        first, run, distance = replace(part, number=number).runs
        full.view(-1, distance)[:, first : first + run].copy_(values.view(-1, run))
    return full


def _rotate_by_part(rotary: RotaryEmbedding, sequence: SequenceAxis, positions: Tensor) -> Rotation:
    if not sequence.sliced:
        return rotary(positions)
    cosines, sines = zip(*(rotary(part) for part in sequence.split(positions, positions.dim() - 1)))
    return torch.cat(cosines, dim=-2), torch.cat(sines, dim=-2)


def _divide_tokens(module: Any, axis: TensorAxis, names: Sequence[str] = ()) -> None:
    """Make a module compute each slice of the tokens separately. `names`: its own parameters, if some are filled in later."""
    names = names or [name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, Dropout):
        module.slices = axis
    elif isinstance(module, Embedding):  # of positions: on every rank, `ids` holds those of all tokens
        lookup = module.lookup
        module.lookup = lambda ids: _call_by_slice(  # type: ignore[method-assign]
            module, lookup, names, axis, axis.select_own(ids, ids.dim() - 1), ids.dim() - 1
        )
    elif isinstance(module, BertEmbedding):
        add_segment, segments = module.add_segment, module.segments
        module.add_segment = lambda x: _call_by_slice(segments, add_segment, ["weight"], axis, x)  # type: ignore[method-assign]
    elif isinstance(module, (nn.GELU, nn.SiLU)):  # vectors leave the last elements of a tensor to code with other bits
        activation = module.forward
        module.forward = lambda x: _by_slice(axis, activation, [], x)  # type: ignore[method-assign,assignment]
    elif isinstance(module, MixtureOfExperts):
        mix = module.forward
        module.forward = lambda x, info: _by_sequence_part(  # type: ignore[method-assign]
            module, axis, lambda inputs, info: [mix(inputs[0], info)], [x], info
        )[0]
    elif isinstance(module, (nn.Linear, Conv1D)) and axis.parts == 1 and isinstance(module.weight, nn.Parameter):
        module.forward = partial(linear_by_part, module, module.forward, axis.sequence)  # type: ignore[method-assign]
    elif names:
        forward = module.forward
        module.forward = lambda x: _call_by_slice(module, forward, names, axis, x)


def _call_by_slice(
    module: nn.Module, function: Callable[[Tensor], Tensor], names: Sequence[str], axis: TensorAxis, x: Tensor, dim: int = 1
) -> Tensor:
    """Return function(x), where the parameters `names` of `module` have one gradient for each slice of `x` along `dim`."""
    parameters = [module._parameters[name] for name in names]

    def call(piece: Tensor, *values: Tensor) -> Tensor:
        module._parameters.update(zip(names, values))  # type: ignore[arg-type]
        return function(piece)

    try:
        return _by_slice(axis, call, parameters, x, dim)
    finally:
        module._parameters.update(zip(names, parameters))


def _by_slice(axis: TensorAxis, function: Callable[..., Tensor], parameters: Sequence[Any], x: Tensor, dim: int = 1) -> Tensor:
    """Return the concatenated function(slice, *parameters) of this rank's slices of x along `dim`. A parameter may be given as
    its aliases for the slices, a tuple. Collective in backward."""
    if not axis.sliced:
        return function(x, *(each[0] if isinstance(each, tuple) else each for each in parameters))
    pieces = x.unflatten(dim, (axis.sequence_parts * len(axis.local_parts), -1)).unbind(dim)
    shared = (p if isinstance(p, tuple) else ShareParameter.apply(p, axis, axis.sequence_parts) for p in parameters)
    aliases = list(zip(*shared)) or [()] * len(pieces)
    outputs = [ContiguousGradient.apply(function(x.contiguous(), *values)) for x, values in zip(pieces, aliases, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)
