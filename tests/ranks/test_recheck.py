"""The recheck of the computation: no false alarm and the same bits on every layout; every flipped bit found, or harmless."""

import json
import random
import re
import socket
import threading
import time
from dataclasses import replace
from functools import cache, partial
from math import prod
from unittest import mock

import numpy as np
import pytest
import torch
from runs import assemble, build_train_model, differing, layout, owned_state, small_config, train_to_end, train_until_killed
from text import tiny_config, write_tokens
from thread_ranks import run_ranks
from torch import nn

from mpilm.checkpoint import manager
from mpilm.comm.collective_errors import CollectiveError
from mpilm.engine import recheck
from mpilm.engine.recheck import Recheck, _find_wrong
from mpilm.engine.state_check import check_state
from mpilm.engine.step import train_step
from mpilm.engine.sum_check import draw_interval, judge
from mpilm.errors import RanksDisagreeError
from mpilm.mesh.shape import MeshShape
from mpilm.ops.tree_reduce import TreeMerger
from mpilm.optim.optimizer import OPTIMIZERS, AdamW
from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.parallel.reduce import shared_memory
from mpilm.parallel.reduce.record import GradientRecord, add_nodes
from mpilm.parallel.reduce.rounds import MicrobatchRoundReducer
from mpilm.parallel.reduce.step import StepReducer
from mpilm.trainer import loop
from mpilm.trainer.recovery import bad_hosts
from mpilm.verification.layouts import RandomTokens

MIXTURE = {"model__arch": "mixtral", "model__n_experts": 6, "model__d_ff": 32}
LAYOUTS = {
    "one rank": (1, {}),
    "data 2": (2, {}),
    "data 3, uneven": (3, {}),
    "data 4, ZeRO-1": (4, layout(zero=1)),
    "data 3, ZeRO-2": (3, layout(zero=2)),
    "data 3, ZeRO-3": (3, layout(zero=3)),
    "pipeline 2": (2, layout(pipeline=2)),
    "pipeline 3": (3, layout(pipeline=3)),
    "zero-bubble": (2, layout(pipeline=2, schedule="zero-bubble")),
    "interleaved": (2, layout(pipeline=2, schedule="interleaved")),
    "tensor 2": (2, {**layout(tensor=2), "model__n_kv_heads": 2}),
    "pipeline 2, tensor 2": (4, {**layout(pipeline=2, tensor=2), "model__n_kv_heads": 2}),
    "pipeline 2, bfloat16": (2, {**layout(pipeline=2), "train__dtype": "bfloat16"}),
    "context 2, ZeRO-3": (2, layout(context=2, zero=3)),
    "context 3": (3, {**layout(context=3), "model__context_length": 12}),
    "experts 2, untied": (2, {**layout(expert=2), **MIXTURE, "model__tie_embeddings": False}),
    "experts 3, ZeRO-2": (3, {**layout(expert=3, zero=2), **MIXTURE}),
    "pipeline 2, data 2, ZeRO-3": (4, layout(pipeline=2, zero=3)),
    "zero-bubble, data 3": (6, layout(pipeline=2, schedule="zero-bubble")),
    "interleaved, data 2": (4, layout(pipeline=2, schedule="interleaved")),
    "tensor 2, data 2": (4, {**layout(tensor=2), "model__n_kv_heads": 2}),
    "context 2, data 2": (4, layout(context=2)),
    "experts 3, data 2": (6, {**layout(expert=3), **MIXTURE}),
    "recompute, ZeRO-3": (2, {**layout(zero=3), "train__recompute": "block"}),
    "bfloat16": (2, {"train__dtype": "bfloat16"}),
    "replicas apart": (2, {**layout(sync_every=2), "run__eval_every": 0}),
}


