"""The checks of the doctor: versions, cores, messages against known answers, their speed, clocks and shared memory."""

import os
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mpilm.comm.base import OPS, REDUCIBLE, Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.shared_memory import SHM_FOLDER
from mpilm.doctor.measure import time_collective
from mpilm.engine.hardware import cores_per_rank, software_versions
from mpilm.errors import RanksDisagreeError
from mpilm.formatting import count_noun, format_mebibytes
from mpilm.telemetry.trace import measure_clock_offset

SLOW = 3.0  # times the median of the ranks
SMALL_SHM_BYTES = 256 << 20
CLOCK_SKEW_S = 1.0
SLOW_LATENCY_S = 2e-4  # Ethernet takes a quarter of that


class CheckReport:
    """The outcome of the checks, printed on rank 0."""

    def __init__(self, comm: Comm):
        self.comm, self.failed, self.warnings = comm, list[str](), 0

    def print(self, label: str, text: str) -> None:
        if self.comm.rank == 0:
            print(f"{label:<12}{text}", flush=True)

    def warn(self, text: str) -> None:
        """Print something that is wrong although a job may run."""
        self.warnings += 1
        self.print("  warning", text)

    def check(self, label: str, passed: bool, detail: str = "") -> None:
        """Print and record a check that every rank has made for itself. Collective."""
        failed = [rank for rank, theirs in enumerate(self.comm.all_gather_json(bool(passed))) if not theirs]
        self.print(label, f"WRONG on ranks {failed}" if failed else f"ok{', ' * bool(detail)}{detail}")
        self.failed += [label] * bool(failed)


def run_checks(comm: Comm, nbytes: int) -> None:
    """Run every check, with messages of up to `nbytes`. Collective; raises CollectiveError (code 88) for wrong answers."""
    report = CheckReport(comm)
    _print_versions(report)
    node = _check_cores(report)
    report.comm = comm.with_options(gpu_aware=False, yield_while_waiting=cores_per_rank(node) < 1)
    _check_messages(report)
    _check_collectives(report, nbytes)
    if comm.size > 1:
        _measure_messages(report, nbytes)
        _check_clocks(report)
    _check_shared_memory(report, node)
    if report.failed:
        problem = f"this MPI gives wrong answers ({', '.join(report.failed)}): do not train with it"
        advice = "Try another MPI module, or the mpich wheel (pip install mpich); was mpi4py built for the library above?"
        raise CollectiveError(RanksDisagreeError(f"{problem}. {advice}"))
    warnings = f", with {count_noun(report.warnings, 'warning')}" if report.warnings else ""
    report.print("", f"all checks passed{warnings}")


def _print_versions(report: CheckReport) -> None:
    comm, software = report.comm, software_versions(report.comm)
    report.print("ranks", f"{comm.size}, on {_count_values(comm.all_gather_json(socket.gethostname()))}")
    report.print("library", f"{software['mpi']}{', ' * bool(comm.mpi_details)}{comm.mpi_details}")
    report.print("programs", f"python {software['python']}, torch {software['torch']}, mpilm {software['mpilm']}")
    for key in ("mpi", "torch", "python", "mpilm", "processor"):
        values = comm.all_gather_json(software[key])
        if len(set(values)) > 1:
            report.warn(f"ranks have different {key}: {_count_values(values)}; bits may differ from rank to rank")
    if comm.size == 1:
        option = " --allow-run-as-root" if software["mpi"].startswith("Open MPI") and os.getuid() == 0 else ""
        report.warn(f"only one rank: start with mpirun{option} -n 2 or more to check messages")


def _count_values(values: Sequence[str]) -> str:
    return ", ".join(f"{value} ({count})" if count > 1 else str(value) for value, count in Counter(values).items())


def _check_cores(report: CheckReport) -> Comm:
    """Print the cores of each rank, and return the communicator of this node. Collective."""
    node = report.comm.split_node()
    shares = report.comm.all_gather_json(float(cores_per_rank(node)))
    report.print("cores", f"{min(shares):.2g} .. {max(shares):.2g} a rank")
    if min(shares) < 1:
        report.warn("more ranks than cores: waiting ranks yield their core, which costs time; start fewer ranks for speed")
    bound = [tuple(theirs) for theirs in report.comm.all_gather_json([socket.gethostname(), *sorted(os.sched_getaffinity(0))])]
    if len(set(bound)) == len(bound) > 1 and all(len(cores) == 2 for cores in bound):
        report.warn("every rank is bound to one core: several threads a rank need another binding (Open MPI: --bind-to none)")
    return node


def _check_messages(report: CheckReport) -> None:
    comm, ranks = report.comm, torch.arange(report.comm.size).repeat_interleave(3).float()
    previous, following = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    received, sent = torch.empty(1000), torch.full((1000,), float(comm.rank))
    for request in (comm.irecv(received, previous), comm.isend(sent, following)):
        request.wait()
    report.check("ring", bool((received == previous).all()))
    out = torch.empty(comm.size * 3)
    comm.all_to_all(ranks + 100 * comm.rank, out)
    report.check("all to all", torch.equal(out, comm.rank + 100 * ranks))


