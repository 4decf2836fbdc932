"""The contract of communicators on real MPI: `mpirun -n 2 pytest`, and 1, 3 and 4 as well."""

import os
import re

import pytest
import torch
from contract import CONTRACT, MISMATCHES, check_odd_rank_is_named, check_unequal_counts_are_named, ranks_are_in_step
from mpi4py import MPI
from torch import Tensor

from mpilm.comm import shared_memory
from mpilm.comm.base import Comm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.mpi import MpiComm, mpi_library_name, mpi_world
from mpilm.comm.process_groups import ProcessGroupComm, connect_process_groups
from mpilm.engine import device_transport

CPU = torch.device("cpu")


class Staged(MpiComm):
    """Stages every buffer, as if MPI could not read it, like GPU memory.

    CUDA runs the same code except for three things that need a GPU: pinned memory, copies that wait for the stream, and the
    synchronization of the stream if the site's MPI is GPU-aware.
    """

    def _can_read(self, tensor: Tensor) -> bool:
        return False


@pytest.fixture(scope="module")
def staged(world: MpiComm) -> Staged:
    return Staged(world._comm, "world")


@pytest.mark.parametrize("name", CONTRACT)
def test_mpi_comm_keeps_the_contract(world: Comm, name: str) -> None:
    CONTRACT[name](world)
    assert ranks_are_in_step(world, name)


@pytest.mark.parametrize("name", CONTRACT)
def test_mpi_comm_that_yields_keeps_the_contract(world: MpiComm, name: str) -> None:
    yielding = world.with_options(gpu_aware=False, yield_while_waiting=True)
    CONTRACT[name](yielding)
    assert ranks_are_in_step(yielding, name)


@pytest.mark.parametrize("name", CONTRACT)
def test_staged_mpi_comm_keeps_the_contract(staged: Staged, name: str) -> None:
    CONTRACT[name](staged)
    assert ranks_are_in_step(staged, name)


@pytest.mark.parametrize("name", CONTRACT)
def test_instrumented_mpi_comm_keeps_the_contract(world: Comm, name: str) -> None:
    instrumented = InstrumentedComm(world, checks_calls=True)
    CONTRACT[name](instrumented)
    assert ranks_are_in_step(instrumented, name)


@pytest.fixture(scope="module")
def gloo(world: MpiComm) -> ProcessGroupComm:
    return connect_process_groups(world, CPU)


@pytest.mark.parametrize("name", CONTRACT)
def test_process_group_comm_keeps_the_contract(gloo: Comm, name: str) -> None:
    CONTRACT[name](gloo)
    assert ranks_are_in_step(gloo, name)


def test_process_groups_are_timed_against_mpi(world: MpiComm, gloo: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_transport, "TIMED_BYTES", 1 << 16)
    chosen = device_transport.choose_fastest(
        {"mpi": world.with_options(gpu_aware=False, yield_while_waiting=True), "torch": gloo}, CPU
    )
    name = "Gloo" if chosen is gloo else "MPI"
    assert re.fullmatch(rf"{name} \(mpi [\d.]+ ms, torch [\d.]+ ms\)", chosen.device_transport)


def test_staging_leaves_buffers_unchanged_until_the_wait(staged: Staged) -> None:
    n = staged.size
    x, out = torch.ones(4), torch.zeros(4 * n)
    reduce, gather = staged.iall_reduce(x), staged.iall_gather(torch.ones(4), out)
    staged.barrier()
    assert torch.equal(x, torch.ones(4))
    assert not out.any()
    reduce.wait()
    gather.wait()
    assert torch.equal(x, torch.full((4,), float(n)))
    assert torch.equal(out, torch.ones(4 * n))


def test_staging_sends_the_values_at_the_start_of_the_call(staged: Staged) -> None:
    n, me = staged.size, staged.rank
    x, out = torch.full((4,), float(me)), torch.empty(4)
    receive, send = staged.irecv(out, (me - 1) % n), staged.isend(x, (me + 1) % n)
    x.fill_(-1.0)
    send.wait()
    receive.wait()
    assert torch.equal(out, torch.full((4,), float((me - 1) % n)))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_checked_calls_that_differ_name_the_odd_rank(world: Comm, mismatch: str) -> None:
    check_odd_rank_is_named(world, mismatch)


@pytest.mark.mpi(min_size=2)
def test_checked_all_to_all_with_unequal_counts_names_the_rank(world: Comm) -> None:
    check_unequal_counts_are_named(world)


def shared_memory_files() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("mpilm-")]


def test_shared_memory_leaves_no_file(world: Comm) -> None:
    assert world.allocate_shared(1 << 20) is not None
    world.barrier()
    assert shared_memory_files() == []


@pytest.mark.parametrize("cause", ["no folder", "no room", "another container"])
def test_missing_shared_memory_returns_none_on_all_ranks(world: Comm, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cause == "no folder":
        monkeypatch.setattr(shared_memory, "SHM_FOLDER", "/no/such/folder")
    elif cause == "another container" and world.rank == world.size - 1:
        monkeypatch.setattr(shared_memory, "_map_file", lambda path, nbytes: None)
    assert world.allocate_shared(1 << 44 if cause == "no room" else 10) is None
    world.barrier()
    assert shared_memory_files() == []


def test_options_are_passed_on_to_parts(world: MpiComm) -> None:
    part = world.with_options(gpu_aware=True, yield_while_waiting=True).split(0, world.rank, "part")
    assert isinstance(part, MpiComm)
    assert (part.gpu_aware, part.yield_while_waiting) == (True, True)
    assert (world.gpu_aware, world.yield_while_waiting) == (False, False)


def test_messages_of_two_worlds_are_separate(world: MpiComm) -> None:
    """The world is a duplicate: the same tag on another duplicate is another message."""
    other = mpi_world()
    n, me = world.size, world.rank
    a, b = torch.empty(1), torch.empty(1)
    requests = [world.irecv(a, (me - 1) % n), other.irecv(b, (me - 1) % n)]
    requests += [other.isend(torch.ones(1), (me + 1) % n), world.isend(torch.zeros(1), (me + 1) % n)]
    for request in requests:
        request.wait()
    assert (a.item(), b.item()) == (0.0, 1.0)


def test_message_longer_than_mpi_counts_is_refused(world: Comm) -> None:
    too_long = torch.empty(1, dtype=torch.uint8).expand(2**31)  # takes no memory
    with pytest.raises(ValueError, match="not contiguous"):
        world.all_reduce(too_long)
    huge = torch.empty(2**31, dtype=torch.uint8)  # untouched pages take none either
    with pytest.raises(ValueError, match=r"one message of 2147483648 elements.*split it into buckets"):
        world.isend(huge, 0)


def test_mpi_library_name_is_that_of_a_known_library() -> None:
    assert mpi_library_name().split()[0] in ("MPICH", "Open", "Intel", "MVAPICH")


def test_rank_whose_memory_is_gone_has_failed(world: MpiComm) -> None:
    """MPICH copies long messages from the memory of the sender, which may have been killed."""

    class UnreadableError(MPI.Exception):
        def __str__(self) -> str:
            return "Other MPI error, error stack:\nMPIDI_CMA_copy_data(68): \ncopy_iovs(224): process_vm_readv failed (errno 3)"

    assert world.is_rank_failure(UnreadableError(MPI.ERR_OTHER))
    assert not world.is_rank_failure(MPI.Exception(MPI.ERR_OTHER))
    assert not world.is_rank_failure(ValueError("process_vm_readv failed (errno 3)"))
