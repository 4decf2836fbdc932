"""Tensors moved by torch.distributed's gloo between thread ranks: the contract, equal bits, and the choice of the fastest."""

import socket
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from contract import CONTRACT, ranks_are_in_step
from runs import FAMILIES, assemble, differing, layout, small_config, train_serially, train_steps
from runs import serial_config as on_one_rank
from thread_ranks import run_ranks
from torch import Tensor

from mpilm.comm import process_groups
from mpilm.comm.base import Comm, Counts, Request, SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.process_groups import ProcessGroupComm, connect_process_groups
from mpilm.engine import device_transport
from mpilm.engine.device_transport import choose_fastest, connect_devices
from mpilm.engine.hardware import Hardware
from mpilm.errors import LostRankError

CPU = torch.device("cpu")
R = TypeVar("R")


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits for one that has failed ends within a test's time limit."""
    monkeypatch.setattr(process_groups, "TIMEOUT", timedelta(seconds=20))
    monkeypatch.setattr(process_groups, "LOST_RANK_S", 0.0)


def run_on_groups(size: int, body: Callable[[Comm], R]) -> list[R]:
    return run_ranks(size, lambda comm: body(connect_process_groups(comm, CPU)))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_process_group_comm_keeps_the_contract(size: int) -> None:
    def body(comm: Comm) -> list[str]:
        for name, check in CONTRACT.items():
            check(comm)
            assert ranks_are_in_step(comm, name)
        return list(CONTRACT)

    assert run_on_groups(size, body) == [list(CONTRACT)] * size


def test_instrumented_process_group_comm_keeps_the_contract() -> None:
    def body(comm: Comm) -> bool:
        instrumented = InstrumentedComm(comm, checks_calls=True)
        for check in CONTRACT.values():
            check(instrumented)
        return ranks_are_in_step(instrumented, "all")

    assert run_on_groups(3, body) == [True] * 3


def test_tensors_of_other_devices_and_reductions_travel_over_the_other_communicator() -> None:
    def body(comm: Comm) -> tuple[list[str], list[str]]:
        moving = connect_process_groups(comm, CPU)
        counter = InstrumentedComm(comm)  # records what it passes on
        moving.control = counter
        moves = [
            lambda: moving.all_gather(torch.ones(2), torch.empty(4)),
            lambda: moving.all_to_all(torch.ones(4), torch.empty(4)),
            lambda: moving.broadcast(torch.ones(2)),
        ]
        for move in (*moves, lambda: moving.all_reduce(torch.ones(2)), moving.barrier):
            move()
        by_group = [*counter.calls]
        counter.calls.clear()
        moving.device = torch.device("cuda")  # so that tensors of a CPU are those of another device
        for move in moves:
            move()
        return by_group, [*counter.calls]

    assert run_ranks(2, body) == [(["all_reduce", "barrier"], ["all_gather", "all_to_all", "broadcast"])] * 2


