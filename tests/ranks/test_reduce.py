"""The sum of gradients: the bits of the tree on any number of ranks, once a step or round by round, whole or in shards."""

from functools import cache

import pytest
import torch
from runs import CPU, differing, joined, small_buckets, whole_model
from text import tiny

from mpilm.comm.base import SelfComm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.threads import run_ranks
from mpilm.engine.pipelined import draw_values, resolve_model_layouts
from mpilm.model.loss import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.tree import block_of_rank, strided_assignment
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.reduce import build as way
from mpilm.parallel.reduce.rounds import RoundReducer
from mpilm.parallel.reduce.shared_memory import detect_topology
from mpilm.parallel.reduce.step import StepReducer
from mpilm.parallel.tied import TiedParameters

V = 29
SIZES = [1, 2, 3, 4, 5, 6, 8]
KINDS = [
    (0, {"shared": True}), (0, {"shared": False}), (0, {"shared": False, "overlap": True}), (1, {"shared": True}),
    (1, {"shared": False}), (2, {}), (3, {}),
]  # fmt: skip
"""ZeRO, and how the sums are made."""
UNEVEN = [(1, 1), (1, 7), (2, 5), (3, 7), (4, 6), (5, 11), (6, 11), (8, 13)]


def shape_of(tie):
    return tiny("", "", model__d_model=16, model__n_layers=1, model__tie_embeddings=tie).model


def backward(model, microbatch):
    x = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(microbatch))
    loss = loss_sum(model(x, SequenceInfo(torch.arange(8), [2 * microbatch, 2 * microbatch + 1])), x.roll(-1, 1))
    (loss * 10.0 ** (microbatch % 5 - 2)).backward()  # of very different size: the order matters


def tree(leaves):
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


@cache
def leaves(tie, total):
    """The gradients of each microbatch by torch alone."""
    model, flat = whole_model(shape_of(tie), V, CPU)
    draw_values(flat, shape_of(tie), seed=0)
    found = []
    for microbatch in range(total):
        model.zero_grad(set_to_none=True)
        backward(model, microbatch)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


@cache
def oracle(tie, total, add=tree):
    """Gradients added as the tree says; each use of a tied parameter on its own, then together."""
    of = leaves(tie, total)
    sums = {name: add([gradients[name] for gradients in of]) for name in of[0]}
    if tie:
        sums["embed.weight"] = sums["embed.weight"] + sums.pop("head.weight")
    return sums


class Part:
    """One rank's part of the sum: a model that is whole, and gradients that are laid out and summed as `zero` says."""

    def __init__(self, comm, tie, total, zero, overlap=False, reproducible=True, shared=True, wire_dtype="float32"):
        self.model, whole = whole_model(shape_of(tie), V, CPU)
        draw_values(whole, shape_of(tie), seed=0)
        table = resolve_model_layouts(shape_of(tie), V, (1,))
        self.flat = FlatParameters(table, CPU, zero, comm.rank, comm.size)
        if zero < 2:
            self.sum = StepReducer(self.flat, self.model, comm, total, reproducible, overlap, shared, wire_dtype)
            self.microbatch_ids = range(*block_of_rank(comm.rank, comm.size, total))
        else:
            self.sum = RoundReducer(self.flat, self.model, comm, total, wire_dtype)
            self.microbatch_ids = strided_assignment(comm.rank, comm.size, total)
        self.rounds = -(-total // comm.size)
        self.ties = TiedParameters(table, {0: self.flat}, SelfComm("pipeline"))

    def step(self, work):
        """`work(i)` makes the gradients of this rank's i-th microbatch."""
        for i in range(self.rounds):
            if i < len(self.microbatch_ids):
                self.sum.begin_microbatch(i)
                work(i)
                self.sum.end_microbatch(i)
            else:
                self.sum.join_round(i, lambda name: None)
        self.sum.reduce()
        self.ties.add_gradients({0: self.sum.sums})

    def backward(self, i):
        backward(self.model, self.microbatch_ids[i])

    def held(self):
        return {"gradient": self.flat.owned_slices(self.sum.sums)}


def summed(size, tie, total, zero, steps=1, ranks_per_node=0, **options):
    """The sums, by name, in the last of some steps."""

    def body(comm):
        part = Part(comm, tie, total, zero, **options)
        for _ in range(steps):
            part.step(part.backward)
        return part.held()

    return joined(run_ranks(size, body, ranks_per_node=ranks_per_node))


def bits(gradients):
    return {f"gradient of {name}": x.flatten().view(torch.int32) for name, x in gradients.items()}


@pytest.fixture(params=[256])
def bucket(request):
    with small_buckets(request.param):
        yield


@pytest.mark.parametrize(("tie", "bucket"), [(True, 256), (False, BUCKET)], indirect=["bucket"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("zero", "how"), KINDS, ids=str)
def test_the_bits_are_those_of_the_tree(size, tie, zero, how, bucket):
    assert differing(summed(size, tie, 8, zero, **how), bits(oracle(tie, 8))) == []


@pytest.mark.parametrize(("size", "total"), UNEVEN)
@pytest.mark.parametrize(("zero", "how"), KINDS, ids=str)
def test_numbers_of_microbatches_that_are_no_powers_of_two(size, total, zero, how, bucket):
    assert differing(summed(size, True, total, zero, **how), bits(oracle(True, total))) == []


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("zero", "how"), KINDS, ids=str)
def test_nothing_is_left_over_for_the_next_step(size, zero, how, bucket):
    assert differing(summed(size, True, 8, zero, steps=3, **how), bits(oracle(True, 8))) == []


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("size", "total"), [(1, 3), (2, 4), (3, 8), (4, 7)])
def test_gradients_that_are_delivered_apart_in_any_order(size, total, zero, bucket):
    of = leaves(True, total)

    def body(comm):
        part = Part(comm, True, total, zero)

        def deliver(i):
            m = part.microbatch_ids[i]
            names = list(of[m])
            for name in names[m % len(names) :] + names[: m % len(names)]:
                part.sum.accumulate(name, of[m][name].clone())

        part.step(deliver)
        return part.held()

    assert differing(joined(run_ranks(size, body)), bits(oracle(True, total))) == []