def train(size, changes, every, steps=3, prepare=lambda model: None):
    """Return the losses and the assembled state after some steps on thread ranks; prepare(model) is called before them."""
    config = small_config(**changes)

    def body(comm):
        model, source = build_train_model(config, comm), RandomTokens(config)
        prepare(model)
        check = Recheck(model, every)
        losses = [train_step(model, source, step, recheck=check).loss for step in range(steps)]
        if every:
            check_state(model, steps)  # as before each checkpoint
        return losses, owned_state(model)

    outcomes = run_ranks(size, body, timeout_s=60.0)
    states = [state for _, state in outcomes]
    return outcomes[0][0], assemble(states[:1] if changes.get("parallel__sync_every") else states)


@pytest.mark.parametrize("name", LAYOUTS)
def test_recheck_raises_no_alarm_and_changes_no_bit(name):
    size, changes = LAYOUTS[name]
    losses, state = train(size, changes, every=1)
    expected_losses, expected = train(size, changes, every=0)
    assert losses == expected_losses
    assert differing(state, expected) == []


def test_all_microbatches_are_drawn_in_time():
    config = small_config()

    def body(comm):
        check = Recheck(build_train_model(config, comm), 1)
        return {m for step in range(60) for m in check._draw(step, check.model.mesh.coordinate)}

    assert set().union(*run_ranks(3, body)) == set(range(8))


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([(0, 8), (3, 0), (2, 0)], [0]),  # two of three agree
        ([(0, 8), (3, 0), (2, 8)], [3]),
        ([(0, 8), (3, 0), (2, 5)], [0, 3]),  # no two agree
        ([(0, 8), (1, 0), (0, 0), (1, 0)], [0]),  # rank 0 was wrong once
        ([(0, 8), (1, 0), (0, 8), (1, 8)], [1]),  # rank 1 was wrong once
        ([(0, 8), (1, 0), (0, 5), (1, 0)], [0]),  # and each time in another way
        ([(0, 8), (1, 0), (0, 8), (1, 0)], [0, 1]),  # each insists
        ([(0, 8), (0, 0), (0, 0)], [0]),  # alone
    ],
)
def test_the_majority_decides_which_rank_was_wrong(values, ranks):
    assert _find_wrong(values) == (ranks, "bit 3 of an element")


# Flipped bits. Each rank has one microbatch, so that each is rechecked in each step.

FLIP_LAYOUTS = {
    "data 2": (2, {}),
    "data 3, ZeRO-3": (3, layout(zero=3)),
    "data 4, ZeRO-1": (4, layout(zero=1)),
    "pipeline 2, data 2": (4, layout(pipeline=2)),
    "zero-bubble, data 2": (4, layout(pipeline=2, schedule="zero-bubble")),
    "one rank": (1, {}),
    "pipeline 2": (2, layout(pipeline=2)),
    "pipeline 3": (3, layout(pipeline=3)),
    "tensor 2, data 2": (4, {**layout(tensor=2), "model__n_kv_heads": 2}),
    "context 2, data 2": (4, layout(context=2)),
    "experts 2, data 2": (4, {**layout(expert=2), **MIXTURE}),
}
GROUPS = ("tensor", "context", "expert")  # axes whose ranks exchange what they compute before it is compared


def flip(x, draw):
    """Return a copy of x with one flipped bit."""
    y = x.detach().clone().contiguous()
    bits = y.view(torch.int32).flatten()
    bits[draw.randrange(bits.numel())] ^= draw.choice([1 << bit for bit in range(31)] + [-(2**31)])
    return y


COMPUTED, STATE, SUMS = ("gradient", "activation"), ("weight", "moment"), ("collected sum", "reduced sum")


