"""The doctor command: what the ranks are, whether messages arrive as they were sent, how fast, and what is amiss."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from mpilm.comm.base import OPS, REDUCIBLE, Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.shared_memory import SHM_FOLDER
from mpilm.engine.hardware import cores_per_rank, software_versions
from mpilm.errors import RanksDisagreeError
from mpilm.formatting import format_mebibytes

ROUNDS = 20
SLOW = 3.0  # times the median of the ranks
SMALL_SHM = 256 << 20
CLOCK_S = 1.0


class Examination:
    """Prints what is found, on rank 0, and keeps what is wrong."""

    def __init__(self, comm: Comm):
        self.comm, self.wrong = comm, list[str]()

    def say(self, what: str, text: str) -> None:
        if self.comm.rank == 0:
            print(f"{what:<12}{text}", flush=True)

    def mind(self, text: str) -> None:
        """Something that is amiss, though a job may run."""
        self.say("  mind", text)

    def check(self, what: str, mine: bool, text: str = "") -> None:
        """One check, which every rank has made for itself. Collective."""
        failed = [rank for rank, passed in enumerate(self.comm.all_gather_json(bool(mine))) if not passed]
        self.say(what, f"ok{', ' * bool(text)}{text}" if not failed else f"WRONG on ranks {failed}")
        if failed:
            self.wrong.append(what)


def examine(comm: Comm, nbytes: int) -> None:
    """Every check in turn. Collective; raises AgreedError (code 88) where an answer is wrong."""
    told = Examination(comm)
    _who(told)
    node = _cores(told)
    comm = told.comm = comm.with_options(gpu_aware=False, yield_while_waiting=cores_per_rank(node) < 1)
    _messages(told)
    _collectives(told, nbytes)
    _speed(told, nbytes)
    _clocks(told)
    _shared(told, node)
    if told.wrong:
        raise CollectiveError(RanksDisagreeError(
            f"this MPI gives wrong answers ({', '.join(told.wrong)}): do not train with it. Another MPI module, or the mpich "
            "wheel (pip install mpich), may do; is mpi4py built for the library above?"
        ))  # fmt: skip
    told.say("", "all answers were right")


def _who(told: Examination) -> None:
    found = software_versions(told.comm)
    told.say("ranks", f"{told.comm.size}, on {_counted(told.comm.all_gather_json(socket.gethostname()))}")
    told.say("library", f"{found['mpi']}{', ' * bool(told.comm.mpi_details)}{told.comm.mpi_details}")
    told.say("programs", f"python {found['python']}, torch {found['torch']}, mpilm {found['mpilm']}")
    for key in ("mpi", "torch", "python", "mpilm", "processor"):
        everyone = told.comm.all_gather_json(found[key])
        if len(set(everyone)) > 1:
            told.mind(f"ranks have different {key}: {_counted(everyone)}; bits may differ from rank to rank")
    if told.comm.size == 1:
        told.mind("one rank only: start with mpirun -n 2 or more to examine messages")


def _counted(values: list[str]) -> str:
    return ", ".join(f"{value} ({count})" if count > 1 else str(value) for value, count in Counter(values).items())


def _cores(told: Examination) -> Comm:
    node = told.comm.split_node()
    shares = told.comm.all_gather_json(float(cores_per_rank(node)))
    told.say("cores", f"{min(shares):.2g} .. {max(shares):.2g} a rank")
    if min(shares) < 1:
        told.mind("more ranks than cores: ranks that wait give their core away, which costs time; start fewer for speed")
    bound = told.comm.all_gather_json([socket.gethostname(), *sorted(os.sched_getaffinity(0))])
    if len(bound) > 1 and len({tuple(theirs) for theirs in bound}) == len(bound) and all(len(theirs) == 2 for theirs in bound):
        told.mind(
            "every rank is bound to one core: for several threads a rank say so to the launcher (Open MPI: --bind-to none)"
        )
    return node


def _messages(told: Examination) -> None:
    """A ring, and everybody to everybody."""
    comm = told.comm
    got, sent = torch.empty(1000), torch.full((1000,), float(comm.rank))
    requests = [comm.irecv(got, (comm.rank - 1) % comm.size), comm.isend(sent, (comm.rank + 1) % comm.size)]
    for request in requests:
        request.wait()
    told.check("ring", bool((got == (comm.rank - 1) % comm.size).all()))
    out, parts = torch.empty(comm.size * 3), torch.arange(comm.size).repeat_interleave(3).float() + 100 * comm.rank
    comm.all_to_all(parts, out)
    told.check("all to all", torch.equal(out, comm.rank + 100 * torch.arange(comm.size).repeat_interleave(3).float()))


def _collectives(told: Examination, nbytes: int) -> None:
    comm, n = told.comm, told.comm.size
    expected = {"sum": lambda x: n * x + n * (n - 1) // 2, "max": lambda x: x + n - 1, "min": lambda x: x}
    right = True
    for dtype in REDUCIBLE:
        for op in OPS:
            for count in (1, 1000, nbytes // 64):
                base = torch.arange(count).remainder(1000).to(dtype)
                x = base + comm.rank
                comm.all_reduce(x, op)
                right = right and torch.equal(x, expected[op](base))
    told.check("reduce", right, f"{len(REDUCIBLE)} dtypes, {len(OPS)} operations")
    mine, every = torch.full((1001,), comm.rank, dtype=torch.bfloat16), torch.empty(1001 * n, dtype=torch.bfloat16)
    comm.all_gather(mine, every)
    told.check("gather", torch.equal(every, torch.arange(n).repeat_interleave(1001).to(torch.bfloat16)))
    right = True
    for root in range(n):
        x = torch.arange(5000) * (comm.rank == root)
        comm.broadcast(x, root)
        right = right and torch.equal(x, torch.arange(5000))
    told.check("broadcast", right)


def _speed(told: Examination, nbytes: int) -> None:
    comm = told.comm
    if comm.size == 1:
        return
    latencies = [_ping_s(comm, peer, torch.empty(1), ROUNDS) for peer in range(1, comm.size)]
    rates = [nbytes / _ping_s(comm, peer, torch.empty(nbytes // 4), 3) for peer in range(1, comm.size)]
    told.say("latency", f"{1e6 * min(latencies):.1f} .. {1e6 * max(latencies):.1f} us between rank 0 and the others")
    told.say("bandwidth", f"{min(rates) / 1e9:.2f} .. {max(rates) / 1e9:.2f} GB/s, messages of {format_mebibytes(nbytes)}")
    for peer, rate in enumerate(rates, 1):
        if rate < statistics.median(rates) / SLOW:
            told.mind(
                f"messages between rank 0 and rank {peer} are {statistics.median(rates) / rate:.1f} times slower than most"
            )
    for size in sorted({4096, 1 << 20, nbytes}):
        x = torch.zeros(size // 4)
        took_s = _median_s(lambda x=x: comm.all_reduce(x), comm)  # type: ignore[misc]
        bus = 2 * (comm.size - 1) / comm.size * size / took_s / 1e9
        told.say("all reduce", f"{size:>12,} bytes: {1e6 * took_s:,.0f} us, {bus:.2f} GB/s on the bus")


def _ping_s(comm: Comm, peer: int, x: Tensor, rounds: int) -> float:
    """Seconds of one way between rank 0 and another, the median of some rounds; known to all ranks. Collective."""
    times = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        if comm.rank == 0:
            comm.isend(x, peer).wait()
            comm.irecv(x, peer).wait()
        elif comm.rank == peer:
            comm.irecv(x, 0).wait()
            comm.isend(x, 0).wait()
        times.append((time.perf_counter() - start_s) / 2)
    return float(comm.broadcast_json(statistics.median(times)))


def _median_s(action: Callable[[], None], comm: Comm) -> float:
    times = []
    for _ in range(5):
        comm.barrier()
        start_s = time.perf_counter()
        action()
        times.append(time.perf_counter() - start_s)
    return float(comm.broadcast_json(statistics.median(times)))


def _clocks(told: Examination) -> None:
    """How far the ranks' clocks are apart, as well as messages can tell."""
    comm = told.comm
    offsets = []
    for peer in range(1, comm.size):
        comm.barrier()
        sent_s = time.time()
        theirs = torch.zeros(1, dtype=torch.float64)
        if comm.rank == 0:
            comm.isend(theirs, peer).wait()
            comm.irecv(theirs, peer).wait()
        elif comm.rank == peer:
            comm.irecv(theirs, 0).wait()
            theirs[0] = time.time()
            comm.isend(theirs, 0).wait()
        offsets.append(float(theirs) - (sent_s + time.time()) / 2)
    offsets = comm.broadcast_json(offsets)
    if offsets:
        furthest = max(offsets, key=abs)
        told.say("clocks", f"at most {1000 * abs(furthest):.1f} ms apart")
        if abs(furthest) > CLOCK_S:
            told.mind(
                f"the clock of rank {offsets.index(furthest) + 1} is off by {furthest:.1f} s; logs and traces will mislead"
            )


