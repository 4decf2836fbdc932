"""Data parallelism for one's own model and loop: plain torch on one rank, the same bits on any number.

tests/mpi/test_data_parallel.py covers dropout, since threads share torch's generator, and the example.
"""

import copy
import math

import pytest
import torch
from thread_ranks import run_ranks
from torch import nn

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.data_parallel import DataParallel
from mpilm.errors import ConfigError

COUNT = 7
ALONE = SelfComm("world")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


class Net(nn.Module):
    """A network with a tied matrix, an unused parameter and a buffer."""

    def __init__(self, seed=0):
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


def compute_loss(model, step, m):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + m))
    return (model(x) - x.sum(1, keepdim=True)).square().mean() * 10.0 ** (m % 3)


def backward_plain():
    """Return a network with the gradients of plain torch for step 0."""
    plain = Net()
    for m in range(COUNT):
        compute_loss(plain, 0, m).backward()
    return plain


def train(comm, steps=4, optimizer="adam", folder=None, save_at=()):
    model = Net(seed=comm.rank)  # ranks start differently: rank 0's values count
    parallel = DataParallel(model, comm, COUNT)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    totals = []
    for step in range(parallel.load(folder, optimizer) if folder else 0, steps):
        losses = {}
        for m in parallel.microbatches(step):
            loss = compute_loss(model, step, m)
            loss.backward()
            losses[m] = loss.detach()
        optimizer.step()
        totals.append(parallel.total(losses))
        if step + 1 in save_at:
            parallel.save(folder, step + 1, optimizer, extra={"totals": totals})
    return totals, {name: value.clone() for name, value in model.state_dict().items()}, parallel.extra


def are_equal(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [1, 2])
def test_data_parallel_sparse_gradients_are_summed(size):
    def body(comm):
        model = torch.nn.Embedding.from_pretrained(torch.ones(5, 2), freeze=False, sparse=True)
        for m in DataParallel(model, comm, 2).microbatches(0):
            model(torch.tensor([m, m, 3])).sum().backward()
        return model.weight.grad.tolist()

    assert run_ranks(size, body) == [[[2.0] * 2] * 2 + [[0.0] * 2, [2.0] * 2, [0.0] * 2]] * size


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_data_parallel_any_ranks_give_the_same_bits(size, optimizer):
    alone = train(ALONE, optimizer=optimizer)
    assert all(are_equal(result, alone) for result in run_ranks(size, lambda comm: train(comm, optimizer=optimizer)))
    assert alone[0][3] != alone[0][0]


