"""The contract of every communicator: tests/ranks and tests/mpi run each body of CONTRACT on their own ranks.

A body is called on every rank with that rank's communicator and works for any number of ranks.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpilm.comm.base import OPS, REDUCIBLE, Comm
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.shared_memory import SharedPlaces
from mpilm.errors import RanksDisagreeError
from mpilm.optim.norm import global_norm

MOVABLE = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
CONTRACT: dict[str, Callable[[Comm], None]] = {}


def contract(body: Callable[[Comm], None]) -> Callable[[Comm], None]:
    CONTRACT[body.__name__] = body
    return body


def uneven(size: int, first: int = 0) -> list[int]:
    """Return the counts 0, 1, 2, 0, 1, 2, ... over the ranks."""
    return [(first + rank) % 3 for rank in range(size)]


def noise(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Return any bits that the dtype can hold, NaNs included: moving must not change them."""
    generator, device = torch.Generator().manual_seed(seed), torch.get_default_device()
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator, device="cpu").bool().to(device)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator, device="cpu")
    return bits.view(dtype).to(device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contract
def reduces_to_closed_formulas(comm: Comm) -> None:
    n = comm.size
    base = torch.arange(6)
    expected = {"sum": n * base + n * (n - 1) // 2, "max": base + n - 1, "min": base}
    for dtype in REDUCIBLE:
        for op in OPS:
            x = (base + comm.rank).to(dtype).view(2, 3)
            comm.all_reduce(x, op)
            assert torch.equal(x, expected[op].to(dtype).view(2, 3)), (dtype, op)
    scalar, nothing = torch.tensor(1.0), torch.empty(0)
    comm.all_reduce(scalar)
    comm.all_reduce(nothing)
    assert scalar.item() == n


@contract
def gathers_uneven_parts(comm: Comm) -> None:
    for counts in (uneven(comm.size), uneven(comm.size, 1), [0] * comm.size, [2] * comm.size):
        parts = [100 * r + torch.arange(count) for r, count in enumerate(counts)]
        out = torch.full((sum(counts),), -1)
        comm.all_gather(parts[comm.rank], out, counts)
        assert torch.equal(out, torch.cat(parts)), counts
    comm.all_gather(parts[comm.rank], out.zero_())  # without counts: even parts
    assert torch.equal(out, torch.cat(parts))


@contract
def gathers_in_place(comm: Comm) -> None:
    for counts in (uneven(comm.size, 1), [3] * comm.size):
        parts = [100 * r + torch.arange(count) for r, count in enumerate(counts)]
        out = torch.full((sum(counts),), -1)
        mine = out.split(counts)[comm.rank]
        mine.copy_(parts[comm.rank])
        comm.all_gather(mine, out, counts)
        assert torch.equal(out, torch.cat(parts)), counts


@contract
def exchanges_uneven_parts(comm: Comm) -> None:
    for zero in (False, True):

        def part(source: int, to: int, zero: bool = zero) -> Tensor:
            return 100 * source + 10 * to + torch.arange(0 if zero else (source + 2 * to) % 3)

        sends = [part(comm.rank, r) for r in range(comm.size)]
        receives = [part(r, comm.rank) for r in range(comm.size)]
        out = torch.full((sum(map(len, receives)),), -1)
        comm.all_to_all(torch.cat(sends), out, list(map(len, sends)), list(map(len, receives)))
        assert torch.equal(out, torch.cat(receives))
    x = torch.arange(2 * comm.size) + 100 * comm.rank
    out = torch.empty_like(x)
    comm.all_to_all(x, out)  # without counts: even parts
    expected = [100 * r + 2 * comm.rank + torch.arange(2) for r in range(comm.size)]
    assert torch.equal(out, torch.cat(expected))


@contract
def broadcasts_from_every_root(comm: Comm) -> None:
    for root in range(comm.size):
        x = torch.full((2, 3), float(comm.rank))
        comm.broadcast(x, root)
        assert torch.equal(x, torch.full((2, 3), float(root)))
    comm.broadcast(torch.empty(0))


@contract
def moves_every_dtype_bit_for_bit(comm: Comm) -> None:
    n, me = comm.size, comm.rank
    for dtype in MOVABLE:
        every = [noise(dtype, 4 * n, seed=r) for r in range(n)]
        gathered, exchanged, received = (torch.empty(count, dtype=dtype) for count in (4 * n * n, 4 * n, 4 * n))
        comm.all_gather(every[me], gathered)
        assert same_bits(gathered, torch.cat(every)), dtype
        comm.all_to_all(every[me], exchanged)
        assert same_bits(exchanged, torch.cat([x[4 * me : 4 * me + 4] for x in every])), dtype
        send = comm.isend(every[me], (me + 1) % n)
        comm.irecv(received, (me - 1) % n).wait()
        send.wait()
        assert same_bits(received, every[me - 1]), dtype
        last = every[me].clone()
        comm.broadcast(last, n - 1)
        assert same_bits(last, every[n - 1]), dtype


@contract
def keeps_many_in_flight(comm: Comm) -> None:
    n, me = comm.size, comm.rank
    total, gathered, exchanged, passed = torch.full((1000,), float(me)), torch.empty(n), torch.empty(n), torch.empty(3)
    requests = [
        comm.irecv(passed, (me - 1) % n, 5),
        comm.iall_reduce(total),
        comm.iall_gather(torch.tensor([float(me)]), gathered),
        comm.iall_to_all(torch.arange(n) + 10.0 * me, exchanged),
        comm.isend(torch.full((3,), float(me)), (me + 1) % n, 5),
    ]
    for request in (requests[i] for i in (3, 1, 4, 0, 2)):
        request.wait()
        request.wait()  # a second wait does nothing
    assert torch.equal(total, torch.full((1000,), n * (n - 1) / 2))
    assert torch.equal(gathered, torch.arange(float(n)))
    assert torch.equal(exchanged, 10.0 * torch.arange(n) + me)
    assert torch.equal(passed, torch.full((3,), float((me - 1) % n)))


@contract
def delivers_by_tag_and_in_order(comm: Comm) -> None:
    n, me = comm.size, comm.rank
    messages = [(7, 0), (3, 1), (7, 2), (3, 3), (7, 4)]  # tag, value
    received = {value: torch.empty(2, 2) for _, value in messages}
    sends = [comm.isend(torch.full((2, 2), 10.0 * me + value), (me + 1) % n, tag) for tag, value in messages]
    by_tag = sorted(messages)  # receives start in another order than the sends; within a tag the order is the same
    receives = [comm.irecv(received[value], (me - 1) % n, tag) for tag, value in by_tag]
    for request in (*reversed(receives), *reversed(sends)):
        request.wait()
    for value, buffer in received.items():
        assert torch.equal(buffer, torch.full((2, 2), 10.0 * ((me - 1) % n) + value)), value


@contract
def ends_a_send_once_its_receive_has_started(comm: Comm) -> None:
    at, x = 0.0, torch.ones(4)
    if comm.rank == 0 and comm.size > 1:
        comm.isend(x, 1).wait()
        at = time.monotonic()
    if comm.rank == 1:
        time.sleep(0.2)
        at = time.monotonic()
        comm.irecv(x, 0).wait()
    times = comm.all_gather_json(at)
    assert times[0] >= max(times)  # of one clock: all tests run on one machine


@contract
def refuses_a_message_of_another_length(comm: Comm) -> None:
    out = torch.zeros(5)
    receive = comm.irecv(out, (comm.rank - 1) % comm.size, 9)
    send = comm.isend(torch.ones(3), (comm.rank + 1) % comm.size, 9)
    with pytest.raises(RuntimeError, match=r"received 3 .* into a buffer of 5"):
        receive.wait()
    send.wait()


@contract
def splits_by_color_and_key(comm: Comm) -> None:
    color = comm.rank % 2
    members = [r for r in range(comm.size) if r % 2 == color][::-1]
    part = comm.split(color, key=-comm.rank, name="half")
    assert (part.name, part.size, part.rank) == ("half", len(members), members.index(comm.rank))
    ranks = torch.full((part.size,), -1)
    part.all_gather(torch.tensor([comm.rank]), ranks)
    assert ranks.tolist() == members
    back = comm.split(0, key=-comm.rank, name="back")
    assert back.rank == comm.size - 1 - comm.rank
    alone = part.split(part.rank, 0, "alone")  # a part can be split again
    assert (alone.size, alone.rank) == (1, 0)
    alone.all_reduce(ranks)
    a, b = torch.tensor([1]), torch.tensor([1])
    inner, outer = part.iall_reduce(a), comm.iall_reduce(b)  # both under way at once
    outer.wait()
    inner.wait()
    assert (a.item(), b.item()) == (part.size, comm.size)
    node = comm.split_node()
    assert (node.name, node.size, node.rank) == ("node", comm.size, comm.rank)  # all tests run on one machine
    assert node.all_gather_json(comm.rank) == list(range(comm.size))


@contract
def gathers_and_broadcasts_json(comm: Comm) -> None:
    def value(rank: int) -> object:
        return [None, "ü" * rank, {"rank": rank, "list": [1.5] * rank}, 10**30, []][rank % 5]

    assert comm.all_gather_json(value(comm.rank)) == [value(r) for r in range(comm.size)]
    for root in range(comm.size):
        assert comm.broadcast_json(value(comm.rank) if comm.rank == root else "ignored", root) == value(root)


@contract
def leaves_a_barrier_once_all_ranks_entered(comm: Comm) -> None:
    folder = Path(comm.broadcast_json(tempfile.mkdtemp() if comm.rank == 0 else None))
    (folder / str(comm.rank)).touch()
    comm.barrier()
    assert len(list(folder.iterdir())) == comm.size
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


@contract
def shares_memory(comm: Comm) -> None:
    """Parts of unequal sizes, zero at first; other ranks read after a barrier what one has written."""
    counts = [5000 * (rank % 3) + 7 for rank in range(comm.size)]
    parts = comm.allocate_shared(counts[comm.rank])
    assert parts is not None
    assert all(part.numel() >= count and not part.any() for part, count in zip(parts, counts, strict=True))
    comm.barrier()
    for turn in range(3):
        parts[comm.rank][: counts[comm.rank]] = torch.arange(counts[comm.rank]) + comm.rank + turn
        comm.barrier()
        for rank, count in enumerate(counts):
            assert torch.equal(parts[rank][:count], torch.arange(count, dtype=torch.float32) + rank + turn), (turn, rank)
        comm.barrier()
    again = comm.allocate_shared(3)
    assert again is not None
    again[comm.rank].fill_(1.0)
    assert parts[comm.rank][0] == comm.rank + 2


@contract
def shows_tensors_in_shared_places(comm: Comm) -> None:
    """One barrier an exchange, whatever the sizes and types, and how late a rank reads."""
    places = SharedPlaces(comm)
    for turn, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float32] * 2):
        sizes = [(turn + 1) * 700 * (rank + 1) % 3001 for rank in range(comm.size)]
        shown = places.reserve(sizes, dtype)
        assert shown is not None
        assert [(place.dtype, len(place)) for place in shown] == [(dtype, size) for size in sizes]
        shown[comm.rank].fill_(comm.rank + turn)
        comm.barrier()
        time.sleep(0.002 * ((comm.rank + turn) % 2))
        assert all((place == rank + turn).all() for rank, place in enumerate(shown)), turn


