"""Every optimizer against torch's own, and in shards against the whole."""

import pytest
import torch
from runs import CPU, differing, joined

from mpilm.config import Train
from mpilm.optim.elementwise import AdamW
from mpilm.optim.optimizer import OPTIMIZERS, Optimizer, moment_shapes, needs_full_parameter
from mpilm.optim.schedule import learning_rate
from mpilm.parallel.flat import FlatParameters, FlatVector
from mpilm.parallel.layout import resolve_layouts

SHAPES = {"embed": (13, 8), "blocks.0.norm": (8,), "blocks.0.up": (24, 8), "blocks.0.down": (8, 24), "norm": (5,)}


def train(**changes):
    return Train(**{"steps": 100, "lr": 0.1, "min_lr": 0.01, "warmup_steps": 10, **changes})


def parts(settings, zero=0, rank=0, ranks=1):
    """Parameters, their optimizer, and the vector in which it finds their gradients."""
    flat = FlatParameters(
        resolve_layouts(SHAPES, {}, is_unsharded=needs_full_parameter(settings.optimizer)), CPU, zero, rank, ranks
    )
    return flat, Optimizer({0: flat}, settings), FlatVector.zeros(flat.reduced, CPU)


def fill(flat, vector, values):
    """Give each parameter's part of a vector its values, as far as they are held here."""
    for piece, view in flat.owned_slices(vector).items():
        view.copy_(values[piece.name].flatten()[piece.start : piece.stop])


def randoms(generator):
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def torchs(settings, parameters):
    """torch's own, of these parameters by name; decay on matrices only."""

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
def test_it_is_torchs_with_decay_on_matrices_only(name, decay, momentum):
    settings = train(optimizer=name, weight_decay=decay, momentum=momentum)
    flat, ours, vector = parts(settings)
    generator = torch.Generator().manual_seed(0)
    fill(flat, flat.values, randoms(generator))
    theirs = {name: flat.parameter(name).clone().requires_grad_() for name in SHAPES}
    reference = torchs(settings, theirs)
    for step in range(20):
        gradients = randoms(generator)
        fill(flat, vector, gradients)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for each in reference:
            for group in each.param_groups:
                group["lr"] = learning_rate(settings, step)
            each.step()
        ours.step({0: vector}, learning_rate(settings, step))
    moments = ours.state_slices()
    state = {name: each.state[p] for each in reference for name, p in theirs.items() if p in each.state}
    for name, parameter in theirs.items():
        torch.testing.assert_close(flat.parameter(name), parameter.detach(), rtol=1e-5, atol=1e-6)
    for kind, shapes in moment_shapes(settings.optimizer, {n: layout for n, (_, layout) in flat.layout.spans.items()}).items():
        assert {piece.name for piece in moments[kind]} == set(shapes)
        for piece, moment in moments[kind].items():
            wanted = state.get(piece.name, {}).get(kind)
            if wanted is None:  # sgd without momentum
                continue
            assert shapes[piece.name] == tuple(wanted.shape)
            torch.testing.assert_close(moment, wanted.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_what_is_updated_as_a_whole_has_torchs_bits(name):
    settings = train(optimizer=name, weight_decay=0.1)
    flat, ours, vector = parts(settings)
    generator = torch.Generator().manual_seed(2)
    fill(flat, flat.values, randoms(generator))
    theirs = {name: flat.parameter(name).clone().requires_grad_() for name in SHAPES}
    reference = torchs(settings, theirs)[0]
    for _ in range(5):
        gradients = randoms(generator)
        fill(flat, vector, gradients)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        for group in reference.param_groups:
            group["lr"] = 0.07
        reference.step()
        ours.step({0: vector}, 0.07)
    for parameter in reference.state:
        (name,) = (name for name, p in theirs.items() if p is parameter)
        assert torch.equal(flat.parameter(name), parameter)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_alone(name):
    """Without a gradient a matrix shrinks by lr x decay, a vector stays."""
    flat, optimizer, gradients = parts(train(optimizer=name, weight_decay=0.25))
    fill(flat, flat.values, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    optimizer.step({0: gradients}, lr=0.5)
    assert {name: float(flat.parameter(name).unique()) for name in SHAPES} == {
        name: 0.875 if len(shape) == 2 else 1.0 for name, shape in SHAPES.items()
    }


def test_moments_of_a_matrix_take_the_room_that_is_said():
    table = resolve_layouts({"embed": (13, 8), "norm": (5,)}, {}, is_unsharded=needs_full_parameter("adafactor"))
    assert moment_shapes("adafactor", table) == {
        "row_var": {"embed": (13, 1)}, "col_var": {"embed": (1, 8)}, "variance": {"norm": (5,)},
    }  # fmt: skip


def updated(settings, zero, ranks, steps=3):
    """The bits of values and moments after some steps, from the shards of all ranks."""
    found = {}
    for rank in range(ranks):
        flat, optimizer, vector = parts(settings, zero, rank, ranks)
        generator = torch.Generator().manual_seed(3)
        fill(flat, flat.values, randoms(generator))
        for _ in range(steps):
            fill(flat, vector, randoms(generator))
            optimizer.step({0: vector}, 0.1)
        found[rank] = {"value": flat.owned_slices(flat.values), **optimizer.state_slices()}
    return joined(list(found.values()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 30])
def test_an_update_in_shards_has_the_bits_of_the_whole_one(name, zero, ranks):
    """30 ranks: more than there is anything for."""
    settings = train(optimizer=name)
    assert differing(updated(settings, zero, ranks), updated(settings, zero=0, ranks=1)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_that_are_put_back_go_on_where_they_were(name):
    settings = train(optimizer=name)

    def run(interrupted):
        flat, optimizer, vector = parts(settings)
        generator = torch.Generator().manual_seed(1)
        fill(flat, flat.values, randoms(generator))
        for step in range(6):
            if interrupted and step == 3:
                kept = {kind: {p: x.clone() for p, x in of.items()} for kind, of in optimizer.state_slices().items()}
                optimizer = Optimizer({0: flat}, settings)
                for kind, of in optimizer.state_slices().items():
                    for piece, moment in of.items():
                        moment.copy_(kept[kind][piece])
                optimizer.set_step(3)
            fill(flat, vector, randoms(generator))
            optimizer.step({0: vector}, 0.1)
        return flat.values.tensor

    assert torch.equal(run(interrupted=True), run(interrupted=False))


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    flat, muon, vector = parts(train(optimizer="muon"))
    plain = FlatParameters(resolve_layouts(SHAPES, {}), CPU)
    adamw = AdamW({0: plain}, train())
    generator = torch.Generator().manual_seed(4)
    values, gradients = randoms(generator), randoms(generator)
    for of, target in ((flat, vector), (plain, (other := FlatVector.zeros(plain.reduced, CPU)))):
        fill(of, of.values, values)
        fill(of, target, gradients)
    muon.step({0: vector}, 0.1)
    adamw.step({0: other}, 0.1)
    same = {name for name in SHAPES if torch.equal(flat.parameter(name), plain.parameter(name))}
    assert same == {"embed", "blocks.0.norm", "norm"}