def test_data_parallel_one_rank_has_the_gradients_of_plain_torch():
    model = Net()
    for m in DataParallel(model, ALONE, COUNT).microbatches(0):
        compute_loss(model, 0, m).backward()
    for (name, ours), plain in zip(model.named_parameters(), backward_plain().parameters(), strict=True):
        expected = torch.zeros_like(plain) if plain.grad is None else plain.grad
        torch.testing.assert_close(ours.grad, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert not model.unused.grad.any()


def test_data_parallel_keeps_parameter_objects_and_values():
    model = Net()
    values, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    DataParallel(model, ALONE, COUNT)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert model.again.weight is model.first.weight


@pytest.mark.parametrize("size", [1, 3])
def test_data_parallel_frozen_parameters_and_buffers_get_rank_zeros_values(size):
    """In any dtype and memory order."""

    def body(comm):
        model = Net(seed=comm.rank)
        model.register_buffer("spread", torch.full((1,), float(comm.rank)).expand(4))
        model.fixed = nn.Parameter(torch.full((2, 3), 0.5 + comm.rank, dtype=torch.bfloat16).t(), requires_grad=False)
        model.first.weight.requires_grad_(False)
        for m in DataParallel(model, comm, COUNT).microbatches(0):
            compute_loss(model, 0, m).backward()
        assert model.first.weight.grad is None
        return model.state_dict(), model.last.weight.grad

    plain = backward_plain()
    for state, gradient in run_ranks(size, body):
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        assert torch.equal(state["spread"], torch.zeros(4))
        assert torch.equal(state["fixed"], torch.full((3, 2), 0.5, dtype=torch.bfloat16))
        torch.testing.assert_close(gradient, plain.last.weight.grad)


class BatchNormNet(nn.Module):
    """A network with a frozen BatchNorm and two that learn their statistics, one of them twice for each microbatch."""

    def __init__(self):
        super().__init__()
        self.frozen, self.twice, self.mean = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)
        self.frozen.running_mean += 0.5

    def forward(self, x):
        self.frozen.eval()
        return self.mean(self.twice(torch.tanh(self.twice(self.frozen(x))))).sum(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:BatchNorm1d normalizes")
@pytest.mark.parametrize("size", [1, 2, 3])
def test_data_parallel_running_statistics_are_those_of_one_rank(size):
    def body(comm):
        model = BatchNormNet()
        parallel = DataParallel(model, comm, COUNT)
        for step in range(2):
            for m in parallel.microbatches(step):
                compute_loss(model, step, m).backward()
        return model.state_dict()

    plain, alone = BatchNormNet(), body(ALONE)
    for step in range(2):
        for m in range(COUNT):
            compute_loss(plain, step, m)
    for found in run_ranks(size, body):
        assert all(torch.equal(found[name], value) for name, value in alone.items())
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert (alone["twice.num_batches_tracked"], alone["frozen.num_batches_tracked"]) == (4 * COUNT, 0)


def test_data_parallel_batch_norm_warns_once():
    with pytest.warns(UserWarning, match="BatchNorm1d normalizes each microbatch by itself") as caught:
        run_ranks(3, lambda comm: DataParallel(BatchNormNet(), comm, COUNT))
    assert len(caught) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_data_parallel_changed_requires_grad_raises(trained):
    model = Net()
    model.last.weight.requires_grad_(not trained)
    parallel = DataParallel(model, ALONE, COUNT)
    model.last.weight.requires_grad_(trained)
    with pytest.raises(ConfigError, match=r"last.weight: requires_grad has changed since DataParallel was created"):
        next(parallel.microbatches(0))


def test_data_parallel_model_that_does_not_fit_raises():
    with pytest.raises(CollectiveError, match="8 ranks for 7 microbatches a step; start 7 or fewer"):
        run_ranks(8, lambda comm: DataParallel(Net(), comm, COUNT))
    with pytest.raises(CollectiveError, match=r"parameter unused is torch\.float64; sums are made in float32"):
        DataParallel(Net().double(), ALONE, COUNT)
    with pytest.raises(CollectiveError, match="the model has no parameters that require a gradient"):
        DataParallel(Net().requires_grad_(False), ALONE, COUNT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_data_parallel_resume_on_other_ranks_gives_the_same_bits(tmp_path, optimizer):
    alone = train(ALONE, 6, optimizer)
    run_ranks(3, lambda comm: train(comm, 4, optimizer, tmp_path, save_at=(2, 4)))
    resumed = run_ranks(2, lambda comm: train(comm, 6, optimizer, tmp_path))
    assert all(are_equal((alone[0][4:], alone[1]), result) for result in resumed)
    assert resumed[1][2] == {"totals": alone[0][:4]}


def test_data_parallel_load_damaged_checkpoint_takes_an_older_one(tmp_path):
    run_ranks(2, lambda comm: train(comm, 4, "sgd", tmp_path, save_at=(2, 4)))
    file = tmp_path / "step-00000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    alone, resumed = train(ALONE, 4, "sgd"), train(ALONE, 4, "sgd", tmp_path, save_at=(4,))
    assert are_equal((alone[0][2:], alone[1]), resumed)
    assert names_in(tmp_path) == ["broken-1-step-00000004", "step-00000002", "step-00000004"]
    assert train(ALONE, 4, "sgd", tmp_path)[0] == []
    for step in (2, 4):
        (tmp_path / f"step-0000000{step}" / "model.safetensors").unlink()
    with pytest.raises(CollectiveError, match=r"every checkpoint in .* is damaged"):
        train(ALONE, 4, "sgd", tmp_path)


def test_data_parallel_load_of_another_model_or_optimizer_raises(tmp_path):
    train(ALONE, 2, "adam", tmp_path, save_at=(2,))
    with pytest.raises(CollectiveError, match="is a checkpoint of another model"):
        DataParallel(nn.Linear(2, 2), ALONE, COUNT).load(tmp_path)
    model = Net()
    parallel = DataParallel(model, ALONE, COUNT)
    with pytest.raises(CollectiveError, match=r"state of \w+.\w+, a parameter that this optimizer does not have"):
        parallel.load(tmp_path, torch.optim.AdamW([model.last.weight, model.last.bias]))
    two_groups = [{"params": [model.last.weight]}, {"params": [model.last.bias]}]
    with pytest.raises(CollectiveError, match="the state of another optimizer"):
        parallel.load(tmp_path, torch.optim.AdamW(two_groups))


def test_data_parallel_save_again_at_the_same_step_keeps_the_checkpoint(tmp_path):
    model = Net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    for _ in range(2):
        parallel = DataParallel(model, ALONE, COUNT)
        parallel.load(tmp_path, optimizer)
        parallel.save(tmp_path, 5, optimizer)
    assert names_in(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize(
    ("damage", "ranks", "problem"),
    [
        (lambda weight, rank: weight[0, 0].fill_(math.nan), 1, r"last\.weight is not finite"),
        (lambda weight, rank: weight[0, 0].mul_(1 + rank), 2, r"last\.weight is not the same on all ranks"),
    ],
)
def test_data_parallel_save_of_wrong_weights_is_refused(tmp_path, damage, ranks, problem):
    def save(comm):
        model = Net()
        parallel = DataParallel(model, comm, COUNT)
        damage(model.last.weight.data, comm.rank)
        parallel.save(tmp_path, 1)

    with pytest.raises(CollectiveError, match=problem):
        run_ranks(ranks, save)
    assert names_in(tmp_path) == []


def test_data_parallel_save_prunes_old_checkpoints(tmp_path):
    train(ALONE, 5, "sgd", tmp_path, save_at=(1, 2, 3, 4))
    assert names_in(tmp_path) == ["step-00000003", "step-00000004"]


def test_data_parallel_save_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CollectiveError, match="cannot be written"):
        DataParallel(Net(), ALONE, COUNT).save(tmp_path / "file" / "run", 1)
