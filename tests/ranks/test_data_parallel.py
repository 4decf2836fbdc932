"""Data parallelism for a model and a loop of one's own: plain torch on one rank, the same bits on any number.

tests/mpi/test_data_parallel.py has dropout, since threads share torch's generator, and the example.
"""

import copy

import pytest
import torch
from torch import nn

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.data_parallel import DataParallel
from mpilm.errors import ConfigError

COUNT = 7
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


class Net(nn.Module):
    """A shared matrix, a parameter that nothing uses, a buffer."""

    def __init__(self, seed):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 1)
        self.again.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(1))
        generator = torch.Generator().manual_seed(seed)  # threads share torch's own
        for values in self.state_dict().values():
            values.normal_(generator=generator)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.relu(self.first(x)))) * self.scale)


def net(seed=0):
    return Net(seed)


def loss_of(model, step, m):
    generator = torch.Generator().manual_seed(100 * step + m)
    x = torch.randn(5, 6, generator=generator)
    return (model(x) - x.sum(1, keepdim=True)).square().mean() * 10.0 ** (m % 3)


def train(comm, steps=4, optimizer="adam", folder=None, save_at=()):
    model = net(seed=comm.rank)  # as ranks that start differently: rank 0's values count
    parallel = DataParallel(model, comm, COUNT)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    totals = []
    for step in range(parallel.load(folder, optimizer) if folder else 0, steps):
        losses = {}
        for m in parallel.microbatches(step):
            loss = loss_of(model, step, m)
            loss.backward()
            losses[m] = loss.detach()
        optimizer.step()
        totals.append(parallel.total(losses))
        if step + 1 in save_at:
            parallel.save(folder, step + 1, optimizer, extra={"totals": totals})
    return totals, {name: value.clone() for name, value in model.state_dict().items()}, parallel.extra


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_may_be_sparse(size):
    def body(comm):
        model = torch.nn.Embedding.from_pretrained(torch.ones(5, 2), freeze=False, sparse=True)
        for m in DataParallel(model, comm, 2).microbatches(0):
            model(torch.tensor([m, m, 3])).sum().backward()
        return model.weight.grad

    assert all(theirs.tolist() == [[2.0] * 2] * 2 + [[0.0] * 2, [2.0] * 2, [0.0] * 2] for theirs in run_ranks(size, body))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_the_bits_do_not_depend_on_the_ranks(size, optimizer):
    alone = train(SelfComm("world"), optimizer=optimizer)
    assert all(same(theirs, alone) for theirs in run_ranks(size, lambda comm: train(comm, optimizer=optimizer)))
    assert alone[0][3] != alone[0][0]


def test_the_gradients_are_those_of_plain_torch():
    model, plain = net(), net()
    parallel = DataParallel(model, SelfComm("world"), COUNT)
    for m in parallel.microbatches(0):
        loss_of(model, 0, m).backward()
    for m in range(COUNT):
        loss_of(plain, 0, m).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert not model.unused.grad.any()


def test_parameters_stay_the_objects_that_an_optimizer_holds():
    model = net()
    before = copy.deepcopy(model.state_dict())
    held = list(model.parameters())
    DataParallel(model, SelfComm("world"), COUNT)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.again.weight is model.first.weight


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_frozen_stays_rank_zeros(size):
    """In any dtype and any order of memory."""

    def body(comm):
        model = net(seed=comm.rank)
        model.register_buffer("spread", torch.full((1,), float(comm.rank)).expand(4))
        model.fixed = nn.Parameter(torch.full((2, 3), 0.5 + comm.rank, dtype=torch.bfloat16).t(), requires_grad=False)
        model.first.weight.requires_grad_(False)
        parallel = DataParallel(model, comm, COUNT)
        for m in parallel.microbatches(0):
            loss_of(model, 0, m).backward()
        assert model.first.weight.grad is None
        return model.state_dict(), model.last.weight.grad

    plain = net()
    for m in range(COUNT):
        loss_of(plain, 0, m).backward()
    for state, gradient in run_ranks(size, body):
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        assert torch.equal(state["spread"], torch.zeros(4))
        assert torch.equal(state["fixed"], torch.full((3, 2), 0.5, dtype=torch.bfloat16))
        torch.testing.assert_close(gradient, plain.last.weight.grad)


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_to_be_trained_may_not_change(trained):
    model = net()
    model.last.weight.requires_grad_(not trained)
    parallel = DataParallel(model, SelfComm("world"), COUNT)
    model.last.weight.requires_grad_(trained)
    with pytest.raises(ConfigError, match=r"last.weight: requires_grad has changed since DataParallel was made"):
        next(parallel.microbatches(0))


