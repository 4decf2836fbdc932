"""Every optimizer against torch's own, and in shards against the full update."""

import pytest
import torch
from runs import CPU, assemble, differing, place

from mpilm.comm.base import SelfComm
from mpilm.config.schema import TrainConfig
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.optim.optimizer import OPTIMIZERS, AdamW, Optimizer, learning_rate, moment_shapes, needs_full_parameter
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import resolve_layouts

SHAPES = {"embed": (13, 8), "blocks.0.norm": (8,), "blocks.0.up": (24, 8), "blocks.0.down": (8, 24), "norm": (5,)}


def train(**changes):
    return TrainConfig(**{"steps": 100, "lr": 0.1, "min_lr": 0.01, "warmup_steps": 10, **changes})


def parts(settings, zero=0, rank=0, ranks=1):
    """Return parameters, their optimizer, and the vector of their gradients."""
    flat = FlatParameters(
        resolve_layouts(SHAPES, {}, is_unsharded=needs_full_parameter(settings.optimizer)), CPU, zero, place(rank, ranks)
    )
    return flat, Optimizer({(0, False): flat}, settings, TensorAxis(SelfComm(), 1), None), flat.zeros("gradients", flat.reduced)


def fill(flat, vector, values):
    """Copy the values of each parameter into the part of a vector that this rank owns."""
    for item, view in flat.owned_slices(vector).items():
        view.copy_(values[item.name].flatten()[item.start : item.stop])


def draw(generator):
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def torch_optimizers(settings, parameters):
    """Return torch's own optimizers of these named parameters; decay on matrices only."""

    def groups(chosen):
        named = [p for name, p in parameters.items() if chosen(name, p)]
        of = [(2, settings.weight_decay), (1, 0.0)]
        return [{"params": [p for p in named if p.ndim == dims], "weight_decay": decay} for dims, decay in of]

    def adamw(of):
        return torch.optim.AdamW(of, betas=(settings.beta1, settings.beta2), eps=1e-8)

    def muons(name, p):
        return name.startswith("blocks") and p.ndim == 2

    everything = groups(lambda name, p: True)
    return {
        "adamw": lambda: [adamw(everything)],
        "sgd": lambda: [torch.optim.SGD(everything, momentum=settings.momentum)],
        "adafactor": lambda: [torch.optim.Adafactor(everything)],
        "muon": lambda: [
            torch.optim.Muon(groups(muons)[:1], momentum=settings.momentum, adjust_lr_fn="match_rms_adamw"),
            adamw(groups(lambda name, p: not muons(name, p))),
        ],
    }[settings.optimizer]()


CASES = [(name, decay, 0.9) for name in OPTIMIZERS for decay in (0.1, 0.0)] + [("sgd", 0.1, 0.0), ("muon", 0.1, 0.0)]