@contract
def ignores_the_default_device(comm: Comm) -> None:
    """A user's program may call torch.set_default_device: messages between ranks stay on the CPU."""
    pieces = [torch.full((5,), float(comm.rank + 1))]
    with torch.device("meta"):
        assert comm.all_gather_json(comm.rank) == list(range(comm.size))
        assert comm.broadcast_json("word" if comm.rank == 0 else None) == "word"
        assert global_norm(pieces, comm) ** 2 == pytest.approx(sum(5 * (r + 1) ** 2 for r in range(comm.size)), rel=1e-12)


@contract
def exchange_has_its_adjoint(comm: Comm) -> None:
    """<F x, y> = <x, F* y> over all ranks, on which backward relies. Small integers: the sums are exact."""
    counts = torch.tensor([[(s + 2 * r) % 4 for r in range(comm.size)] for s in range(comm.size)])
    sends, receives = counts[comm.rank].tolist(), counts[:, comm.rank].tolist()
    x, y = _integers(sum(sends), comm.rank), _integers(sum(receives), 100 + comm.rank)
    forward, back = torch.empty_like(y), torch.empty_like(x)
    comm.all_to_all(x, forward, sends, receives)
    comm.all_to_all(y, back, receives, sends)
    assert _dot(comm, forward, y) == _dot(comm, x, back)


