"""Tensor parts against the plain model, in float64, and the same bits for any number of ranks; operators and their adjoints."""

import re
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from part_models import VOCAB, dot, draw, draw_batch, family_config
from runs import CPU, FAMILIES, small_config
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.comm.shared_memory import SharedPlaces
from mpilm.engine.pipelined import meta_model, resolve_model_layouts
from mpilm.kernels.base import loss_sum
from mpilm.model.families import initial_std, initial_value
from mpilm.model.flops import activation_bytes
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.sequence_axis import SequenceAxis
from mpilm.ops.tensor_axis import AllGatherTokens, ReduceScatterOutputs, RegionInput, ShareParameter, TensorAxis
from mpilm.ops.tree_reduce import fold_in_tree_order
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.flat import set_parameter
from mpilm.parallel.layout import select_parts
from mpilm.parallel.plan import cut_of
from mpilm.parallel.tensor import PartLogits, divide_model, gather_parts, slice_part

SHARED = 100  # a number that names no rank: values that all ranks have


@pytest.fixture(params=["shared memory", "messages"])
def _transport(request, monkeypatch):
    if request.param == "messages":
        monkeypatch.setattr(SharedPlaces, "reserve", lambda *_: None)


@pytest.mark.usefixtures("_transport")
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(
    ("size", "parts", "sequence_parts"), [(1, 2, 1), (2, 2, 1), (2, 4, 2), (3, 4, 1), (4, 4, 1), (3, 6, 2)]
)
def test_operators_and_their_gradients_are_adjoint(size, parts, sequence_parts, sliced):
    """<F x, y> = <x, F* y>, summed over all ranks; a tensor that is the same on all of them counts once."""
    tokens = 3 * parts * sequence_parts

    def body(comm):
        axis = TensorAxis(comm, parts, SequenceAxis(SelfComm(), sequence_parts))
        axis.sequence.sliced = sliced
        own_shape, full_shape = (2, axis.count_own(tokens), 5), (2, tokens, 5)
        x = draw(1, comm.rank if sliced else SHARED, shape=own_shape).requires_grad_()
        uses = [draw(2, part, shape=full_shape) for part in axis.local_parts]
        outputs = AllGatherTokens.apply(x, RegionInput(axis, x), True)
        shared_use = draw(3, SHARED, shape=full_shape)
        (gradient,) = torch.autograd.grad(outputs, x, [*uses, shared_use])
        entered = dot(outputs[:-1], uses), dot(outputs[-1:], [shared_use]), dot([x], [gradient])

        partial_sums = [draw(4, part, shape=full_shape).requires_grad_() for part in axis.local_parts]
        y = draw(5, comm.rank if sliced else SHARED, shape=own_shape)
        output = ReduceScatterOutputs.apply(axis, None, *partial_sums)
        left = dot([output], [y]), dot(partial_sums, torch.autograd.grad(output, partial_sums, y))

        weight = draw(6, SHARED, shape=(7,)).requires_grad_()
        uses = [draw(7, part, s, shape=(7,)) for s in range(sequence_parts) for part in axis.local_parts]
        outputs = ShareParameter.apply(weight, axis, sequence_parts)
        (gradient,) = torch.autograd.grad(outputs, weight, uses)
        return entered, left, (dot(outputs, uses), dot([weight], [gradient]))

    entered, left, shared = zip(*run_ranks(size, body))
    count = (lambda numbers: sum(numbers)) if sliced else (lambda numbers: numbers[0])  # without slices all ranks have all
    (of_parts, of_shared, of_input) = zip(*entered)
    assert sum(of_parts) + of_shared[0] == pytest.approx(count(of_input), rel=1e-12)
    outputs, inputs = zip(*left)
    assert count(outputs) == pytest.approx(sum(inputs), rel=1e-12)
    outputs, inputs = zip(*shared)
    assert all(each == inputs[0] for each in inputs)
    assert sum(outputs) == pytest.approx(inputs[0], rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_fold_adds_in_the_order_of_the_tree(count):
    values = [torch.tensor(10.0**i) for i in range(count)]
    assert float(fold_in_tree_order([value.clone() for value in values], count)) == pytest.approx(
        sum(10.0**i for i in range(count))
    )


def forward(shape, dtype, axis=None, dropout_keys=None):
    """Return the logits of one batch, and parameters and layouts by the names of parameters or their parts."""
    full = {
        name: initial_value(0, name, tuple(p.shape), initial_std(name, shape) or 0.3).to(dtype)
        for name, p in meta_model(shape, VOCAB).named_parameters()
    }
    model = meta_model(shape, VOCAB)
    layouts = resolve_model_layouts(shape, VOCAB, (shape.n_layers,), parts=axis.parts if axis else 1)
    if axis is not None:
        divide_model(model, partial(cut_of, family=shape.arch), axis)
        layouts = select_parts(layouts, axis.local_parts, range(0))
    values = {}
    for name, layout in layouts.items():
        owner = layout.source if layout.tied_to is None else layouts[layout.tied_to].source
        values[name] = slice_part(full[owner], layout.part).clone().contiguous().requires_grad_()
        set_parameter(model, name, values[name], layout)
    info = SequenceInfo(torch.arange(shape.context_length), dropout_keys, loss_weight=1.0)
    return model(draw_batch(shape)[0], info), dict(model.named_parameters()), layouts


def run_model(shape, dtype, axis=None, dropout_keys=None):
    """Return the loss of one batch, the gradients, and the layouts."""
    output, parameters, layouts = forward(shape, dtype, axis, dropout_keys)
    targets = draw_batch(shape)[1]
    loss = output.losses(targets).sum() if isinstance(output, PartLogits) else loss_sum(output, targets)
    loss.backward()
    return float(loss), {name: p.grad for name, p in parameters.items()}, layouts


@pytest.mark.parametrize(("size", "parts"), [(1, 4), (2, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_compute_what_the_plain_model_computes(family, size, parts):
    """Loss and gradients in float64 (the losses of tokens are float32)."""
    shape = family_config(family)
    loss, gradients, _ = run_model(shape, torch.float64)
    for part_loss, found, layouts in run_ranks(size, lambda comm: run_model(shape, torch.float64, TensorAxis(comm, parts))):
        assert part_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in found.items():
            expected = slice_part(gradients[layouts[name].source], layouts[name].part)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_transport")
@pytest.mark.parametrize("dropout_keys", [None, [3, 4]])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_ranks_computes_the_same_bits(family, dropout_keys):
    shape = family_config(family)
    ((loss, gradients, _),) = run_ranks(1, lambda comm: run_model(shape, torch.float32, TensorAxis(comm, 4), dropout_keys))
    for size in (2, 3, 4):
        results = run_ranks(size, lambda comm: run_model(shape, torch.float32, overlapping_axis(comm, 4), dropout_keys))
        for part_loss, found, _ in results:
            assert part_loss == loss
            assert [name for name, gradient in found.items() if not torch.equal(gradient, gradients[name])] == []


def overlapping_axis(comm, parts):
    axis = TensorAxis(comm, parts)
    axis.overlaps = True
    return axis


@pytest.mark.parametrize(("family", "first_layers"), [("llama", [1, 2, 3]), ("gpt2", [1, 1, 1]), ("bert", [1, 1, 3])])
def test_weight_gradients_are_computed_while_gradients_of_inputs_travel(family, first_layers):
    """Head; gate and up; q, k and v: of the region's first layers between start and end of its reduce-scatter in backward."""
    shape, start, compute = family_config(family), TensorAxis.start_reduce_scatter, RegionInput.compute_gradients

    def recording_start(self, partial_sums):
        finish = start(self, partial_sums)
        self.events.append("start")
        return lambda: self.events.append("finish") or finish()

    def recording_compute(self):
        for gradient in compute(self):
            self.axis.events.append("none" if gradient is None else "weight")
            yield gradient

    def body(comm):
        axis = overlapping_axis(comm, 2)
        axis.events = []
        run_model(shape, torch.float32, axis)
        return " ".join(axis.events)

    with (
        mock.patch.multiple(TensorAxis, start_reduce_scatter=recording_start),
        mock.patch.multiple(RegionInput, compute_gradients=recording_compute),
    ):
        for events in run_ranks(2, body):
            counts = [region.count("weight") for region in re.findall(r"start ((?:weight )*)finish", events)]
            assert sorted(filter(None, counts)) == sorted(first_layers[:1] + first_layers[1:] * shape.n_layers)
            assert "none" not in events


@pytest.mark.parametrize("overlaps", [False, True])
def test_inputs_of_parts_are_not_kept_for_backward(overlaps):
    """q, k, v, gate, up and head save their input, all tokens; between forward and backward a rank keeps its own alone."""
    shape, dropped = family_config("llama"), []
    original = RegionInput._pack

    def pack(self, saved):
        packed = original(self, saved)
        dropped.append(not isinstance(packed, torch.Tensor))
        return packed

    with mock.patch.object(RegionInput, "_pack", pack):
        run_ranks(1, lambda comm: run_model(shape, torch.float32, TensorAxis(comm, 2)))
        assert dropped == []
        make_axis = overlapping_axis if overlaps else TensorAxis
        run_ranks(2, lambda comm: run_model(shape, torch.float32, make_axis(comm, 2)))
    assert sum(dropped) == 2 * (5 * shape.n_layers + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_rank_are_as_many_as_the_formula_says(family, dtype):
    """What autograd saves, each storage once, and the inputs of parts; without parameters and logits."""
    shape = replace(family_config(family), d_model=128, head_width=32, d_ff=384, context_length=64, dropout=0.0)
    pack, drop = RegionInput._pack, RegionInput.drop

    def recording_pack(self, saved):
        packed = pack(self, saved)
        return self.axis.record(packed) if isinstance(packed, torch.Tensor) else packed

    def recording_drop(self):
        self.axis.record(self._own)
        drop(self)

    def body(comm):
        storages, axis = {}, overlapping_axis(comm, 2)

        def record(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        axis.record = record
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), make_autocast(dtype, CPU)():
            output, parameters, _ = forward(shape, torch.float32, axis)
        for tensor in (*parameters.values(), *output.parts):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in storages.values())

    predicted = activation_bytes(shape, VOCAB, 2 * shape.context_length, dtype, tensor=2, parts=2)["activations"]
    with mock.patch.multiple(RegionInput, _pack=recording_pack, drop=recording_drop):
        assert run_ranks(2, body) == [pytest.approx(predicted, rel=0.05)] * 2


@pytest.mark.parametrize(("size", "parts"), [(1, 2), (2, 2), (3, 4), (4, 4)])
def test_logits_in_parts_give_the_losses_and_tokens_of_whole_logits(size, parts):
    logits = draw(8, shape=(2, 6, VOCAB)).float()
    logits[0, 1, 17] = logits[0, 1, 40] = 9.0  # the first of equal ones is chosen
    targets = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
    targets[1, 3] = -100
    cut = cut_of("head.weight", "llama")

    def body(comm):
        axis, ranges = TensorAxis(comm, parts), cut.ranges(VOCAB, parts)
        whole = PartLogits(axis, ranges, [logits[..., ranges[part].start : ranges[part].stop] for part in axis.local_parts])
        return whole.losses(targets), whole.argmax(), whole.gather_last()

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 6)
    for losses, tokens, last in run_ranks(size, body):
        torch.testing.assert_close(losses, expected)
        assert torch.equal(tokens, logits.argmax(dim=-1))
        assert torch.equal(last, logits[0, -1])


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parts_of_a_parameter_make_it_up(family, parts):
    shape = small_config(**{**FAMILIES[family], "model__n_kv_heads": 6}, model__n_heads=6, model__d_model=24).model
    layouts = resolve_model_layouts(shape, VOCAB, (shape.n_layers,), parts=parts)
    for layout in layouts.values():
        if layout.part is None or layout.part.number > 0:
            continue
        full = draw(9, shape=layout.global_shape)
        pieces = [slice_part(full, part.part) for part in layouts.values() if part.source == layout.source]
        assert sum(map(torch.numel, pieces)) == full.numel()
        gathered = run_ranks(2, lambda comm: gather_rank(comm, parts, pieces, layout.part))  # noqa: B023
        assert all(torch.equal(each, full) for each in gathered)


def gather_rank(comm, parts, pieces, part):
    axis = TensorAxis(comm, parts)
    return gather_parts([pieces[number] for number in axis.local_parts], part, axis)
