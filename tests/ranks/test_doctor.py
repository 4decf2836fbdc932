"""The doctor: right answers pass, each wrong one is named, and a machine is measured, written and read."""

import re
from collections import Counter

import pytest
import torch
from runs import small_config
from thread_ranks import ThreadComm, run_ranks

from mpilm.comm.base import Request, SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import resolve_config
from mpilm.doctor import calibrate, checks, measure
from mpilm.doctor.calibrate import calibrate as calibrate_machine
from mpilm.doctor.checks import run_checks
from mpilm.errors import RanksDisagreeError
from mpilm.mesh.shape import MeshShape
from mpilm.planner.cost import step_time
from mpilm.planner.layout import PlacedLayout
from mpilm.planner.profile import read_profile, write_profile
from mpilm.telemetry.trace import ClockOffset

CHECKS = ("ring", "all to all", "reduce", "gather", "broadcast", "shared")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_run_checks_on_a_healthy_mpi_passes(size, capsys):
    run_ranks(size, lambda comm: run_checks(comm, 1 << 16))
    output = capsys.readouterr().out
    assert "all checks passed" in output
    assert all(any(line.startswith(check) and " ok" in line for line in output.splitlines()) for check in CHECKS)
    assert ("us between rank 0 and the others" in output) == (size > 1)
    assert ("clocks      at most " in output) == (size > 1)


def test_run_checks_with_a_wrong_clock_warns(capsys, monkeypatch):
    monkeypatch.setattr(checks, "measure_clock_offset", lambda comm, now: ClockOffset(0.0, -5.0 * comm.rank, 0.0))
    run_ranks(2, lambda comm: run_checks(comm, 1 << 16))
    assert "  warning   the clock of rank 1 is off by 5.0 s; logs and traces will mislead" in capsys.readouterr().out


def test_run_checks_with_slow_messages_warns(capsys, monkeypatch):
    monkeypatch.setattr(checks, "_one_way_s", lambda comm, peer, x, rounds: 1.5e-3 if x.numel() == 1 and peer == 2 else 1e-6)
    run_ranks(3, lambda comm: run_checks(comm, 1 << 16))
    output = capsys.readouterr().out
    assert "  warning   messages to rank 2 take long: end other programs here" in output
    assert re.search(r"all checks passed, with \d+ warnings?\n", output)


def corrupting(op):
    """Return a communicator whose last rank gets a wrong element from `op`."""

    class CorruptingComm(ThreadComm):
        def _wrong(self, request, out):
            def finish():
                request.wait()
                if self.rank == self.size - 1 and out.numel() > 2 and out.dtype != torch.uint8:
                    out.view(-1)[1] += 1

            return Request(finish)

        def _irecv(self, out, source, tag):
            request = super()._irecv(out, source, tag)
            return self._wrong(request, out) if op == "ring" else request

        def _iall_to_all(self, x, out, send_counts, receive_counts):
            request = super()._iall_to_all(x, out, send_counts, receive_counts)
            return self._wrong(request, out) if op == "all to all" else request

        def _iall_reduce(self, x, how):
            request = super()._iall_reduce(x, how)
            return self._wrong(request, x) if op == "reduce" else request

        def _iall_gather(self, x, out, counts):
            request = super()._iall_gather(x, out, counts)
            return self._wrong(request, out) if op == "gather" and out.dtype == torch.bfloat16 else request

        def _broadcast(self, x, root):
            super()._broadcast(x, root)
            if op == "broadcast" and self.rank == self.size - 1 and x.numel() == 5000:
                x[7] += 1

        def split(self, color, key, name):
            part = super().split(color, key, name)
            part.__class__ = type(self)
            return part

        def allocate_shared(self, numel):
            parts = super().allocate_shared(numel)
            return [part.clone() for part in parts] if op == "shared" else parts

    return CorruptingComm


@pytest.mark.parametrize("op", CHECKS)
def test_run_checks_with_a_wrong_answer_names_it(op, capsys):
    def body(comm):
        comm.__class__ = corrupting(op)
        with pytest.raises(CollectiveError, match=rf"this MPI gives wrong answers \({op}\): do not train with it") as caught:
            run_checks(comm, 1 << 16)
        assert isinstance(caught.value.error, RanksDisagreeError)

    run_ranks(3, body)
    assert "all checks passed" not in capsys.readouterr().out


# Calibration.


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Measure little: whether the numbers are right is another matter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(calibrate, "cores_per_rank", lambda node: 1 / node.size)
    for name, value in {
        "MEASUREMENT_S": 0.0, "TOKENS": (8, 32), "WIDTHS": (16, 32), "CONTEXTS": (16, 32), "HEAD_WIDTHS": (16, 32),
        "BLOCKS": ((16, 64), (32, 64)), "LOGITS": ((8, 64), (32, 64)), "ELEMENTS": (1 << 10, 1 << 12), "CACHE_BYTES": 1 << 16,
        "MESSAGES": (1 << 10, 1 << 12), "SUMS": (1 << 6, 1 << 10, 1 << 14),
    }.items():  # fmt: skip
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(calibrate, "TRAINED", ((16, 64), (32, 64)))