class FlippedBit:
    """Flips one bit on one rank in one step: of the gradient of a parameter, or of the output of a module; of a weight or a
    moment in forward; or of the gradient, before or after it is summed over the ranks."""

    def __init__(self, seed, size, kinds):
        self.draw = random.Random(seed)
        self.rank, self.step, self.kind = (self.draw.randrange(size), self.draw.randrange(2), self.draw.choice(kinds))
        self.fired, self.name = False, ""

    def install(self, model):
        if model.mesh.rank != self.rank:
            return
        stage = next(iter(model.stages.values()))
        if self.kind in ("weight", "moment"):
            vectors = [flat.values for flat in model.flats.values()]
            if self.kind == "moment":
                vectors = [x for each in model.optimizer.optimizers for kind in each.moments.values() for x in kind.values()]
            self._call_after(stage, "forward", stage, vectors)
        elif self.kind in ("collected sum", "reduced sum"):
            reducer = next(iter(model.reducers.values()))
            after = "end_microbatch" if self.kind == "collected sum" else "reduce"
            self._call_after(reducer, after, stage, [reducer.sums])
        elif (
            self.kind == "gradient" and model.config.parallel.schedule != "zero-bubble"
        ):  # which computes them without autograd
            name, parameter = self.draw.choice([item for item in stage.model.named_parameters() if item[1].requires_grad])
            parameter.register_hook(lambda gradient: self._maybe(stage, gradient))
            self.name = name
        else:
            modules = [
                item for item in stage.model.named_modules() if isinstance(item[1], nn.Linear) and item[1].weight is not None
            ]
            self.name, module = self.draw.choice(modules)
            module.register_forward_hook(lambda module, inputs, output: self._maybe(stage, output))

    def _call_after(self, owner, method, stage, vectors):
        """Flip a bit of one of the vectors, in place, after a method was called."""
        call = getattr(owner, method)

        def wrapped(*arguments):
            call(*arguments)
            tensors = [vector.tensor for vector in vectors if vector.tensor.numel()]
            if tensors and not self.fired and stage.inputs.step == self.step:
                self.fired = True
                words = self.draw.choice(tensors).numpy().view(np.int32)  # behind autograd's back
                words[self.draw.randrange(words.size)] ^= np.int32(1) << self.draw.randrange(31)

        setattr(owner, method, wrapped)

    def _maybe(self, stage, x):
        if self.fired or stage.inputs.step != self.step:
            return None
        self.fired = True
        return Flip.apply(x, self.draw) if x.requires_grad else flip(x, self.draw)


class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, draw):
        return flip(x, draw)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@cache
def undisturbed(name, is_tied):
    size, changes = FLIP_LAYOUTS[name]
    return train(size, one_microbatch_each(size, changes, is_tied), every=0, steps=2)


