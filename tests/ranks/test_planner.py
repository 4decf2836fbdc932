"""What the planner says of memory and of a machine, against what ranks really hold and measure."""

from dataclasses import replace

import pytest
from machines import machine
from runs import build_train_model, layout, small_config, train_to_end
from text import tiny_config, write_tokens

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.config import Train, replaced, resolve
from mpilm.engine.hardware import detect_hardware, software_versions
from mpilm.mesh.shape import MeshShape
from mpilm.planner.cost import Setting, step_time
from mpilm.planner.machine import read, write
from mpilm.planner.memory import memory_bytes
from mpilm.trainer.auto_layout import choose_layout
from mpilm.trainer.calibration import bench, calibrate, compute, network
from mpilm.validation import validate
from mpilm.verification.layouts import VOCAB_SIZE

WIDE = {"model__d_model": 128, "model__n_layers": 4, "train__global_batch": 16}


@pytest.mark.parametrize("changes", [{}, {"model__tie_embeddings": False, "train__optimizer": "sgd"}, {"model__arch": "gpt2"}])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, layout()), (2, layout()), (3, layout()), (4, layout(zero=1)), (4, layout(zero=2)), (3, layout(zero=2)), (4, layout(zero=3)), (2, layout(2)),
        (4, layout(2, "interleaved", 1)), (4, layout(2, zero=3)), (8, layout(4, zero=2)), (4, layout(zero=0, reduce="sent")),
        (3, layout(zero=0, reduce="sent")),
    ],
)  # fmt: skip
def test_what_a_rank_holds_is_what_was_said(size, layout, changes):
    wrong, _ = wrongly_said(resolve(small_config(**WIDE, **layout, **changes)), size, size)
    assert wrong == []


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(
    ("size", "ranks_per_node", "batch"), [(4, 2, 16), (4, 2, 12), (6, 2, 16), (6, 3, 11), (8, 4, 16), (4, 1, 16), (3, 1, 11)]
)
def test_what_goes_between_nodes_is_counted(size, ranks_per_node, batch, zero, wire):
    config = resolve(
        small_config(**WIDE | {"train__global_batch": batch}, **layout(zero=zero, reduce="shared", wire_dtype=wire))
    )
    wrong, most = wrongly_said(config, size, ranks_per_node)
    assert wrong == []
    assert most > 500_000


def wrongly_said(config, size, ranks_per_node):
    """Parts that a rank holds otherwise than said: what, said, held; and the most that an exchange needs, in bytes."""

    def body(comm):
        model = build_train_model(config, comm)
        shape = MeshShape(pipeline=model.pipeline.size, data=model.data.size)
        said = memory_bytes(config, VOCAB_SIZE, model.cut, shape, list(model.stages), "cpu", min(ranks_per_node, shape.data))
        return said, model.memory_bytes()

    found = run_ranks(size, body, ranks_per_node=ranks_per_node)
    pairs = [(part, said[part], held[part]) for said, held in found for part in ("weights", "moments", "passing")]
    for part in ("gradients", "exchange"):  # said of the replica that needs most
        pairs.append((part, max(said[part] for said, _ in found), max(held[part] for _, held in found)))
    return [pair for pair in pairs if pair[1] != pytest.approx(pair[2], rel=0.03, abs=40_000)], pairs[-1][2]