def _check_collectives(report: CheckReport, nbytes: int) -> None:
    comm, n = report.comm, report.comm.size
    passed = True
    for dtype in REDUCIBLE:
        for count in (1, 1000, nbytes // 64):
            base = torch.arange(count).remainder(1000).to(dtype)
            expected = {"sum": n * base + n * (n - 1) // 2, "max": base + n - 1, "min": base}
            for op in OPS:
                x = base + comm.rank
                comm.all_reduce(x, op)
                passed = passed and torch.equal(x, expected[op])
    report.check("reduce", passed, f"{len(REDUCIBLE)} dtypes, {len(OPS)} operations")
    mine, gathered = torch.full((1001,), comm.rank, dtype=torch.bfloat16), torch.empty(1001 * n, dtype=torch.bfloat16)
    comm.all_gather(mine, gathered)
    report.check("gather", torch.equal(gathered, torch.arange(n).repeat_interleave(1001).to(torch.bfloat16)))
    passed = True
    for root in range(n):
        x = torch.arange(5000) * (comm.rank == root)
        comm.broadcast(x, root)
        passed = passed and torch.equal(x, torch.arange(5000))
    report.check("broadcast", passed)


def _measure_messages(report: CheckReport, nbytes: int) -> None:
    comm = report.comm
    latencies = [_one_way_s(comm, peer, torch.empty(1), 20) for peer in range(1, comm.size)]
    rates = [nbytes / _one_way_s(comm, peer, torch.empty(nbytes // 4), 1) for peer in range(1, comm.size)]
    report.print("latency", f"{1e6 * min(latencies):.1f} .. {1e6 * max(latencies):.1f} us between rank 0 and the others")
    report.print("bandwidth", f"{min(rates) / 1e9:.2f} .. {max(rates) / 1e9:.2f} GB/s, messages of {format_mebibytes(nbytes)}")
    if max(latencies) > SLOW_LATENCY_S:
        slowest = 1 + latencies.index(max(latencies))
        advice = "end other programs here, ask for whole nodes (sbatch --exclusive), start no more ranks than cores"
        report.warn(f"messages to rank {slowest} take long: {advice}; between nodes, check that MPI uses the fast network")
    for peer, rate in enumerate(rates, 1):
        slower = statistics.median(rates) / rate
        if slower > SLOW:
            report.warn(f"messages between rank 0 and rank {peer} are {slower:.1f} times slower than most")
    for size in sorted({4096, 1 << 20, nbytes}):
        x = torch.zeros(size // 4)
        seconds = time_collective(comm, comm, lambda x=x: comm.all_reduce(x))  # type: ignore[misc]
        bus = 2 * (comm.size - 1) / comm.size * size / seconds / 1e9
        report.print("all reduce", f"{size:>12,} bytes: {1e6 * seconds:,.0f} us, {bus:.2f} GB/s on the bus")


def _one_way_s(comm: Comm, peer: int, x: Tensor, rounds: int) -> float:
    """Return the seconds of a message between rank 0 and another. Collective."""

    def ping_pong() -> None:
        for _ in range(rounds):
            if comm.rank == 0:
                comm.isend(x, peer).wait()
                comm.irecv(x, peer).wait()
            elif comm.rank == peer:
                comm.irecv(x, 0).wait()
                comm.isend(x, 0).wait()

    return time_collective(comm, comm, ping_pong, 3) / (2 * rounds)


def _check_clocks(report: CheckReport) -> None:
    """Print the largest difference between the clocks of nodes, as well as messages can measure it."""
    offsets = [-ahead_s for ahead_s in report.comm.all_gather_json(measure_clock_offset(report.comm, time.time).ahead_s)]
    rank, skew_s = max(enumerate(offsets), key=lambda pair: abs(pair[1]))
    report.print("clocks", f"at most {1000 * abs(skew_s):.1f} ms apart")
    if abs(skew_s) > CLOCK_SKEW_S:
        report.warn(f"the clock of rank {rank} is off by {skew_s:.1f} s; logs and traces will mislead")


def _check_shared_memory(report: CheckReport, node: Comm) -> None:
    """Check the memory in which the ranks of a node sum gradients."""
    parts, passed = node.allocate_shared(1000), True
    if parts is not None:
        parts[node.rank].fill_(node.rank + 1)
        node.barrier()
        passed = all(bool((part[:1000] == rank + 1).all()) for rank, part in enumerate(parts))
        node.barrier()
    report.check("shared", passed, "none: gradients are sent" if parts is None else f"{node.size} ranks on the node of rank 0")
    if os.path.isdir(SHM_FOLDER):
        free = min(report.comm.all_gather_json(shutil.disk_usage(SHM_FOLDER).free))
        report.print(SHM_FOLDER, f"{format_mebibytes(free)} free")
        if free < SMALL_SHM_BYTES:
            problem = "is small (a container has 64 MiB by default), and MPI itself may die there of SIGBUS"
            report.warn(f"{SHM_FOLDER} {problem}: enlarge it (docker: --shm-size 2g)")
