"""Gradient reduction: the bits of the summation tree on any number of ranks, once a step or every round, full or sharded."""

from functools import cache

import pytest
import torch
from runs import CPU, assemble, differing, full_model, small_buckets
from text import tiny_config
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.engine.pipelined import draw_values, resolve_model_layouts
from mpilm.kernels.base import loss_sum
from mpilm.model.sequence_info import SequenceInfo
from mpilm.ops.tree import block_of_rank
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.reduce import build, shared_memory
from mpilm.parallel.reduce.build import ReductionMethod, make_step_reducer
from mpilm.parallel.reduce.rounds import LocalRoundReducer, MicrobatchRoundReducer
from mpilm.parallel.reduce.shared_memory import ShortVectorReducer, detect_topology
from mpilm.parallel.tied import TiedParameters

V = 29
METHODS = [
    (0, {"shared": True}), (0, {"shared": False}), (0, {"shared": False, "overlap": True}), (1, {"shared": True}),
    (1, {"shared": False}), (2, {}), (3, {}), (0, {"shared": False, "halving": True}), (1, {"shared": False, "halving": True}),
    (3, {"halving": True}),
]  # fmt: skip
"""ZeRO, and options of the reducer."""
WORK = [  # ranks, microbatches, tied embeddings, elements of a bucket
    (1, 7, True, 256), (2, 8, False, BUCKET), (3, 8, True, 256), (4, 6, False, 256), (5, 11, True, 256), (6, 11, False, BUCKET),
    (8, 8, True, 256), (8, 13, True, 256),
]  # fmt: skip


def shape_of(tie):
    return tiny_config("", "", model__d_model=16, model__n_layers=1, model__tie_embeddings=tie).model


def backward(model, microbatch):
    x = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(microbatch))
    loss = loss_sum(model(x, SequenceInfo(torch.arange(8), [2 * microbatch, 2 * microbatch + 1])), x.roll(-1, 1))
    (loss * 10.0 ** (microbatch % 5 - 2)).backward()  # of very different size: the order matters


def tree_sum(leaves):
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return leaves[0]


@cache
def microbatch_gradients(tie, total):
    """Return the gradients of each microbatch by torch alone."""
    model, flat = full_model(shape_of(tie), V, CPU)
    draw_values(flat, shape_of(tie), seed=0)
    found = []
    for microbatch in range(total):
        model.zero_grad(set_to_none=True)
        backward(model, microbatch)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


@cache
def expected_gradients(tie, total, add=tree_sum):
    """Return the gradients added in tree order; those of each use of a tied parameter first, then both."""
    leaves = microbatch_gradients(tie, total)
    sums = {name: add([gradients[name] for gradients in leaves]) for name in leaves[0]}
    if tie:
        sums["embed.weight"] = sums["embed.weight"] + sums.pop("head.weight")
    return sums


