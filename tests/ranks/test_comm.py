"""The contract of communicators on ranks that are threads, and on the world of one rank."""

import threading
from collections.abc import Callable

import pytest
import torch
from contract import CONTRACT, MISMATCHES, in_step, names_the_odd_rank, names_the_rank_that_expects_other_parts

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.threads import PeerFailedError, run_ranks
from mpilm.errors import RanksDisagreeError

SIZES = (1, 2, 3, 4, 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONTRACT)
def test_threads_keep_the_contract(name: str, size: int) -> None:
    def body(comm: Comm) -> bool:
        CONTRACT[name](comm)
        return in_step(comm, name)

    assert run_ranks(size, body) == [True] * size


@pytest.mark.parametrize("name", CONTRACT)
def test_the_world_of_one_keeps_the_contract(name: str) -> None:
    alone = SelfComm("world")
    CONTRACT[name](alone)
    assert in_step(alone, name)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CONTRACT)
def test_tracing_changes_nothing(name: str, size: int) -> None:
    def body(comm: Comm) -> bool:
        traced = InstrumentedComm(comm, checks_calls=True)
        CONTRACT[name](traced)
        return in_step(traced, name)

    assert run_ranks(size, body) == [True] * size


def test_results_come_in_rank_order() -> None:
    assert run_ranks(4, lambda comm: comm.rank**2) == [0, 1, 4, 9]


@pytest.mark.parametrize("where", ["recv", "barrier", "all_reduce"])
def test_a_rank_that_raises_releases_the_others(where: str) -> None:
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
            waiting[where]()
        except PeerFailedError as error:
            others.append(error)
            raise

    before = threading.active_count()
    with pytest.raises(KeyError, match="boom"):
        run_ranks(3, body)
    assert [str(error) for error in others] == ["rank 2 raised KeyError: 'boom'"] * 2
    assert threading.active_count() == before


def test_what_never_comes_is_named() -> None:
    def body(comm: Comm) -> None:
        if comm.rank == 0:
            comm.irecv(torch.empty(1), 1, tag=4).wait()

    with pytest.raises(TimeoutError, match=r"no message within 0\.2 s"):
        run_ranks(2, body, timeout_s=0.2)


def test_a_receive_with_nothing_sent_is_refused_on_one_rank() -> None:
    with pytest.raises(RuntimeError, match="receive with tag 3, but nothing was sent with it"):
        SelfComm().irecv(torch.empty(1), 0, tag=3).wait()


def test_counters_are_exact() -> None:
    def body(comm: Comm) -> tuple[dict[str, int], dict[str, int]]:
        traced = InstrumentedComm(comm)
        counts = [1, 2, 0]
        traced.all_reduce(torch.zeros(5))
        traced.all_reduce(torch.zeros(3, dtype=torch.int64), "max")
        traced.all_gather(torch.zeros(counts[comm.rank]), torch.zeros(3), counts)
        sends = [[0, 1, 2], [3, 4, 0], [1, 1, 1]]
        receives = [row[comm.rank] for row in sends]
        mine = torch.zeros(sum(sends[comm.rank]), dtype=torch.bfloat16)
        traced.all_to_all(mine, torch.zeros(sum(receives), dtype=torch.bfloat16), sends[comm.rank], receives)
        traced.broadcast(torch.zeros(7, dtype=torch.uint8), root=1)
        if comm.rank == 0:
            traced.isend(torch.zeros(11), 1).wait()
        if comm.rank == 1:
            traced.irecv(torch.zeros(11), 0).wait()
        return dict(traced.calls), {op: n for op, n in traced.sent_bytes.items() if n}

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
def test_checking_names_the_odd_rank(mismatch: str, size: int) -> None:
    run_ranks(size, lambda comm: names_the_odd_rank(comm, mismatch))


@pytest.mark.parametrize("size", [2, 3])
def test_checking_compares_the_parts_of_an_exchange(size: int) -> None:
    run_ranks(size, names_the_rank_that_expects_other_parts)


def test_checking_allows_messages_between_two_ranks() -> None:
    """They are no collectives: one rank may send more than another, and the order of the collectives still agrees."""

    def body(comm: Comm) -> float:
        traced = InstrumentedComm(comm, checks_calls=True)
        if comm.rank == 0:
            traced.isend(torch.ones(1), 1).wait()
        if comm.rank == 1:
            traced.irecv(torch.ones(1), 0).wait()
        x = torch.ones(1)
        traced.all_reduce(x)
        return x.item()

    assert run_ranks(3, body) == [3.0] * 3


def test_parts_and_nodes_are_checked_too() -> None:
    def body(comm: Comm) -> None:
        for part in (
            InstrumentedComm(comm, checks_calls=True).split(0, comm.rank, "part"),
            InstrumentedComm(comm, checks_calls=True).split_node(),
        ):
            part.all_reduce(torch.zeros(1 if comm.rank else 2))

    with pytest.raises(RanksDisagreeError, match="part: the ranks do not make the same call"):
        run_ranks(3, body)