def _shared(told: Examination, node: Comm) -> None:
    """Memory that the ranks of a node have together, for the sum of gradients."""
    parts = node.allocate_shared(1000)
    right = True
    if parts is not None:
        parts[node.rank].fill_(node.rank + 1)
        node.barrier()
        right = all(bool((part[:1000] == rank + 1).all()) for rank, part in enumerate(parts))
        node.barrier()
    told.check("shared", right, f"{node.size} ranks on the node of rank 0" if parts is not None else "none: gradients are sent")
    if os.path.isdir(SHM_FOLDER):
        free = min(told.comm.all_gather_json(shutil.disk_usage(SHM_FOLDER).free))
        told.say(SHM_FOLDER, f"{format_mebibytes(free)} free")
        if free < SMALL_SHM:
            told.mind(
                f"{SHM_FOLDER} is small (a container's default is 64 MiB), and MPI itself may die there of SIGBUS: enlarge it, for "
                "docker with --shm-size 2g"
            )


def drill(comm: Comm) -> None:
    """Kill the last rank while the others wait for it. Collective; does not return."""
    if comm.rank == 0:
        said = f"rank {comm.size - 1} is killed; within seconds the job must be over, with a code other than 0"
        print(f"{'drill':<12}{time.strftime('%H:%M:%S')}: {said}", flush=True)
    comm.barrier()
    if comm.rank == comm.size - 1:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