def test_a_gradient_that_does_not_come_is_missed():
    part = Part(SelfComm(), True, 2, zero=2)
    part.sum.begin_microbatch(0)
    part.sum.accumulate("head.weight", torch.zeros(V, 16))
    with pytest.raises(RuntimeError, match=r"backward left no gradient for some of norm.weight"):
        part.sum.end_microbatch(0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_library_sum_is_close(size, overlap, bucket):
    found = summed(size, True, 8, zero=0, steps=2, reproducible=False, overlap=overlap)
    for name, expected in oracle(True, 8).items():
        ours = found[f"gradient of {name}"].view(torch.float32).view(expected.shape)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_order_matters_for_these_gradients():
    """So that equal bits above mean something."""
    assert differing(bits(oracle(True, 8)), bits(oracle(True, 8, add=sum)))


def test_a_rank_holds_few_buffers():
    def buffers(size, total, zero, **options):
        """Their number, and how many elements they hold beside the padding of a shard."""
        return run_ranks(size, lambda comm: Part(comm, True, total, zero, **options).sum.buffers)

    def count(size, total, zero, **options):
        (number,) = {len(theirs) for theirs in buffers(size, total, zero, **options)}
        return number

    assert [count(size, 8, 0, reproducible=False) for size in (1, 2, 4, 8)] == [1, 1, 1, 1]
    for zero in (0, 1, 2, 3):  # log2 of the microbatches of a rank: a right node is added to its sibling as it comes
        assert [count(size, 8, zero) for size in (1, 2, 4, 8)] == [3, 2, 1, 1]
        assert [count(size, 32, zero) for size in (1, 2, 4, 8)] == [5, 4, 3, 2]
    whole = buffers(1, 8, zero=2)[0][0].tensor.numel()
    shards = [theirs[0].tensor.numel() for theirs in buffers(4, 8, zero=2)]
    assert sum(shards) == whole
    assert max(shards) < 0.3 * whole


# Several nodes.


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("size", "ranks_per_node", "total"), [(4, 2, 8), (4, 2, 7), (6, 2, 8), (6, 3, 12), (6, 3, 11), (8, 4, 8), (8, 2, 13)]
)
def test_nodes_add_at_home_and_then_across_to_the_same_bits(size, ranks_per_node, total, tie, zero, bucket):
    def body(comm):
        part = Part(comm, tie, total, zero)
        assert part.sum.is_shared
        assert part.sum.reducer.topology.inter_node.size == size // ranks_per_node
        for _ in range(2):
            part.step(part.backward)
        return part.held()

    assert differing(joined(run_ranks(size, body, ranks_per_node=ranks_per_node)), bits(oracle(tie, total))) == []