@pytest.mark.parametrize("size", [1, 3])
def test_calibrate_one_node_gives_a_profile_that_is_written_and_read(size, quick, tmp_path):
    profiles = run_ranks(size, lambda comm: calibrate_machine(comm, "cpu"))
    assert len({each.step_s for each in profiles}) == 1  # all ranks have the numbers of all
    profile = profiles[0]
    assert (profile.ranks_per_node, profile.nodes, profile.device) == (size, 1, "cpu")
    assert {(rates.ranks, rates.dtype) for rates in profile.compute} == {
        (ranks, dtype) for ranks in {1, size} for dtype in ("float32", "bfloat16")
    }
    assert (profile.within is None) == (size == 1)
    assert profile.across is None
    if profile.within is not None:
        assert (profile.within.ranks, len(profile.within.shared)) == (size, 3)
    write_profile(tmp_path / "machine.json", profile)
    again = read_profile(str(tmp_path / "machine.json"))
    config, shape = (
        resolve_config(small_config(model__d_model=128, model__n_layers=4, train__global_batch=16)),
        MeshShape(data=size),
    )
    predicted_s = [step_time(PlacedLayout(config, 64, each, shape, size, (4,))).total_s for each in (profile, again)]
    assert predicted_s[0] == pytest.approx(predicted_s[1], rel=1e-3)
    assert predicted_s[0] > 0


def test_calibrate_several_nodes_measures_within_and_across(quick):
    profile = run_ranks(4, lambda comm: calibrate_machine(comm, "cpu"), ranks_per_node=2)[0]
    assert (profile.nodes, profile.ranks_per_node) == (2, 2)
    assert (profile.within.ranks, profile.across.ranks) == (2, 4)
    assert profile.within.shared
    assert not profile.across.shared


def test_killed_calibration_continues_with_its_measurements(quick, tmp_path, monkeypatch, capsys):
    """The measurements are numbers here: 1, 2, 3, ..., from the start of each process."""
    partial, calls = tmp_path / "partial", Counter()

    def measure_nothing(comm, *_):
        calls[comm.rank] += 1
        return float(calls[comm.rank])

    monkeypatch.setattr(measure.Bench, "_time_call", lambda bench, action: measure_nothing(bench.comm))
    monkeypatch.setattr(measure, "time_collective", measure_nothing)

    def start():
        calls.clear()
        profile = run_ranks(2, lambda comm: calibrate_machine(comm, "cpu", partial))[0]
        return profile.memory[0], partial.read_text().splitlines()

    memory, (head, *numbers) = start()
    assert [float(number) for number in numbers] == [float(n) for n in range(1, 1 + len(numbers))]
    partial.write_text("\n".join([head, *numbers[:-3], "1"]))  # the last line is cut
    memory_again, lines = start()
    assert lines == [head, *numbers[:-3], "1.0", "2.0", "3.0"]
    assert calls == {0: 3, 1: 3}
    assert memory_again == memory
    assert f"{partial} has {len(numbers) - 3} measurements of an earlier start" in capsys.readouterr().err
    partial.write_text("\n".join(["{}", *numbers, ""]))  # other conditions
    assert start() == (memory, [head, *numbers])
    assert calls[0] == len(numbers)


def test_calibration_shows_progress_and_ends_on_a_busy_machine(quick, monkeypatch, capsys):
    calls = []
    bench = measure.Bench(SelfComm(), SelfComm(), torch.device("cpu"))
    bench.time_call(lambda: calls.append(1))
    monkeypatch.setattr(measure, "BUDGET_S", -1.0)
    bench.time_call(lambda: calls.append(1))
    assert len(calls) == (1 + 3) + 1
    monkeypatch.setattr(measure, "PROGRESS_S", 0.0)
    monkeypatch.setattr(measure, "LIMIT_S", 0.2)
    with pytest.raises(CollectiveError, match="--calibrate has taken 0s and is not done: end other programs here"):
        run_ranks(2, lambda comm: calibrate_machine(comm, "cpu"))
    lines = capsys.readouterr().err
    assert re.search(
        r"  measuring 1 of 12, matrices in float32, 2 ranks a node, 1 thread each: 2 measurements, 0s since the start\n", lines
    )


def test_calibrate_unequal_nodes_raises(quick):
    with pytest.raises(CollectiveError, match="nodes have 1 to 2 ranks: start the same number on each"):
        run_ranks(3, lambda comm: calibrate_machine(comm, "cpu"), ranks_per_node=2)