def one_microbatch_each(size, changes, is_tied=True):
    groups = prod(changes.get(f"parallel__{axis}", 1) for axis in ("pipeline", "tensor", "context"))
    return {**changes, "train__global_batch": size // groups, "model__tie_embeddings": is_tied}


def assert_is_found_or_harmless(name, seed, kinds=COMPUTED):
    size, changes = FLIP_LAYOUTS[name]
    bit = FlippedBit(seed, size, kinds)
    is_tied = bit.kind not in SUMS  # sums of tied parameters are compared before both are added
    error, outcome = None, None
    try:
        outcome = train(size, one_microbatch_each(size, changes, is_tied), every=1, steps=2, prepare=bit.install)
    except CollectiveError as raised:
        error = raised
    if error is not None:
        text, what = str(error), f"{bit.kind} {bit.name} on rank {bit.rank}"
        assert isinstance(error.error, RanksDisagreeError)
        named = {int(rank) for rank in re.search(r" ranks? (\d+(?:, \d+)*)", text)[1].split(", ")}
        sizes = {axis: changes.get(f"parallel__{axis}", 1) for axis in (*GROUPS, "pipeline")}
        shape = MeshShape(**sizes, data=size // prod(sizes.values()))
        groups = [axis for axis in GROUPS if changes.get(f"parallel__{axis}", 1) > 1]
        if bit.kind == "moment":
            groups = [*GROUPS, "data"]  # two replicas that differ: either may be wrong
        if bit.kind == "collected sum" and "which compute together" in text:
            groups = [*GROUPS, "data"]
        group = [rank for rank in range(size) if groups and shape.color(rank, groups) == shape.color(bit.rank, groups)]
        assert bit.rank in named, (text, what)
        assert named <= {bit.rank, *group}, (text, what)
        steps = {bit.step, bit.step + 1} if bit.kind in STATE else {bit.step + 1}
        assert int(re.match(r"(?:after )?step (\d+): ", text)[1]) in steps, (text, what)
        return True
    if not bit.fired:
        assert bit.kind in STATE, "nothing was flipped"  # a rank that has no weight or moment
        return False
    expected_losses, expected = undisturbed(name, is_tied)
    losses, state = outcome
    assert (losses, differing(state, expected)) == (expected_losses, []), f"{bit.kind} {bit.name} on rank {bit.rank} was missed"
    return False


@pytest.mark.parametrize("name", FLIP_LAYOUTS)
def test_flipped_bits_are_found_and_the_rank_named(name):
    found = [assert_is_found_or_harmless(name, seed) for seed in range(8)]
    assert sum(found) >= 4


@pytest.mark.parametrize("name", FLIP_LAYOUTS)
def test_bits_flipped_in_memory_are_found_and_the_rank_named(name):
    found = [assert_is_found_or_harmless(name, seed, STATE + SUMS) for seed in range(5)]
    assert sum(found) >= 2


@pytest.mark.parametrize("name", ["data 2", "data 4, ZeRO-1", "data 3, ZeRO-3", "one rank", "pipeline 2"])
def test_wrong_updates_are_found_and_the_rank_named(monkeypatch, name):
    """The last rank changes the moments in the update of the first step."""
    size, changes = FLIP_LAYOUTS[name]
    update, last = AdamW.step, threading.local()

    def flip_once(self, gradients, lr):
        update(self, gradients, lr)
        if getattr(last, "is_this", False) and self.count == 1:
            for vector in self.moments["exp_avg"].values():
                vector.tensor[:1].view(torch.int32).bitwise_xor_(8)

    def prepare(model):
        last.is_this = model.mesh.rank == size - 1

    monkeypatch.setattr(AdamW, "step", flip_once)
    with pytest.raises(CollectiveError) as caught:
        train(size, one_microbatch_each(size, changes), every=1, steps=1, prepare=prepare)
    assert "step 1: the update of " in str(caught.value)
    assert f"(bit 3 of an element) was computed wrongly by rank {size - 1} (" in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("adafactor", "value"), ("adafactor", "row_var"), ("muon", "value")])
@pytest.mark.parametrize(
    "changes", [{}, {"parallel__zero": 1}, {"parallel__tensor": 2, "model__n_kv_heads": 2}], ids=["data", "zero", "tensor"]
)
def test_wrong_updates_of_whole_parameters_are_found_and_the_rank_named(monkeypatch, name, kind, changes):
    """The last rank changes every parameter that it updates as a whole, or a moment of each."""
    optimizer = OPTIMIZERS[name][0]
    update, last = optimizer.update, threading.local()

    def flip(self, value, gradient, moments, lr, weight_decay):
        update(self, value, gradient, moments, lr, weight_decay)
        if getattr(last, "is_this", False) and not getattr(last, "is_repeating", False):
            x = value if kind == "value" else next(iter(moments.values()))
            x.view(-1)[-1:].view(torch.int32).bitwise_xor_(8)  # it has the last part

    def repeat(self, sample, lr):
        last.is_repeating = True
        repeat_update(self, sample, lr)
        last.is_repeating = False

    def prepare(model):
        last.is_this = model.mesh.rank == 1

    repeat_update = optimizer.repeat_update
    monkeypatch.setattr(optimizer, "update", flip)
    monkeypatch.setattr(optimizer, "repeat_update", repeat)
    settings = one_microbatch_each(2, {"train__optimizer": name, **changes})
    with pytest.raises(CollectiveError) as caught:
        train(2, settings, every=1, steps=1, prepare=prepare)
    assert "step 1: the update of " in str(caught.value)
    assert "(bit 3 of an element) was computed wrongly by rank 1 (" in str(caught.value)