@contract
def gather_has_its_adjoint(comm: Comm) -> None:
    counts = uneven(comm.size, 1)
    x, y = _integers(counts[comm.rank], comm.rank), _integers(sum(counts), 100 + comm.rank)
    forward, back = torch.empty_like(y), y.clone()
    comm.all_gather(x, forward, counts)
    comm.all_reduce(back)
    assert _dot(comm, forward, y) == _dot(comm, x, back.split(counts)[comm.rank])


def _integers(count: int, seed: int) -> Tensor:
    numbers = torch.randint(-9, 10, (count,), generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.double().to(torch.get_default_device())


def _dot(comm: Comm, a: Tensor, b: Tensor) -> float:
    product = (a * b).sum()
    comm.all_reduce(product)
    return product.item()


@contract
def refuses_misused_buffers(comm: Comm) -> None:
    """Buffers that MPI would misread are refused on the calling rank, before anything is sent."""
    n, me = comm.size, f"{comm.name}@rank {comm.rank} of {comm.size}: "
    two, grid = torch.zeros(2 * n), torch.zeros(n, 2).t()
    misuses: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "all_reduce of a tensor that requires grad, shape (3,); detach() it",
         lambda: comm.all_reduce(torch.zeros(3, requires_grad=True))),
        (ValueError, "all_to_all from torch.float32 on cpu to torch.float64 on cpu",
         lambda: comm.all_to_all(two, two.double())),
        (ValueError, "all_gather from torch.bfloat16 on cpu to torch.float16 on cpu",
         lambda: comm.all_gather(torch.zeros(1).bfloat16(), torch.zeros(n).half())),
        (TypeError, "all_reduce cannot sum torch.bfloat16; exchange it and add in float32",
         lambda: comm.all_reduce(torch.zeros(3, dtype=torch.bfloat16))),
        (TypeError, "all_reduce cannot mean torch.float32", lambda: comm.all_reduce(torch.zeros(3), "mean")),
        (ValueError, "all_gather of a buffer of 3 elements, but the counts add up to 2",
         lambda: comm.all_gather(torch.zeros(3), two)),
        (ValueError, f"all_gather with {n + 1} counts for {n} ranks", lambda: comm.all_gather(two, two, [0] * (n + 1))),
        (ValueError, f"all_to_all of a buffer of {2 * n} elements, but the counts add up to {3 * n}",
         lambda: comm.all_to_all(two, two.clone(), [3] * n, [2] * n)),
        (ValueError, "all_to_all into the buffer that it sends from; use another one", lambda: comm.all_to_all(two, two)),
        (ValueError, f"send with rank {n}, which does not exist", lambda: comm.isend(two, n)),
        (ValueError, "receive with rank -1, which does not exist", lambda: comm.irecv(two, -1)),
        (ValueError, f"broadcast with rank {n}, which does not exist", lambda: comm.broadcast(two, n)),
    ]  # fmt: skip
    if n > 1:
        odd = torch.zeros(2 * n + 1)
        misuses += [
            (ValueError, f"all_to_all of {2 * n + 1} elements, which {n} ranks do not divide; pass the counts",
             lambda: comm.all_to_all(odd, odd.clone())),
            (ValueError, f"broadcast of a tensor of shape (2, {n}) and strides (1, 2) that is not contiguous",
             lambda: comm.broadcast(grid)),
            (ValueError, f"send of a tensor of shape (2, {n}) and strides (1, 2)", lambda: comm.isend(grid, 0)),
        ]  # fmt: skip
    for kind, message, misuse in misuses:
        with pytest.raises(kind, match="^" + re.escape(me + message)):
            misuse()
    assert comm.all_gather_json(comm.rank) == list(range(n))  # the communicator still works


