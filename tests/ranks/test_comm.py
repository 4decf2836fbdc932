"""The contract of communicators on thread ranks and on one rank; checks and counts of calls."""

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from contract import CONTRACT, MISMATCHES, check_odd_rank_is_named, check_unequal_counts_are_named, ranks_are_in_step
from thread_ranks import PeerFailedError, run_ranks

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.errors import RanksDisagreeError

SIZES = (1, 2, 3, 4, 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONTRACT)
def test_thread_comm_keeps_the_contract(name: str, size: int) -> None:
    def body(comm: Comm) -> bool:
        CONTRACT[name](comm)
        return ranks_are_in_step(comm, name)

    assert run_ranks(size, body) == [True] * size


@pytest.mark.parametrize("name", CONTRACT)
def test_self_comm_keeps_the_contract(name: str) -> None:
    comm = SelfComm("world")
    CONTRACT[name](comm)
    assert ranks_are_in_step(comm, name)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CONTRACT)
def test_instrumented_comm_keeps_the_contract(name: str, size: int) -> None:
    def body(comm: Comm) -> bool:
        instrumented = InstrumentedComm(comm, checks_calls=True)
        CONTRACT[name](instrumented)
        return ranks_are_in_step(instrumented, name)

    assert run_ranks(size, body) == [True] * size


def test_run_ranks_returns_results_in_rank_order() -> None:
    assert run_ranks(4, lambda comm: comm.rank**2) == [0, 1, 4, 9]


@pytest.mark.parametrize("call", ["recv", "barrier", "all_reduce"])
def test_rank_that_raises_releases_the_others(call: str) -> None:
    others: list[BaseException] = []

    def body(comm: Comm) -> None:
        if comm.rank == 2:
            raise KeyError("boom")
        waiting: dict[str, Callable[[], None]] = {
            "recv": lambda: comm.irecv(torch.empty(1), 2).wait(),
            "barrier": comm.barrier,
            "all_reduce": lambda: comm.all_reduce(torch.empty(1)),
        }
        try:
            waiting[call]()
        except PeerFailedError as error:
            others.append(error)
            raise

    before = threading.active_count()
    with pytest.raises(KeyError, match="boom"):
        run_ranks(3, body)
    assert [str(error) for error in others] == ["rank 2 raised KeyError: 'boom'"] * 2
    assert threading.active_count() == before


def test_message_that_never_arrives_times_out() -> None:
    def body(comm: Comm) -> None:
        if comm.rank == 0:
            comm.irecv(torch.empty(1), 1, tag=4).wait()

    with pytest.raises(TimeoutError, match=r"no message within 0\.2 s"):
        run_ranks(2, body, timeout_s=0.2)


def test_self_comm_refuses_a_receive_without_a_send() -> None:
    with pytest.raises(RuntimeError, match="receive with tag 3, but nothing was sent with it"):
        SelfComm().irecv(torch.empty(1), 0, tag=3).wait()


def test_instrumented_comm_counts_calls_and_bytes() -> None:
    def body(comm: Comm) -> tuple[dict[str, int], dict[str, int]]:
        instrumented = InstrumentedComm(comm)
        counts = [1, 2, 0]
        instrumented.all_reduce(torch.zeros(5))
        instrumented.all_reduce(torch.zeros(3, dtype=torch.int64), "max")
        instrumented.all_gather(torch.zeros(counts[comm.rank]), torch.zeros(3), counts)
        sends = [[0, 1, 2], [3, 4, 0], [1, 1, 1]]
        receives = [row[comm.rank] for row in sends]
        mine = torch.zeros(sum(sends[comm.rank]), dtype=torch.bfloat16)
        instrumented.all_to_all(mine, torch.zeros(sum(receives), dtype=torch.bfloat16), sends[comm.rank], receives)
        instrumented.broadcast(torch.zeros(7, dtype=torch.uint8), root=1)
        if comm.rank == 0:
            instrumented.isend(torch.zeros(11), 1).wait()
        if comm.rank == 1:
            instrumented.irecv(torch.zeros(11), 0).wait()
        return dict(instrumented.calls), {op: n for op, n in instrumented.sent_bytes.items() if n}

    calls, sent = zip(*run_ranks(3, body))
    collectives = {"all_reduce": 2, "all_gather": 1, "all_to_all": 1, "broadcast": 1}
    assert calls == ({**collectives, "send": 1}, collectives, collectives)
    reduced = 5 * 4 + 3 * 8  # an all_reduce counts as its own size
    assert sent == (
        {"all_reduce": reduced, "all_gather": 1 * 2 * 4, "all_to_all": (1 + 2) * 2, "send": 11 * 4},
        {"all_reduce": reduced, "all_gather": 2 * 2 * 4, "all_to_all": (3 + 0) * 2, "broadcast": 7},
        {"all_reduce": reduced, "all_to_all": (1 + 1) * 2},
    )


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_checked_calls_that_differ_name_the_odd_rank(mismatch: str, size: int) -> None:
    run_ranks(size, lambda comm: check_odd_rank_is_named(comm, mismatch))


@pytest.mark.parametrize("size", [2, 3])
def test_checked_all_to_all_with_unequal_counts_names_the_rank(size: int) -> None:
    run_ranks(size, check_unequal_counts_are_named)


def test_checked_calls_ignore_point_to_point_messages() -> None:
    """One rank may send more messages than another without changing the order of the collectives."""

    def body(comm: Comm) -> float:
        instrumented = InstrumentedComm(comm, checks_calls=True)
        if comm.rank == 0:
            instrumented.isend(torch.ones(1), 1).wait()
        if comm.rank == 1:
            instrumented.irecv(torch.ones(1), 0).wait()
        x = torch.ones(1)
        instrumented.all_reduce(x)
        return x.item()

    assert run_ranks(3, body) == [3.0] * 3


def test_comm_that_no_longer_checks_stops_its_parts() -> None:
    def body(comm: Comm) -> list[int]:
        checked, found = InstrumentedComm(InstrumentedComm(comm), checks_calls=True), []
        part = checked.split_node()
        assert isinstance(part, InstrumentedComm)
        assert isinstance(part.inner, InstrumentedComm)
        for checked.checks_calls in (True, False, True):
            part.barrier()
            found.append(part.inner.calls["all_gather"])  # with which calls are compared
        return [after - before for before, after in itertools.pairwise(found)]

    assert run_ranks(2, body) == [[0, 1]] * 2


def test_checked_comm_passes_checks_on_to_its_parts() -> None:
    def body(comm: Comm) -> None:
        for part in (
            InstrumentedComm(comm, checks_calls=True).split(0, comm.rank, "part"),
            InstrumentedComm(comm, checks_calls=True).split_node(),
        ):
            part.all_reduce(torch.zeros(1 if comm.rank else 2))

    with pytest.raises(RanksDisagreeError, match="part: the ranks do not make the same call"):
        run_ranks(3, body)