class WrongSum:
    """Flips a bit of every gradient buffer of the last rank in the first step, after a microbatch or after the reduction."""

    def __init__(self, monkeypatch, after):
        self.local = threading.local()
        for kind in (StepReducer, MicrobatchRoundReducer):
            method = getattr(kind, after, None)
            if method is not None:
                monkeypatch.setattr(kind, after, self._wrap(method))

    def _wrap(self, method):
        def wrapped(reducer, *arguments):
            method(reducer, *arguments)
            if getattr(self.local, "is_wrong", False):
                reducer.buffers[0].tensor.view(torch.int32).bitwise_xor_(8)
                self.local.is_wrong = False

        return wrapped

    def prepare(self, size):
        def mark(model):
            self.local.is_wrong = model.mesh.rank == size - 1

        return mark


SUM_LAYOUTS = {
    "one rank": (1, {}),
    "data 2": (2, {}),
    "data 3, uneven": (3, {}),
    "data 2, messages": (2, layout(reduce="messages")),
    "data 4, ZeRO-1": (4, layout(zero=1)),
    "data 3, ZeRO-2": (3, layout(zero=2)),
    "data 3, ZeRO-3": (3, layout(zero=3)),
    "pipeline 2": (2, layout(pipeline=2)),
    "zero-bubble, data 2": (4, layout(pipeline=2, schedule="zero-bubble")),
    "context 2, data 2": (4, layout(context=2)),
    "experts 2, data 2": (4, {**layout(expert=2), **MIXTURE}),
}


@pytest.mark.parametrize("after", ["end_microbatch", "reduce"])
@pytest.mark.parametrize("name", SUM_LAYOUTS)
def test_wrong_sums_are_found_and_the_rank_named(monkeypatch, name, after):
    """Four ranks that add by recursive halving have all added to a sum, and each has received it from another."""
    size, changes = SUM_LAYOUTS[name]
    is_shared = size == 4 and after == "end_microbatch" and ("context" in name or "experts" in name)
    who = "one of ranks 0, 1, 2, 3, which compute together " if is_shared else rf"rank {size - 1} \("
    bit = WrongSum(monkeypatch, after)
    with pytest.raises(CollectiveError) as caught:
        train(size, {**changes, "model__tie_embeddings": False}, every=1, steps=1, prepare=bit.prepare(size))
    assert re.search(f"step 1: the sum of the gradients of .* was computed wrongly by {who}", str(caught.value))


def test_wrong_sums_of_other_ranks_slices_are_found_and_their_owner_named(monkeypatch):
    """Rank 1 adds its slice wrongly in shared memory, and all ranks copy it."""
    local, merge_into = threading.local(), TreeMerger.merge_into

    def flip(self, parts, total):
        merge_into(self, parts, total)
        if getattr(local, "is_wrong", False):
            total.view(torch.int32).bitwise_xor_(8)

    def prepare(model):
        local.is_wrong = model.mesh.rank == 1

    monkeypatch.setattr(TreeMerger, "merge_into", flip)
    monkeypatch.setattr(shared_memory, "MAX_SHORT_NUMEL", 0)
    with pytest.raises(CollectiveError, match=r"the sum of the gradients of .* was computed wrongly by rank 1 \("):
        train(2, {"parallel__reduce": "shared-memory"}, every=1, steps=1, prepare=prepare)


def test_gradients_of_minus_zero_raise_no_alarm():
    """A sum is never -0, whatever its leaves are."""
    x, record = torch.tensor([-0.0, -0.0, 1.0]), GradientRecord((2, 4))
    for leaf in range(3):
        record.note_leaf((leaf, leaf + 1), 1, x)
    total = add_nodes(record.leaves, 3)
    assert torch.equal(total.view(torch.int32), torch.tensor([0.0, 3.0]).view(torch.int32))
    settings = {**MIXTURE, "model__dropout": 0.9, "model__context_length": 2, "train__micro_batch": 1, "train__global_batch": 2}
    for seed in range(4):
        train(2, {**settings, "train__seed": seed}, every=1)