# Calls that do not match: the call of all ranks but the last, that of the last, and the description of each.

Call = Callable[[Comm, Tensor], object]
MISMATCHES: dict[str, tuple[Call, Call, str, str]] = {
    "operation": (
        lambda comm, x: comm.all_reduce(x), lambda comm, x: comm.broadcast(x),
        "all_reduce sum torch.float32 4", "broadcast torch.float32 4 from rank 0",
    ),
    "reduction": (
        lambda comm, x: comm.all_reduce(x), lambda comm, x: comm.all_reduce(x, "max"),
        "all_reduce sum torch.float32 4", "all_reduce max torch.float32 4",
    ),
    "dtype": (
        lambda comm, x: comm.all_reduce(x), lambda comm, x: comm.all_reduce(x.view(torch.int32)),
        "all_reduce sum torch.float32 4", "all_reduce sum torch.int32 4",
    ),
    "count": (
        lambda comm, x: comm.all_reduce(x), lambda comm, x: comm.all_reduce(x[:3]),
        "all_reduce sum torch.float32 4", "all_reduce sum torch.float32 3",
    ),
    "root": (
        lambda comm, x: comm.broadcast(x, 0), lambda comm, x: comm.broadcast(x, comm.size - 1),
        "broadcast torch.float32 4 from rank 0", "broadcast torch.float32 4 from rank ",
    ),
    "order": (
        lambda comm, x: [comm.all_reduce(part) for part in (x[:1], x[1:])],
        lambda comm, x: [comm.all_reduce(part) for part in (x[1:], x[:1])],
        "all_reduce sum torch.float32 1", "all_reduce sum torch.float32 3",
    ),
    "barrier": (
        lambda comm, x: comm.barrier(), lambda comm, x: comm.all_reduce(x), "barrier", "all_reduce sum torch.float32 4",
    ),
    "split": (
        lambda comm, x: comm.split(0, 0, "a"), lambda comm, x: comm.split(0, 0, "b"), "split a", "split b",
    ),
}  # fmt: skip


