"""The contract of communicators on real MPI: `mpirun -n 2 pytest`, and 1, 3 and 4 as well."""

import os

import pytest
import torch
from contract import CONTRACT, MISMATCHES, in_step, names_the_odd_rank, names_the_rank_that_expects_other_parts
from torch import Tensor

from mpilm.comm import shared_memory as shared
from mpilm.comm.base import Comm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.mpi import MpiComm, mpi_library_name, mpi_world


class Staged(MpiComm):
    """Takes every buffer for one that MPI cannot read, as GPU memory is, so that all goes through copies.

    This is the code that runs for CUDA but for three things, which need a GPU: that the memory is pinned, that the
    copies wait for the stream, and the stream's synchronisation where the site's MPI is GPU-aware.
    """

    def _can_read(self, tensor: Tensor) -> bool:
        return False


@pytest.fixture(scope="module")
def staged(world: MpiComm) -> Staged:
    return Staged(world._comm, "world")


@pytest.mark.parametrize("name", CONTRACT)
def test_mpi_keeps_the_contract(world: Comm, name: str) -> None:
    CONTRACT[name](world)
    assert in_step(world, name)


@pytest.mark.parametrize("name", CONTRACT)
def test_patient_waiting_keeps_the_contract(world: MpiComm, name: str) -> None:
    patient = world.with_options(gpu_aware=False, yield_while_waiting=True)
    CONTRACT[name](patient)
    assert in_step(patient, name)


@pytest.mark.parametrize("name", CONTRACT)
def test_staging_keeps_the_contract(staged: Staged, name: str) -> None:
    CONTRACT[name](staged)
    assert in_step(staged, name)


@pytest.mark.parametrize("name", CONTRACT)
def test_tracing_changes_nothing(world: Comm, name: str) -> None:
    traced = InstrumentedComm(world, checks_calls=True)
    CONTRACT[name](traced)
    assert in_step(traced, name)


def test_staging_leaves_the_buffers_alone_until_the_wait(staged: Staged) -> None:
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


def test_staging_sends_what_was_there_when_it_started(staged: Staged) -> None:
    n, me = staged.size, staged.rank
    x, out = torch.full((4,), float(me)), torch.empty(4)
    receive, send = staged.irecv(out, (me - 1) % n), staged.isend(x, (me + 1) % n)
    x.fill_(-1.0)
    send.wait()
    receive.wait()
    assert torch.equal(out, torch.full((4,), float((me - 1) % n)))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_checking_names_the_odd_rank(world: Comm, mismatch: str) -> None:
    names_the_odd_rank(world, mismatch)


@pytest.mark.mpi(min_size=2)
def test_checking_compares_the_parts_of_an_exchange(world: Comm) -> None:
    names_the_rank_that_expects_other_parts(world)


def leftovers() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("mpilm-")]


def test_shared_memory_has_no_name_left(world: Comm) -> None:
    assert world.allocate_shared(1 << 20) is not None
    world.barrier()
    assert leftovers() == []


@pytest.mark.parametrize("lack", ["no folder", "no room", "another container"])
def test_where_there_is_no_shared_memory_all_ranks_hear_it(world: Comm, lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lack == "no folder":
        monkeypatch.setattr(shared, "SHM_FOLDER", "/no/such/folder")
    elif lack == "another container" and world.rank == world.size - 1:
        monkeypatch.setattr(shared, "_map_file", lambda path, nbytes: None)
    assert world.allocate_shared(1 << 44 if lack == "no room" else 10) is None
    world.barrier()
    assert leftovers() == []


def test_options_belong_to_the_parts_as_well(world: MpiComm) -> None:
    part = world.with_options(gpu_aware=True, yield_while_waiting=True).split(0, world.rank, "part")
    assert isinstance(part, MpiComm)
    assert (part.gpu_aware, part.yield_while_waiting) == (True, True)
    assert (world.gpu_aware, world.yield_while_waiting) == (False, False)


def test_messages_of_two_worlds_do_not_meet(world: MpiComm) -> None:
    """The world is a duplicate: the same tag on another duplicate is another message."""
    other = mpi_world()
    n, me = world.size, world.rank
    a, b = torch.empty(1), torch.empty(1)
    requests = [world.irecv(a, (me - 1) % n), other.irecv(b, (me - 1) % n)]
    requests += [other.isend(torch.ones(1), (me + 1) % n), world.isend(torch.zeros(1), (me + 1) % n)]
    for request in requests:
        request.wait()
    assert (a.item(), b.item()) == (0.0, 1.0)


def test_a_message_too_long_for_mpi_is_refused(world: Comm) -> None:
    too_long = torch.empty(1, dtype=torch.uint8).expand(2**31)  # takes no memory
    with pytest.raises(ValueError, match="not contiguous"):
        world.all_reduce(too_long)
    huge = torch.empty(2**31, dtype=torch.uint8)  # untouched pages take none either
    with pytest.raises(ValueError, match=r"one message of 2147483648 elements.*split it into buckets"):
        world.isend(huge, 0)


def test_the_library_is_named() -> None:
    assert mpi_library_name().split()[0] in ("MPICH", "Open", "Intel", "MVAPICH")