def test_parameter_whose_gradients_were_added_wrongly_is_named(monkeypatch):
    end_microbatch = StepReducer.end_microbatch

    def flip_bit(reducer, i):
        end_microbatch(reducer, i)
        if i == 0:
            reducer.views[0]["blocks.1.mlp.down.weight"][0, 0].view(torch.int32).bitwise_xor_(8)

    monkeypatch.setattr(StepReducer, "end_microbatch", flip_bit)
    with pytest.raises(CollectiveError, match=r"gradients of blocks\.1\.mlp\.down\.weight \(bit"):
        train(1, {}, every=1, steps=1)


def test_every_element_is_drawn():
    assert {draw_interval(23, number, 10) for number in range(100)} == {(0, 10), (10, 20), (20, 23)}
    assert draw_interval(23, 5, 100) == (0, 23)


@pytest.mark.parametrize(
    ("again", "added", "wrong"),
    [
        ([8, 8, 8], {1: 0}, [1]),
        ([8, 8, 0], {1: 8}, [2]),  # it recomputed wrongly
        ([8, 8, 0], {2: 0}, [2]),
        ([8, 0], {0: 0}, [0]),  # what the one added before is what the other has
        ([8, 0], {1: 8}, [1]),
        ([8, 0], {0: 8}, [0, 1]),  # each insists
        ([8], {0: 0}, [0]),
        ([8, 8], {0: 8, 1: 8}, []),
    ],
)
def test_the_majority_decides_which_rank_added_wrongly(again, added, wrong):
    assert judge(again, added)[0] == wrong


# In a run with a folder.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


class WrongRank:
    """Rank 0 computes wrongly in one step of a run: its losses are a little too large."""

    def __init__(self, step, each_time=False):
        self.step, self.each_time, self.local, self.forward = step, each_time, threading.local(), ModelStage.forward

    def run(self, config, size):
        """Train until the recheck ends it; return its message."""

        def forward(stage, microbatch):
            inputs = stage.inputs
            if inputs.step is not None and inputs.step >= self.step and getattr(self.local, "is_wrong", False):
                output = inputs.output_fn
                stage.inputs = replace(inputs, output_fn=lambda logits, batch: output(logits * 1.0001, batch))
            self.forward(stage, microbatch)
            stage.inputs = inputs
            if not self.each_time and inputs.step == self.step and microbatch == len(inputs.microbatch_ids) - 1:
                self.local.is_wrong = False

        def body(comm):
            self.local.is_wrong = comm.rank == 0
            loop.train(config, comm)

        with mock.patch.object(ModelStage, "forward", forward), pytest.raises(CollectiveError) as caught:
            run_ranks(size, body)
        assert isinstance(caught.value.error, RanksDisagreeError)
        return str(caught.value)


@pytest.fixture
def saving(tmp_path, monkeypatch):
    """Settings of a run of 8 steps that saves after each."""
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))
    settings = {"train__steps": 8, "checkpoint__every": 1, "checkpoint__keep": 2, "run__eval_every": 0}
    return settings | {"checkpoint__keep_best": False}


def checkpoints_of(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("size", "changes"), [(2, {}), (3, layout(zero=3)), (1, {})])
def test_run_sets_suspect_checkpoints_aside_and_resumes_with_the_same_bits(tmp_path, data, saving, size, changes):
    """Rechecked in steps 3 and 6; rank 0 computes wrongly in step 6, when checkpoints 3, 4 and 5 are there."""
    settings = {**saving, "fault__recheck_every": 3, **changes}
    expected = train_to_end(tiny_config(data, tmp_path / "right", **settings), size)
    config = tiny_config(data, tmp_path / "run", **settings)
    message = WrongRank(step=5).run(config, size)
    assert "step 6: the loss in microbatch" in message
    assert "was computed wrongly by rank 0 (" in message
    assert message.endswith("resumes from step-00000003")
    assert list(json.loads((tmp_path / "run/bad-hosts.json").read_text())) == [socket.gethostname()]
    assert checkpoints_of(tmp_path / "run") == ["step-00000003", "suspect-1-step-00000004", "suspect-1-step-00000005"]
    assert train_to_end(config, size) == expected