@pytest.mark.parametrize(("name", "decay", "momentum"), CASES)
def test_optimizer_matches_torch_with_decay_on_matrices_only(name, decay, momentum):
    settings = train(optimizer=name, weight_decay=decay, momentum=momentum)
    flat, ours, vector = parts(settings)
    generator = torch.Generator().manual_seed(0)
    fill(flat, flat.values, draw(generator))
    theirs = {name: flat.parameter(name).clone().requires_grad_() for name in SHAPES}
    reference = torch_optimizers(settings, theirs)
    for step in range(20):
        gradients = draw(generator)
        fill(flat, vector, gradients)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for each in reference:
            for group in each.param_groups:
                group["lr"] = learning_rate(settings, step)
            each.step()
        ours.step({(0, False): vector}, learning_rate(settings, step))
    moments = ours.state_slices()
    state = {name: each.state[p] for each in reference for name, p in theirs.items() if p in each.state}
    for name, parameter in theirs.items():
        torch.testing.assert_close(flat.parameter(name), parameter.detach(), rtol=1e-5, atol=1e-6)
    for kind, shapes in moment_shapes(settings.optimizer, [layout for _, layout in flat.layout.spans.values()]).items():
        assert {item.name for item in moments[kind]} == set(shapes)
        for item, moment in moments[kind].items():
            expected = state.get(item.name, {}).get(kind)
            if expected is None:  # sgd without momentum
                continue
            assert shapes[item.name] == tuple(expected.shape)
            torch.testing.assert_close(moment, expected.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_unsharded_optimizer_has_the_bits_of_torch(name):
    settings = train(optimizer=name, weight_decay=0.1)
    flat, ours, vector = parts(settings)
    generator = torch.Generator().manual_seed(2)
    fill(flat, flat.values, draw(generator))
    theirs = {name: flat.parameter(name).clone().requires_grad_() for name in SHAPES}
    reference = torch_optimizers(settings, theirs)[0]
    for _ in range(5):
        gradients = draw(generator)
        fill(flat, vector, gradients)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for group in reference.param_groups:
            group["lr"] = 0.07
        reference.step()
        ours.step({(0, False): vector}, 0.07)
    for parameter in reference.state:
        (name,) = (name for name, p in theirs.items() if p is parameter)
        assert torch.equal(flat.parameter(name), parameter)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradient_shrinks_matrices_and_keeps_vectors(name):
    flat, optimizer, gradients = parts(train(optimizer=name, weight_decay=0.25))
    fill(flat, flat.values, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    optimizer.step({(0, False): gradients}, lr=0.5)
    assert {name: float(flat.parameter(name).unique()) for name in SHAPES} == {
        name: 0.875 if len(shape) == 2 else 1.0 for name, shape in SHAPES.items()
    }


def test_moment_shapes_of_adafactor_are_rows_and_columns():
    table = resolve_layouts({"embed": (13, 8), "norm": (5,)}, {}, is_unsharded=needs_full_parameter("adafactor"))
    assert moment_shapes("adafactor", table.values()) == {
        "row_var": {"embed": (13, 1)}, "col_var": {"embed": (1, 8)}, "variance": {"norm": (5,)},
    }  # fmt: skip


def update_on_ranks(settings, zero, ranks, steps=3):
    """Return the bits of values and moments after some steps, from the shards of all ranks."""
    states = []
    for rank in range(ranks):
        flat, optimizer, vector = parts(settings, zero, rank, ranks)
        generator = torch.Generator().manual_seed(3)
        fill(flat, flat.values, draw(generator))
        for _ in range(steps):
            fill(flat, vector, draw(generator))
            optimizer.step({(0, False): vector}, 0.1)
        states.append({"value": flat.owned_slices(flat.values), **optimizer.state_slices()})
    return assemble(states)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 30])
def test_update_of_shards_has_the_bits_of_the_full_update(name, zero, ranks):
    settings = train(optimizer=name)  # 30 ranks: more than have anything to update
    assert differing(update_on_ranks(settings, zero, ranks), update_on_ranks(settings, zero=0, ranks=1)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_moments_continue_to_the_same_bits(name):
    settings = train(optimizer=name)

    def run(interrupted):
        flat, optimizer, vector = parts(settings)
        generator = torch.Generator().manual_seed(1)
        fill(flat, flat.values, draw(generator))
        for step in range(6):
            if interrupted and step == 3:
                saved = {kind: {item: x.clone() for item, x in of.items()} for kind, of in optimizer.state_slices().items()}
                optimizer = Optimizer({(0, False): flat}, settings, TensorAxis(SelfComm(), 1), None)
                for kind, of in optimizer.state_slices().items():
                    for item, moment in of.items():
                        moment.copy_(saved[kind][item])
                optimizer.set_step(3)
            fill(flat, vector, draw(generator))
            optimizer.step({(0, False): vector}, 0.1)
        return flat.values.tensor

    assert torch.equal(run(interrupted=True), run(interrupted=False))


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    flat, muon, vector = parts(train(optimizer="muon"))
    plain = FlatParameters(resolve_layouts(SHAPES, {}), CPU)
    adamw = AdamW({(0, False): plain}, train(), TensorAxis(SelfComm(), 1))
    generator = torch.Generator().manual_seed(4)
    values, gradients = draw(generator), draw(generator)
    for of, target in ((flat, vector), (plain, (other := plain.zeros("gradients", plain.reduced)))):
        fill(of, of.values, values)
        fill(of, target, gradients)
    muon.step({(0, False): vector}, 0.1)
    adamw.step({(0, False): other}, 0.1)
    same = {name for name in SHAPES if torch.equal(flat.parameter(name), plain.parameter(name))}
    assert same == {"embed", "blocks.0.norm", "norm"}