TENSOR = {"model__tensor_parts": 2, "model__n_kv_heads": 2}
LAYOUTS = {
    "data, zero 1": layout(zero=1),
    "pipeline": layout(2),
    "tensor, zero 2": layout(zero=2, tensor=2) | TENSOR,
    "context, zero 3": layout(zero=3, context=2) | {"model__sequence_parts": 4},
    "ring": layout(context=2, context_method="ring") | {"model__sequence_parts": 4},
    "interleaved, expert, zero 3": layout(2, "interleaved", zero=3, expert=2) | FAMILIES["mixtral"] | {"model__n_layers": 4},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_the_bits_of_the_serial_run(name: str) -> None:
    config = small_config(**{"model__n_layers": 2, "train__global_batch": 4, **LAYOUTS[name]})
    outcomes = run_on_groups(4, lambda comm: train_steps(config, comm))
    expected_numbers, expected = train_serially(on_one_rank(config))
    assert all(outcome.numbers == expected_numbers for outcome in outcomes)
    assert differing(assemble([outcome.state for outcome in outcomes]), expected) == []


def test_rank_that_loses_a_peer_names_the_communicator_and_the_cause() -> None:
    """One rank frees its group, as the end of its process would, while another waits for it."""
    messages = []

    def body(comm: Comm) -> None:
        moving = connect_process_groups(comm, CPU)
        if comm.rank == 1:
            moving._group = None
            return
        with pytest.raises(LostRankError) as caught:
            moving.all_gather(torch.ones(1), torch.empty(2))
        messages.append(str(caught.value))

    run_ranks(2, body)
    (message,) = messages
    assert message.startswith("another rank has failed (world@rank 0 of 2: Gloo: ")
    assert message.endswith("; the same command resumes from the newest checkpoint")


def test_store_that_cannot_be_reached_is_one_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        unused = server.getsockname()[1]
    join = process_groups._join_store
    monkeypatch.setattr(process_groups, "_join_store", lambda addresses, port: join(["127.0.0.1"], unused))

    def body(comm: Comm) -> str:
        with pytest.raises(CollectiveError) as caught:
            connect_process_groups(comm, CPU)
        return str(caught.value)

    assert set(run_ranks(3, body)) == {
        f"torch.distributed: {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:{unused}; "
        "write --train.device-transport mpi (on ranks 1, 2)"
    }


# The choice.


def on_cpu(setting: str, comm: Comm) -> Comm:
    return connect_devices(setting, comm, Hardware(CPU, 1, False))  # type: ignore[arg-type]


def test_cpus_use_mpi_unless_torch_is_named() -> None:
    def body(comm: Comm) -> list[type]:
        instrumented = InstrumentedComm(comm)
        chosen = on_cpu("torch", instrumented)
        assert isinstance(chosen, InstrumentedComm)
        assert chosen.device_transport == "Gloo"
        return [type(on_cpu(setting, comm)) for setting in ("auto", "mpi", "gpu-aware-mpi", "torch")] + [type(chosen.inner)]

    for kinds in run_ranks(2, body):
        assert kinds[3:] == [ProcessGroupComm] * 2
        assert ProcessGroupComm not in kinds[:3]


def test_torch_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(comm: Comm, is_elastic: bool = False, kind: str = "cpu") -> str:
        with pytest.raises(CollectiveError) as caught:
            connect_devices("torch", comm, Hardware(torch.device(kind), 1, False), is_elastic)
        return str(caught.value)

    elastic, *_ = run_ranks(2, lambda comm: message(comm, is_elastic=True))
    assert elastic.startswith("--train.device-transport torch: --fault.elastic true needs MPI for all messages")
    mixed, *_ = run_ranks(2, lambda comm: message(comm, kind=("cpu", "meta")[comm.rank]))
    assert mixed.endswith("torch: the ranks compute on cpu and meta; name one of them with --train.device")
    monkeypatch.setattr(device_transport, "has_process_groups", lambda device: False)
    assert message(SelfComm()) == "--train.device-transport torch: this build of torch has no torch.distributed for cpu"


@pytest.mark.parametrize(("ids", "shared"), [(("a", "b"), False), (("a", "a"), True)])
def test_ranks_that_share_a_gpu_have_no_process_groups(
    ids: tuple[str, str], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each rank sees one GPU alone, as its number 0."""
    monkeypatch.setattr(device_transport, "has_process_groups", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=ids[device.index]))
    found = run_ranks(2, lambda comm: device_transport.find_obstacle(comm, torch.device("cuda", comm.rank), is_elastic=False))
    assert [text.startswith("several ranks share a GPU") for text in found] == [shared] * 2


def test_fastest_transport_that_moves_all_bytes_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread ranks hand over references: nothing is faster, unless it does nothing."""
    monkeypatch.setattr(device_transport, "TIMED_BYTES", 1 << 12)

    class Broken(ProcessGroupComm):
        def _iall_to_all(self, x: Tensor, out: Tensor, send_counts: Counts, receive_counts: Counts) -> Request:
            return Request()

    def body(comm: Comm) -> str:
        moving = connect_process_groups(comm, CPU)
        broken = Broken(comm, CPU, moving._store, "broken")
        chosen = choose_fastest({"mpi": comm, "torch": broken}, CPU, "; a note")
        assert chosen is comm
        return chosen.device_transport

    for text in run_ranks(2, body):
        assert text.startswith("MPI (mpi ")
        assert text.endswith(" ms; a note; torch moved wrong bytes and is not used)")