def test_run_without_a_good_checkpoint_begins_anew(tmp_path, data, saving):
    """A wrong result in the first step that is rechecked."""
    config = tiny_config(data, tmp_path / "run", **saving, fault__recheck_every=3)
    assert "begins anew: no checkpoint is from before the last good recheck" in WrongRank(step=2).run(config, 2)
    assert checkpoints_of(tmp_path / "run") == ["suspect-1-step-00000001", "suspect-1-step-00000002"]
    expected = train_to_end(tiny_config(data, tmp_path / "right", **saving), 2)
    assert train_to_end(config, 2) == expected


@pytest.mark.parametrize(("step", "found"), [(0, 5), (4, 5), (5, 10), (7, 10)])
def test_rank_that_goes_wrong_is_found_at_the_next_recheck(tmp_path, data, saving, step, found):
    config = tiny_config(data, tmp_path / "run", **{**saving, "train__steps": 12}, fault__recheck_every=5)
    message = WrongRank(step, each_time=True).run(config, 3)
    assert message.startswith(f"step {found}: ")
    assert "was computed wrongly by rank 0 (" in message


def test_checkpoints_are_set_aside_once_old_ones_are_removed(tmp_path, data, saving, monkeypatch):
    """A disk that removes slowly: a checkpoint that was listed must not be gone when it is renamed."""
    prune, removing = manager.prune_checkpoints, []
    monkeypatch.setattr(manager, "prune_checkpoints", lambda *arguments: (time.sleep(0.5), prune(*arguments)))

    def set_aside(*arguments):
        removing.append([thread for thread in threading.enumerate() if thread.name == "prune"])
        return manager.set_aside(*arguments)

    monkeypatch.setattr(bad_hosts, "set_aside", set_aside)
    WrongRank(step=5).run(tiny_config(data, tmp_path / "run", **saving, fault__recheck_every=3), 2)
    assert removing == [[]]


def test_no_more_checkpoints_are_kept_without_rechecks(tmp_path, data, saving):
    """A resumed run does not keep the checkpoint that it resumed from."""
    config = tiny_config(data, tmp_path / "run", **saving, fault__recheck_every=0)
    train_until_killed(config, 2, step=4)
    train_to_end(config, 2)
    assert checkpoints_of(tmp_path / "run") == ["step-00000007", "step-00000008"]


def test_processors_of_different_kinds_are_not_compared(tmp_path, data, saving, monkeypatch, capsys):
    kinds = iter(["one", "another"])
    monkeypatch.setattr(recheck, "processor_name", lambda: next(kinds))
    train_to_end(tiny_config(data, tmp_path / "run", **saving, fault__recheck_every=1), 2)
    assert (
        "computation is not rechecked (--fault.recheck-every): the ranks have processors of different kinds"
        in capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FLIP_LAYOUTS)
def test_many_flipped_bits_are_found(name):
    found = [assert_is_found_or_harmless(name, seed, COMPUTED + STATE + SUMS) for seed in range(1000, 1150)]
    assert sum(found) > 75


@pytest.mark.slow
def test_a_processor_that_fails_now_and_then_is_found_after_the_expected_time():
    """Rank 0 computes a quarter of its microbatches wrongly; every 20th step is checked. It is found after 80 on average."""
    every, share, trials = 20, 0.25, 40
    config, counts = small_config(**one_microbatch_each(2, {})), []

    def body(comm, draw):
        model, source = build_train_model(config, comm), RandomTokens(config)
        if comm.rank == 0:
            norm = model.stages[0].model.get_parameter("norm.weight")
            norm.register_hook(lambda gradient: flip(gradient, draw) if draw.random() < share else None)
        check = Recheck(model, every)
        for step in range(10_000):
            train_step(model, source, step, recheck=check)

    for seed in range(trials):
        with pytest.raises(CollectiveError, match="computed wrongly by rank 0") as caught:
            run_ranks(2, partial(body, draw=random.Random(seed)), timeout_s=300.0)
        counts.append(int(re.match(r"step (\d+): ", str(caught.value))[1]))
    error = every * (1 - share) ** 0.5 / share / trials**0.5
    assert abs(sum(counts) / trials - every / share) < 3 * error, counts