class Replica:
    """One rank: a full model, and the reducer of its gradients."""

    def __init__(
        self, comm, tie, total, zero, overlap=False, reproducible=True, shared=True, wire_dtype="float32", halving=False
    ):
        self.model, full = full_model(shape_of(tie), V, CPU)
        draw_values(full, shape_of(tie), seed=0)
        table = resolve_model_layouts(shape_of(tie), V, (1,))
        self.flat = FlatParameters(table, CPU, zero, comm)
        if zero < 2:
            method = ReductionMethod(shared, halving)
            self.reducer = make_step_reducer(self.flat, self.model, total, reproducible, overlap, method, wire_dtype)
            self.microbatch_ids = range(*block_of_rank(comm.rank, comm.size, total))
        else:
            kind = LocalRoundReducer if comm.size == 1 else MicrobatchRoundReducer
            self.reducer = kind(self.flat, self.model, total, wire_dtype, halving=halving)
            self.microbatch_ids = range(comm.rank, total, comm.size)
        self.rounds = -(-total // comm.size)
        self.tied = TiedParameters(table, {(0, False): self.flat}, SelfComm("pipeline"))

    def step(self, compute):
        """Reduce the gradients of a step; `compute(i)` makes those of this rank's i-th microbatch."""
        for i in range(self.rounds):
            if i < len(self.microbatch_ids):
                self.reducer.begin_microbatch(i)
                compute(i)
                self.reducer.end_microbatch(i)
            else:
                self.reducer.join_round(i, lambda name: None)
        self.reducer.reduce()
        self.tied.add_gradients({(0, False): self.reducer.sums})

    def backward(self, i):
        backward(self.model, self.microbatch_ids[i])

    def gradients(self):
        return {"gradient": self.flat.owned_slices(self.reducer.sums)}


def reduce_on_threads(size, tie, total, zero, steps=1, ranks_per_node=0, **options):
    """Return the reduced gradients of the last of some steps."""

    def body(comm):
        replica = Replica(comm, tie, total, zero, **options)
        for _ in range(steps):
            replica.step(replica.backward)
        return replica.gradients()

    return assemble(run_ranks(size, body, ranks_per_node=ranks_per_node))


def bits(gradients):
    return {f"gradient of {name}": x.flatten().view(torch.int32) for name, x in gradients.items()}


@pytest.fixture(autouse=True)
def many_buckets():
    with small_buckets(256):
        yield


@pytest.fixture(autouse=True)
def no_short_vectors(monkeypatch):
    monkeypatch.setattr(shared_memory, "MAX_SHORT_NUMEL", 0)


@pytest.mark.parametrize(("size", "total", "tie", "numel"), WORK)
@pytest.mark.parametrize(("zero", "method"), METHODS, ids=str)
def test_reduction_has_the_bits_of_the_tree(size, total, tie, numel, zero, method):
    """In the second step as in the first: nothing is left over."""
    with small_buckets(numel):
        found = reduce_on_threads(size, tie, total, zero, steps=2, **method)
    assert differing(found, bits(expected_gradients(tie, total))) == []


@pytest.mark.parametrize(("size", "total", "tie", "numel"), WORK[1:])
def test_short_vectors_have_the_bits_of_the_tree(size, total, tie, numel, monkeypatch):
    """In the fourth step as in the first: both places of a rank have had two turns."""
    monkeypatch.setattr(shared_memory, "MAX_SHORT_NUMEL", 1 << 30)

    def body(comm):
        counting = InstrumentedComm(comm)
        replica = Replica(counting, tie, total, zero=0)
        assert isinstance(replica.reducer.across_ranks, ShortVectorReducer)
        for _ in range(3):
            replica.step(replica.backward)
        before = counting.calls["barrier"]
        replica.step(replica.backward)
        assert counting.calls["barrier"] == before + 1
        return replica.gradients()

    with small_buckets(numel):
        found = assemble(run_ranks(size, body))
    assert differing(found, bits(expected_gradients(tie, total))) == []


def test_other_order_of_additions_gives_other_bits():
    assert differing(bits(expected_gradients(True, 8)), bits(expected_gradients(True, 8, add=sum)))


@pytest.mark.parametrize(("zero", "size", "total"), [(0, 3, 8), (1, 2, 4), (2, 4, 7), (3, 1, 3), (3, 3, 8)])
def test_gradients_accumulated_in_any_order_have_the_bits_of_the_tree(size, total, zero):
    leaves = microbatch_gradients(True, total)

    def body(comm):
        replica = Replica(comm, True, total, zero)

        def accumulate(i):
            m = replica.microbatch_ids[i]
            names = list(leaves[m])
            for name in names[m % len(names) :] + names[: m % len(names)]:
                replica.reducer.accumulate(name, leaves[m][name].clone())

        replica.step(accumulate)
        return replica.gradients()

    assert differing(assemble(run_ranks(size, body)), bits(expected_gradients(True, total))) == []


def test_missing_gradient_is_named():
    reducer = Replica(SelfComm(), True, 2, zero=2).reducer
    reducer.begin_microbatch(0)
    reducer.accumulate("head.weight", torch.zeros(V, 16))
    with pytest.raises(RuntimeError, match=r"backward left no gradient for some of norm.weight"):
        reducer.end_microbatch(0)


@pytest.mark.parametrize(("size", "overlap"), [(1, False), (2, True), (3, False), (4, True), (8, False)])
def test_all_reduce_of_the_library_is_close_to_the_tree(size, overlap):
    found = reduce_on_threads(size, True, 8, zero=0, steps=2, reproducible=False, overlap=overlap)
    expected = expected_gradients(True, 8)
    for name, x in expected.items():
        ours = found[f"gradient of {name}"].view(torch.float32).view(x.shape)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert differing(found, bits(expected))  # it adds in another order


def test_rank_needs_log2_buffers_and_a_shard_of_them():
    def buffers(size, total, zero, **options):
        return run_ranks(size, lambda comm: Replica(comm, True, total, zero, **options).reducer.buffers)

    def count(size, total, zero, **options):
        (number,) = {len(theirs) for theirs in buffers(size, total, zero, **options)}
        return number

    assert [count(size, 8, 0, reproducible=False) for size in (1, 2, 4, 8)] == [1, 1, 1, 1]
    for zero in (0, 1, 2, 3):  # a right node is added to its sibling's buffer at once
        assert [count(size, 8, zero) for size in (1, 2, 4, 8)] == [3, 2, 1, 1]
        assert [count(size, 32, zero) for size in (1, 2, 8)] == [5, 4, 2]
    full = buffers(1, 8, zero=2)[0][0].tensor.numel()
    shards = [theirs[0].tensor.numel() for theirs in buffers(4, 8, zero=2)]
    assert sum(shards) == full
    assert max(shards) < 0.3 * full


# Several nodes.


@pytest.mark.parametrize(
    ("size", "ranks_per_node", "total", "tie", "zero"),
    [
        (4, 2, 8, True, 0), (4, 2, 7, False, 1), (6, 2, 8, False, 0), (6, 3, 11, True, 1), (8, 4, 8, False, 1),
        (8, 2, 13, True, 0),
    ],
)  # fmt: skip
def test_reduction_within_and_across_nodes_has_the_bits_of_the_tree(size, ranks_per_node, total, tie, zero):
    def body(comm):
        replica = Replica(comm, tie, total, zero)
        assert replica.reducer.across_ranks.uses_shared_buffers
        assert replica.reducer.across_ranks.topology.inter_node.size == size // ranks_per_node
        for _ in range(2):
            replica.step(replica.backward)
        return replica.gradients()

    assert differing(assemble(run_ranks(size, body, ranks_per_node=ranks_per_node)), bits(expected_gradients(tie, total))) == []


@pytest.mark.parametrize(("size", "ranks_per_node"), [(5, 2), (3, 1), (7, 3)])
def test_nodes_of_unequal_size_or_of_one_rank_send_messages(size, ranks_per_node):
    assert run_ranks(size, lambda comm: detect_topology(comm) is None, ranks_per_node=ranks_per_node) == [True] * size
    found = reduce_on_threads(size, True, 8, 0, ranks_per_node=ranks_per_node)
    assert differing(found, bits(expected_gradients(True, 8))) == []


def test_each_slice_leaves_a_node_once():
    """Of n elements each of r ranks of a node sends n/r to the other nodes, and gathers as many."""

    def body(comm):
        instrumented = InstrumentedComm(comm)
        replica = Replica(instrumented, False, 8, 0)
        replica.step(replica.backward)
        sent = replica.reducer.across_ranks.topology.inter_node.sent_bytes
        assert sent["all_to_all"] + sent["all_gather"] <= 4 * replica.flat.layout.numel * (0.5 + 0.25) * 1.2
        assert instrumented.sent_bytes["all_to_all"] == 0
        return sent["all_to_all"]

    assert all(count > 0 for count in run_ranks(4, body, ranks_per_node=2))


# bfloat16 messages.


@pytest.mark.parametrize(
    ("size", "zero", "method"), [(2, 0, {"shared": False}), (3, 1, {"shared": False}), (3, 2, {}), (2, 3, {})]
)
def test_bfloat16_messages_have_half_the_bytes(size, zero, method):
    def sent(wire_dtype):
        def body(comm):
            instrumented = InstrumentedComm(comm)
            replica = Replica(instrumented, False, 8, zero, wire_dtype=wire_dtype, **method)
            replica.step(replica.backward)
            return instrumented.sent_bytes["all_to_all"] + (instrumented.sent_bytes["all_gather"] if zero == 0 else 0)

        return run_ranks(size, body)

    assert [2 * count for count in sent("bfloat16")] == sent("float32")


@pytest.mark.parametrize(
    ("size", "ranks_per_node", "zero", "method"),
    [
        (2, 1, 0, {"shared": False}), (4, 2, 0, {"shared": True}), (3, 1, 1, {"shared": False}), (3, 1, 2, {}), (2, 1, 3, {}),
        (4, 2, 2, {}),
    ],
)  # fmt: skip
def test_bfloat16_rounding_errors_do_not_accumulate(size, ranks_per_node, zero, method):
    """The sum over many steps of equal gradients is their number times the gradient, except for one rounding."""
    steps = 8

    def body(comm):
        replica = Replica(comm, False, 8, zero, wire_dtype="bfloat16", **method)
        totals, first = {}, {}
        for _ in range(steps):
            replica.step(replica.backward)
            for item, x in replica.gradients()["gradient"].items():
                totals[item] = totals.get(item, 0) + x
                first.setdefault(item, x.clone())
        return {"gradient": totals}, {"gradient": first}

    found = run_ranks(size, body, ranks_per_node=ranks_per_node)
    totals, first = (assemble([theirs[i] for theirs in found]) for i in range(2))
    exact = expected_gradients(False, 8)
    for name, x in exact.items():
        total, rounded = (of[f"gradient of {name}"].view(torch.float32).view(x.shape) for of in (totals, first))
        scale = float(x.abs().max())
        assert float((rounded - x).abs().max()) < 2**-6 * scale
        assert float((total / steps - x).abs().max()) < (2**-6 / steps + 1e-5) * scale
    assert differing(first, bits(exact)) != []  # it was rounded


@pytest.mark.parametrize("zero", [0, 1])
def test_timings_of_methods_are_the_same_on_all_ranks(zero, monkeypatch):
    monkeypatch.setattr(build, "MIN_TIMED_NUMEL", 1)

    def body(comm):
        return build.time_methods(comm, 5000, zero == 0, build.list_methods(comm, "auto"))

    found = run_ranks(8, body, ranks_per_node=2)
    assert all(theirs == found[0] for theirs in found)
    assert set(map(str, found[0])) == {
        "shared-memory, recursive halving", "shared-memory", "messages, recursive halving", "messages",
    }  # fmt: skip
    assert min(found[0].values()) > 0
    assert set(run_ranks(4, body, ranks_per_node=2)[0]) == {
        ReductionMethod(*flags) for flags in ((True, False), (False, True), (False, False))
    }


def test_methods_that_ranks_have():
    def methods(size, ranks_per_node, reduce):
        found = run_ranks(size, lambda comm: build.list_methods(comm, reduce), ranks_per_node=ranks_per_node)
        return [(method.shared, method.halving) for method in found[0]]

    assert methods(3, 1, "auto") == [(False, False)]
    assert methods(4, 4, "shared-memory") == [(True, False)]
    assert methods(8, 2, "shared-memory") == [(True, True), (True, False)]
    assert methods(5, 1, "messages") == [(False, True), (False, False)]