def ranks_are_in_step(comm: Comm, name: str) -> bool:
    """Return whether all ranks have finished the same contract, without a message left to be taken for another."""
    return comm.all_gather_json([name, comm.rank]) == [[name, rank] for rank in range(comm.size)]


def check_odd_rank_is_named(comm: Comm, mismatch: str) -> None:
    """Check that a checking communicator raises on all ranks, names the odd one and touches no data. At least 2 ranks."""
    usual, odd, usual_call, odd_call = MISMATCHES[mismatch]
    last = comm.size - 1
    instrumented = InstrumentedComm(comm, checks_calls=True)
    instrumented.barrier()
    x = torch.arange(4.0) + comm.rank
    with pytest.raises(RanksDisagreeError) as caught:
        (odd if comm.rank == last else usual)(instrumented, x)
    head, *table = str(caught.value).splitlines()
    assert head == f"{comm.name}: the ranks do not make the same call:"
    rest = "rank 0" if last == 1 else f"ranks {', '.join(map(str, range(last)))}"
    assert len(table) == 2
    assert f"  {rest}: call 2: {usual_call} (code outside mpilm)" in table
    assert any(line.startswith(f"  rank {last}: call 2: {odd_call}") for line in table)
    assert torch.equal(x, torch.arange(4.0) + comm.rank)
    assert comm.all_gather_json(comm.rank) == list(range(comm.size))


def check_unequal_counts_are_named(comm: Comm) -> None:
    """Check counts of an all-to-all, which differ between ranks by design: each pair is compared."""
    last, instrumented = comm.size - 1, InstrumentedComm(comm, checks_calls=True)
    sends = [1] * comm.size
    receives = [1] * last + [2] if comm.rank == last else sends
    out = torch.zeros(sum(receives))
    message = re.escape(f"all_to_all brings rank {last} {sends} elements, it expects {[1] * last + [2]}")
    with pytest.raises(RanksDisagreeError, match=message):
        instrumented.all_to_all(torch.ones(comm.size), out, sends, receives)
    assert not out.any()