@pytest.mark.parametrize(("size", "ranks_per_node"), [(5, 2), (3, 1), (7, 3)])
def test_nodes_of_unequal_size_send(size, ranks_per_node):
    """The last node has fewer ranks, or each has one."""
    run_ranks(size, lambda comm: ask(detect_topology(comm) is None), ranks_per_node=ranks_per_node)
    assert differing(summed(size, True, 8, 0, ranks_per_node=ranks_per_node), bits(oracle(True, 8))) == []


def ask(what):
    assert what


def test_each_slice_leaves_a_node_once():
    """Of n elements each of r ranks sends n/r to the other nodes, and gathers as many."""

    def body(comm):
        traced = InstrumentedComm(comm)
        part = Part(traced, False, 8, 0)
        part.step(part.backward)
        across = part.sum.reducer.topology.inter_node
        assert (
            across.sent_bytes["all_to_all"] + across.sent_bytes["all_gather"] <= 4 * part.flat.layout.numel * (0.5 + 0.25) * 1.2
        )
        assert traced.sent_bytes["all_to_all"] == 0
        return across.sent_bytes["all_to_all"]

    assert all(count > 0 for count in run_ranks(4, body, ranks_per_node=2))


# Fewer bytes.


@pytest.mark.parametrize(("zero", "how"), [(0, {"shared": False}), (1, {"shared": False}), (2, {}), (3, {})])
@pytest.mark.parametrize("size", [2, 3])
def test_bfloat16_travels_as_half_the_bytes(size, zero, how):
    def sent(wire_dtype):
        def body(comm):
            traced = InstrumentedComm(comm)
            part = Part(traced, False, 8, zero, wire_dtype=wire_dtype, **how)
            part.step(part.backward)
            return traced.sent_bytes["all_to_all"] + (traced.sent_bytes["all_gather"] if zero == 0 else 0)

        return run_ranks(size, body)

    assert [2 * count for count in sent("bfloat16")] == sent("float32")


@pytest.mark.parametrize(
    ("zero", "how"), [(0, {"shared": False}), (0, {"shared": True}), (1, {"shared": False}), (2, {}), (3, {})]
)
@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 1), (3, 1), (4, 2)])
def test_what_rounding_loses_comes_in_the_next_steps(size, ranks_per_node, zero, how, bucket):
    """The sum over many steps of equal gradients is their number times the gradient, but for one rounding."""
    steps = 16

    def body(comm):
        part = Part(comm, False, 8, zero, wire_dtype="bfloat16", **how)
        totals, first = {}, {}
        for _ in range(steps):
            part.step(part.backward)
            for piece, x in part.held()["gradient"].items():
                totals[piece] = totals.get(piece, 0) + x
                first.setdefault(piece, x.clone())
        return {"gradient": totals}, {"gradient": first}

    found = run_ranks(size, body, ranks_per_node=ranks_per_node)
    totals, once = (joined([theirs[i] for theirs in found]) for i in range(2))
    exact = oracle(False, 8)
    for name, want in exact.items():
        total, alone = (of[f"gradient of {name}"].view(torch.float32).view(want.shape) for of in (totals, once))
        scale = float(want.abs().max())
        assert float((alone - want).abs().max()) < 2**-6 * scale
        assert float((total / steps - want).abs().max()) < (2**-6 / steps + 1e-5) * scale
    assert differing(once, bits(exact)) != []  # it was rounded


@pytest.mark.parametrize("zero", [0, 1])
def test_the_faster_way_is_found_and_known_to_all(zero, monkeypatch):
    monkeypatch.setattr(way, "MIN_TIMED_NUMEL", 1)
    found = run_ranks(4, lambda comm: way.fastest_method(comm, 5000, zero == 0, "float32"), ranks_per_node=2)
    assert all(theirs == found[0] for theirs in found)
    chosen, tried = found[0]
    assert set(tried) == {"shared", "sent"}
    assert tried[chosen] == min(tried.values()) > 0
    assert run_ranks(3, lambda comm: way.fastest_method(comm, 5000, True, "float32"), ranks_per_node=1) == [("sent", {})] * 3