def test_an_optimizer_with_fewer_parameters_is_another_one(tmp_path):
    run_ranks(1, lambda comm: train(comm, 2, "adam", tmp_path, save_at=(2,)))
    model = net()
    parallel = DataParallel(model, SelfComm("world"), COUNT)
    with pytest.raises(CollectiveError, match=r"the state of an optimizer that has \w+.\w+, which this one has not"):
        parallel.load(tmp_path, torch.optim.AdamW([model.last.weight, model.last.bias]))


def test_a_model_in_which_nothing_is_to_be_trained():
    with pytest.raises(CollectiveError, match="the model has no parameters that require a gradient"):
        DataParallel(net().requires_grad_(False), SelfComm("world"), COUNT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_on_other_ranks(tmp_path, optimizer):
    alone = train(SelfComm("world"), 6, optimizer)
    run_ranks(3, lambda comm: train(comm, 4, optimizer, tmp_path, save_at=(2, 4)))
    later = run_ranks(2, lambda comm: train(comm, 6, optimizer, tmp_path))
    assert all(same((alone[0][4:], alone[1]), theirs) for theirs in later)
    assert later[1][2] == {"totals": alone[0][:4]}


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    run_ranks(2, lambda comm: train(comm, 4, "sgd", tmp_path, save_at=(2, 4)))
    file = tmp_path / "step-00000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    alone, resumed = train(SelfComm("world"), 4, "sgd"), train(SelfComm("world"), 4, "sgd", tmp_path)
    assert same((alone[0][2:], alone[1]), resumed)


def test_a_damaged_checkpoint_makes_room_for_another(tmp_path):
    train(SelfComm("world"), 4, "sgd", tmp_path, save_at=(2, 4))
    (tmp_path / "step-00000004" / "optimizer.safetensors").unlink()
    train(SelfComm("world"), 4, "sgd", tmp_path, save_at=(4,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-1-step-00000004", "step-00000002", "step-00000004"]
    again = train(SelfComm("world"), 4, "sgd", tmp_path)
    assert again[0] == []
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    (tmp_path / "step-00000004" / "model.safetensors").unlink()
    with pytest.raises(CollectiveError, match=r"no checkpoint in .* is whole"):
        train(SelfComm("world"), 4, "sgd", tmp_path)


def test_a_finished_run_may_be_started_again(tmp_path):
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    for _ in range(2):
        parallel = DataParallel(model, SelfComm("world"), COUNT)
        parallel.load(tmp_path, optimizer)
        parallel.save(tmp_path, 5, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_old_checkpoints_go(tmp_path):
    train(SelfComm("world"), 5, "sgd", tmp_path, save_at=(1, 2, 3, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_what_cannot_work(tmp_path):
    with pytest.raises(CollectiveError, match="8 ranks, but a step has only 7 microbatches; start 7 ranks or fewer"):
        run_ranks(8, lambda comm: DataParallel(net(), comm, COUNT))
    with pytest.raises(CollectiveError, match=r"parameter unused is torch\.float64; sums are made in float32"):
        DataParallel(net().double(), SelfComm("world"), COUNT)
    train(SelfComm("world"), 2, "sgd", tmp_path, save_at=(2,))
    model = nn.Linear(2, 2)
    with pytest.raises(CollectiveError, match="is a checkpoint of another model"):
        DataParallel(model, SelfComm("world"), COUNT).load(tmp_path)
    (tmp_path / "file").write_text("x")
    parallel = DataParallel(model, SelfComm("world"), COUNT)
    with pytest.raises(CollectiveError, match="could not be written"):
        parallel.save(tmp_path / "file" / "run", 1)