def hurry(monkeypatch):
    """Measure little: what is right about the numbers is another matter."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(calibrate, "cores_of", lambda node: 1 / node.size)
    monkeypatch.setattr(bench, "POINT_S", 0.0)
    for name, value in {
        "TOKENS": (8, 32), "WIDTHS": (16, 32), "CONTEXTS": (16, 32), "HEADS": (16, 32), "BLOCKS": ((16, 64), (32, 64)),
        "LOGITS": ((8, 64), (32, 64)), "ELEMENTS": (1 << 10, 1 << 12), "CACHE_BYTES": 1 << 16,
    }.items():  # fmt: skip
        monkeypatch.setattr(compute, name, value)
    monkeypatch.setattr(network, "MESSAGES", (1 << 10, 1 << 12))
    monkeypatch.setattr(network, "BUCKET", 1 << 10)
    monkeypatch.setattr(calibrate, "TRAINED", ((16, 64), (32, 64)))
    monkeypatch.setattr(calibrate, "DISK_BYTES", 1 << 20)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_machine_is_measured_written_and_read(size, monkeypatch, tmp_path):
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = run_ranks(size, lambda comm: calibrate.calibrate(comm, "cpu"))
    assert len({replace(each, made="").step_s for each in found}) == 1  # all ranks have the numbers of all
    measured = found[0]
    assert (measured.ranks_per_node, measured.nodes, measured.device) == (size, 1, "cpu")
    assert {(rates.ranks, rates.dtype) for rates in measured.compute} == {
        (ranks, dtype) for ranks in {1, size} for dtype in ("float32", "bfloat16")
    }
    assert (measured.within is None) == (size == 1)
    assert measured.across is None
    if measured.within is not None:
        assert measured.within.ranks == size
        assert len(measured.within.shared) == 3
    assert not list(tmp_path.iterdir())  # what was written to try the disk is gone
    write(tmp_path / "machine.json", measured)
    again = read(str(tmp_path / "machine.json"))
    config = resolve(small_config(**WIDE))
    shape = MeshShape(data=size)
    said = [step_time(Setting(config, 64, each, shape, size, (4,))).total_s for each in (measured, again)]
    assert said[0] == pytest.approx(said[1], rel=1e-3)
    assert said[0] > 0


def here(**changes):
    """A machine that says it is this one."""
    names = software_versions(SelfComm("world"))
    return replace(machine(4), **{name: names[name] for name in ("torch", "processor")}, **changes)


def chosen(tmp_path, size, measured, config=None):
    write(tmp_path / "machine.json", measured)
    config = replaced(config or resolve(small_config(**WIDE)), parallel__auto=str(tmp_path / "machine.json"))

    def body(comm):
        used = detect_hardware(Train(threads=1, device="cpu"), comm)
        return choose_layout(config, VOCAB_SIZE, used, comm)

    return run_ranks(size, body)


def test_ranks_choose_the_layout_that_is_fastest(tmp_path):
    (config, words), *others = chosen(tmp_path, 4, here())
    assert all(other == (config, words) for other in others)
    assert (config.parallel.auto, config.parallel.pipeline, config.parallel.zero) == ("", 1, 0)
    assert "data 4, pipeline 1, zero 0; a step is predicted to take" in words
    slow = replace(here().within, exchange=((1.0, 1e-3),), gather=((1.0, 1e-3),), shared=())
    ((config, _), *_) = chosen(tmp_path, 4, here(within=slow))
    assert config.parallel.pipeline == 4


def test_a_layout_that_was_chosen_trains_to_the_same_bits(tmp_path):
    write(tmp_path / "machine.json", here())
    tokens = write_tokens(tmp_path)
    alone = train_to_end(tiny_config(tokens, tmp_path / "alone"), 1)
    assert train_to_end(tiny_config(tokens, tmp_path / "chosen", parallel__auto=str(tmp_path / "machine.json")), 2) == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"processor": "another"}, "was measured with processor another, and here it is"),
     ({"device": "cuda"}, "was measured with device cuda, and here it is cpu"),
     ({"memory_bytes": 1 << 20}, "no layout of 2 ranks works: data 2, pipeline 1, zero 0: needs")],
)  # fmt: skip
def test_a_machine_that_is_not_this_one_is_refused(tmp_path, changes, message):
    with pytest.raises(CollectiveError, match=message):
        chosen(tmp_path, 2, replace(here(), **changes))


def test_what_is_chosen_is_what_may_be(tmp_path):
    """With replicas that train by themselves there is no ZeRO, however much faster it would be."""
    dear = replace(here().memory[0], adamw=((1.0, 1e-3),))
    config = resolve(small_config(**WIDE, checkpoint__every=0, run__eval_every=0))
    ((plain, _), *_) = chosen(tmp_path, 4, here(memory=(dear,)), config)
    assert plain.parallel.zero > 0
    for changes in ({"parallel__sync_every": 4}, {"parallel__compress": 2}):
        ((found, _), *_) = chosen(tmp_path, 4, here(memory=(dear,)), replaced(config, **changes))
        validate(found)
    with pytest.raises(CollectiveError, match="leave it or --model"):
        chosen(tmp_path, 2, here(), replaced(config, model__lora_rank=2))


def test_nodes_with_unequal_numbers_of_ranks_are_not_measured(tmp_path, monkeypatch):
    hurry(monkeypatch)
    with pytest.raises(CollectiveError, match="nodes have 1 to 2 ranks: start the same number on each"):
        run_ranks(3, lambda comm: calibrate.calibrate(comm, "cpu"), ranks_per_node=2)


def test_several_nodes_are_measured_within_and_across(tmp_path, monkeypatch):
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = run_ranks(4, lambda comm: calibrate.calibrate(comm, "cpu"), ranks_per_node=2)[0]
    assert (found.nodes, found.ranks_per_node) == (2, 2)
    assert (found.within.ranks, found.across.ranks) == (2, 4)
    assert found.within.shared
    assert not found.across.shared
