"""The sum of gradients: the bits of the tree on any number of ranks, however it is cut into buckets and overlapped."""

import pytest
import torch
from text import tiny

import mpilm.optim.reduce as reduce
from mpilm.comm.threads import run_ranks
from mpilm.model.loss import loss_sum
from mpilm.optim.reduce import GradientSum, slice_counts
from mpilm.parallel.flat import ALIGNMENT
from mpilm.parallel.tree import block
from mpilm.trainer.build import build_model, initialise

V, CPU = 29, torch.device("cpu")
SIZES = [1, 2, 3, 4, 6, 8]


def model_of(tie):
    config = tiny("", "", model__d_model=16, model__n_layers=1, model__tie_embeddings=tie)
    model, flat = build_model(config.model, V, CPU)
    initialise(flat, config)
    return model, flat


def backward(model, microbatch):
    x = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(microbatch))
    loss = loss_sum(model(x, torch.arange(8), [2 * microbatch, 2 * microbatch + 1]), x.roll(-1, 1))
    (loss * 10.0 ** (microbatch % 5 - 2)).backward()  # of very different size: the order matters


def tree(leaves):
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


def oracle(tie, total):
    """Gradients by torch alone, added as the tree says; each use of a tied parameter on its own, then together."""
    model, flat = model_of(tie)
    of = []
    for microbatch in range(total):
        model.zero_grad(set_to_none=True)
        backward(model, microbatch)
        of.append({name: parameter.grad for name, parameter in model.named_parameters()})
    sums = {name: tree([gradients[name] for gradients in of]) for name in of[0]}
    for name, owner in flat.tied.items():
        sums[owner] = sums[owner] + sums.pop(name)
    return sums


def summed(size, tie, total, steps=1, **options):
    """What GradientSum gives on each rank, by name, in the last of some steps."""
    options = {"reproducible": True, "overlap": False, **options}

    def body(comm):
        model, flat = model_of(tie)
        gradients = GradientSum(flat, model, comm, total, **options)
        start, stop = block(comm.rank, comm.size, total)
        for _ in range(steps):
            for microbatch in range(start, stop):
                gradients.begin(microbatch - start)
                backward(model, microbatch)
                gradients.end(microbatch - start)
            result = gradients.reduce()
        return {name: view.clone() for name, view in flat.owned.views(result).items()}

    return run_ranks(size, body)


def assert_bits(found, expected):
    for theirs in found:
        assert theirs.keys() == expected.keys()
        assert all(torch.equal(theirs[name], expected[name]) for name in expected)


@pytest.fixture(params=[None, 1024], ids=["one-bucket", "buckets"])
def bucket(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reduce, "BUCKET", request.param)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [False, True])
def test_the_bits_are_those_of_the_tree(size, tie, overlap, bucket):
    assert_bits(summed(size, tie, 8, overlap=overlap), oracle(tie, 8))


@pytest.mark.parametrize(("size", "total"), [(1, 1), (1, 7), (2, 5), (3, 7), (4, 6), (5, 11)])
@pytest.mark.parametrize("overlap", [False, True])
def test_numbers_of_microbatches_that_are_no_powers_of_two(size, total, overlap, bucket):
    assert_bits(summed(size, True, total, overlap=overlap), oracle(True, total))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_left_over_for_the_next_step(size, overlap, bucket):
    assert_bits(summed(size, True, 8, steps=3, overlap=overlap), oracle(True, 8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [False, True])
def test_the_library_sum_is_close(size, overlap, bucket):
    expected = oracle(True, 8)
    for theirs in summed(size, True, 8, steps=2, reproducible=False, overlap=overlap):
        for name in expected:
            torch.testing.assert_close(theirs[name], expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))


def test_the_order_matters_for_these_gradients():
    """So that equal bits above mean something."""
    model, flat = model_of(True)
    gradients = flat.new_gradient()
    for name, parameter in model.named_parameters():
        parameter.grad = flat.gradients.views(gradients)[name]
    for microbatch in range(8):
        backward(model, microbatch)
    found = flat.owned.views(flat.add_tied(gradients))
    assert any(not torch.equal(found[name], expected) for name, expected in oracle(True, 8).items())


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 8, 40])
@pytest.mark.parametrize("numel", [0, 1, 16, 17, 100, 1024, 12345])
def test_slices_are_aligned_and_cover(numel, parts):
    counts = slice_counts(numel, parts)
    assert len(counts) == parts
    assert sum(counts) == numel
    filled = [count for count in counts if count]
    assert counts[: len(filled)] == filled
    assert all(count % ALIGNMENT == 0 for count in filled[:-1])
    assert max(counts, default=0) < numel / parts + ALIGNMENT


def test_a_rank_holds_few_buffers():
    def body(comm):
        model, flat = model_of(True)
        return len(GradientSum(flat, model, comm, 8, True, False).buffers), len(
            GradientSum(flat, model, comm, 8, False, False).buffers
        )

    assert {size: run_ranks(size, body)[0] for size in (1, 2, 4, 8)} == {1: (3, 1), 2: (2, 1), 4: (1, 1), 8: (1, 1)}
