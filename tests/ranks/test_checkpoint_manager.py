"""The manager saves beside training, prunes, reports failures, and passes every fault point."""

import errno
import math
import re
from dataclasses import replace
from importlib import import_module
from unittest import mock

import pytest
from checkpoints import draw_tensors, make_state, replicate, small_files, stripe
from thread_ranks import run_ranks

from mpilm.checkpoint.format import PARAMETER, checkpoint_step, list_checkpoints
from mpilm.checkpoint.manager import CheckpointManager
from mpilm.checkpoint.save import PendingCheckpoint
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.config.schema import CheckpointConfig
from mpilm.errors import NonFiniteError, RanksDisagreeError
from mpilm.testing.faults import POINTS, install_faults

SHAPES = {"embed.weight": (40, 16), "norm.weight": (16,)}


def make_manager(folder, comm, config, saved, failed=None, sharding=None):
    def collect(step, eval_loss):
        state = make_state(draw_tensors(SHAPES), sharding or replicate(SHAPES, comm.size), comm.rank)
        return replace(state, trainer={"step": step, "eval_loss": eval_loss})

    return CheckpointManager(
        folder, config, comm, FlightRecorder(), collect, lambda *row: saved.append(row), failed or pytest.fail
    )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_manager_saves_commits_and_prunes(tmp_path, asynchronous):
    def body(comm):
        saved = []
        manager = make_manager(tmp_path, comm, CheckpointConfig(keep=1, asynchronous=asynchronous), saved)
        manager.reserve_memory(0, 1000)
        for step, loss in ((1, 2.0), (2, 3.0), (3, 4.0)):
            manager.save(step, loss)
            while comm.all_gather_json(len(saved))[0] < step:
                manager.poll(any(comm.all_gather_json(manager.is_writing)))
            assert manager.has_saved(step)
            assert not manager.has_saved(step + 1)
        manager.close()
        return [(folder.name, step, took_s >= 0, waited_s > 0) for folder, step, took_s, waited_s in saved]

    expected = [(f"step-0000000{step}", step, True, True) for step in (1, 2, 3)]
    assert run_ranks(2, body) == [expected, expected]
    assert [checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [1, 3]  # the best and the newest


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_manager_on_a_full_disk_stops_or_warns(tmp_path, on_error):
    def body(comm):
        failed = []
        manager = make_manager(tmp_path, comm, CheckpointConfig(on_error=on_error), [], failed.append)
        manager.save(1, None)
        if on_error == "stop":
            with pytest.raises(CollectiveError, match="No space left on device"):
                manager.finish()
        else:
            manager.finish()
            assert "No space left on device" in failed[0]
        manager.close()

    with mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        run_ranks(2, body)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("sharding", [replicate(SHAPES, 2), stripe(SHAPES, 2, 10)])
def test_manager_with_a_value_that_is_not_finite_saves_nothing(tmp_path, sharding):
    def body(comm, bad_rank, kind):
        manager = make_manager(tmp_path, comm, CheckpointConfig(), [], sharding=sharding)
        state = manager.make_state(1, None)
        if bad_rank in (comm.rank, None):
            list(state.slices[kind].values())[-1][-1] = math.inf
        manager.make_state = lambda *_: state
        manager.save(1, None)
        with pytest.raises(
            CollectiveError, match=r"after step 1 norm.weight\S*( \(exp_avg\))? of rank \d is not finite"
        ) as caught:
            manager.finish()
        assert isinstance(caught.value.error, NonFiniteError)

    shared = len(sharding["norm.weight"]) == 1  # replicas are equal and check different tensors
    for kind in (PARAMETER, "exp_avg"):
        run_ranks(2, lambda comm, kind=kind: body(comm, None if shared else 0, kind))
    assert list_checkpoints(tmp_path) == []


def test_manager_with_a_copy_that_flips_a_bit_saves_nothing(tmp_path):
    def flip_and_start(save, action):
        if save.comm.rank == 1:
            copies = action.args[0]
            copies[0][1][50] ^= 4
        start(save, action)

    def body(comm):
        manager = make_manager(tmp_path, comm, CheckpointConfig(), [])
        manager.save(1, None)
        with pytest.raises(CollectiveError, match=r"step-00000001/\S+: its copy in memory changed .*, rank 1\)") as caught:
            manager.finish()
        assert isinstance(caught.value.error, RanksDisagreeError)

    start = PendingCheckpoint._start_thread
    with small_files(2000), mock.patch.object(PendingCheckpoint, "_start_thread", flip_and_start):
        run_ranks(2, body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_passes_each_fault_point_in_order(tmp_path, monkeypatch, capfd, asynchronous):
    points = [point for point in POINTS if point.startswith("checkpoint.")]
    for target in [target for point in points for target in POINTS[point]] + [
        "mpilm.comm.flight_recorder:FlightRecorder.enter"
    ]:
        module, _, path = target.partition(":")
        owner, attribute = getattr(import_module(module), path.split(".")[0]), path.split(".")[1]
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))  # restored after the test
    install_faults(";".join(f"kind=sleep value=0 point={point}" for point in points), rank=0)
    manager = make_manager(tmp_path, SelfComm(), CheckpointConfig(asynchronous=asynchronous), [])
    with small_files(2000):
        manager.save(1, None)
        manager.close()
    fired = re.findall(r"fault: sleep at (\S+) of step 0 on rank 0", capfd.readouterr().err)
    assert fired == [f"checkpoint.{name}" for name in ("open", "write", "fsync", "manifest", "rename", "cleanup")]
