"""What this rank has to compute with: device, threads, and whether ranks must share cores."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

import mpilm
from mpilm.comm.base import Comm
from mpilm.config import Config, Model, Parallel, Train, resolve
from mpilm.data.files import hex_digest
from mpilm.errors import ConfigError
from mpilm.model.families import build
from mpilm.model.loss import loss_sum
from mpilm.model.rows import Rows
from mpilm.parallel.compiled import require_compiler

GPU_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bfloat16, FLOP/s
PRODUCT = 768  # small enough to be gone at once, large enough for the units to be busy
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")  # by which a user says where threads belong


@dataclass(frozen=True)
class Machine:
    """`crowded`: the node has more ranks than cores, so that a rank that waits must not spin. `compiles`: torch.compile.
    `cores`: that this rank has for itself. `bound`: whether it keeps to them because `look` has told it so."""

    device: torch.device
    threads: int
    crowded: bool
    compiles: bool = False
    cores: Fraction = Fraction(1)
    bound: bool = False


def look(train: Train, world: Comm, bind: bool = True) -> Machine:
    """What this rank may use, and torch told so. `bind`: keep to a part of the node's cores where ranks have them in common.
    Collective."""
    node = world.split_node()
    share = cores_of(node)
    asked = train.threads or asked_by_environment(os.environ.get("OMP_NUM_THREADS", ""))
    threads = asked or max(1, int(share))
    torch.set_num_threads(threads)
    device = choose_device(train.device, node)
    if train.compile:
        require_compiler()
    bound = bind and device.type == "cpu" and _bind(node, threads)  # before torch makes threads: they inherit it
    _load_libraries(device)
    return Machine(device, threads, crowded=share < 1, compiles=train.compile, cores=share, bound=bound)


def cores_of(node: Comm) -> Fraction:
    """The cores that this rank has for itself among the ranks of its node. Collective over them."""
    affinities = node.all_gather_json(_cores())
    return core_share(affinities, node.rank, _cgroup_cores(Path("/sys/fs/cgroup/cpu.max")))


def _bind(node: Comm, threads: int) -> bool:
    """Keep this rank, and the threads that it will make, to its own cores; returns whether that was done. Collective."""
    said = node.all_gather_json([os.getpid(), sorted(_cores(), key=_place)])
    processes, affinities = {process for process, _ in said}, [cores for _, cores in said]
    mine = own_cores(affinities, node.rank, threads)
    if not mine or len(processes) < node.size or any(name in os.environ for name in BINDING):
        return False
    with contextlib.suppress(OSError, AttributeError):  # a sandbox, or macOS
        os.sched_setaffinity(0, mine)
        return True
    return False


def own_cores(affinities: Sequence[Sequence[int]], rank: int, threads: int) -> Sequence[int]:
    """An even part of the cores that all ranks of a node may use; none where the launcher has told ranks apart, where there is
    one, or where the parts are too small for a rank's threads. `affinities`: neighbours in the machine are neighbours."""
    cores, size = affinities[rank], len(affinities)
    if size == 1 or len(cores) // size < threads or any(theirs != cores for theirs in affinities):
        return []
    return cores[rank * len(cores) // size : (rank + 1) * len(cores) // size]


def _place(core: int) -> list[int]:
    """By which cores are sorted into neighbours: those of a socket, and of them those that are two halves of one."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return [int((topology / name).read_text()) for name in ("physical_package_id", "core_id")]
    except (OSError, ValueError):
        return []


def asked_by_environment(value: str) -> int:
    """The threads OMP_NUM_THREADS asks for (the first of a list), 0 for none; raises ConfigError."""
    first = value.split(",")[0].strip()
    if first and not (first.isdigit() and int(first) > 0):
        raise ConfigError(
            f"OMP_NUM_THREADS={value} is not a number of threads; write for example OMP_NUM_THREADS=1 or unset it"
        )
    return int(first or 0)


def _load_libraries(device: torch.device) -> None:
    """Make torch load its mathematics, so that what the program itself takes is known before the model is there."""
    model = build(resolve(Config(model=Model(n_layers=1, n_heads=4, d_model=128, context_length=128))).model, 128).to(device)
    for parameter in model.parameters():
        parameter.data.zero_()
    tokens = torch.zeros(2, 128, dtype=torch.int64, device=device)
    loss_sum(model(tokens, Rows(tokens[0])), tokens).backward()


def _cores() -> list[int]:
    """The numbers of the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS binds nothing


def core_share(affinities: list[list[int]], rank: int, limit: float) -> Fraction:
    """The cores a rank has for itself when each core is shared equally by the ranks of the node that may use it.

    `limit`: cores that the whole node's ranks may use together (a cgroup's quota).
    """
    users = {core: sum(core in theirs for theirs in affinities) for core in affinities[rank]}
    share = sum((Fraction(1, n) for n in users.values()), Fraction(0))
    return min(share, Fraction(limit).limit_denominator(1000) / len(affinities)) if limit < 1e6 else share


def _cgroup_cores(file: Path) -> float:
    """Cores a container's quota allows; infinitely many where there is none."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return float("inf")


def choose_device(setting: str, node: Comm) -> torch.device:
    """The GPU of this rank, dealt in turn to the ranks of a node, or the CPU. Raises ConfigError when there is no GPU."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--train.device cuda: torch sees no GPU here; write cpu, or install a CUDA build of torch")
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", node.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # before MPI touches a GPU: some libraries fail on any other than the first
    return device


def peak_flops(device: torch.device, dtype: str) -> tuple[float | None, str]:
    """FLOP/s that this rank could reach at most, and where that is known from: of a GPU its maker's number, of a CPU the best
    of some matrix products, which all ranks of a node should make at the same time. None where neither is known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for key, peak in GPU_PEAKS.items() if key in name), None) if dtype == "bfloat16" else None
        return known, "the maker's number"
    a = torch.ones(PRODUCT, PRODUCT, dtype=getattr(torch, dtype))
    out, times = torch.empty_like(a), []
    for _ in range(5):
        start_s = time.perf_counter()
        torch.mm(a, a, out=out)
        times.append(time.perf_counter() - start_s)
    return 2 * PRODUCT**3 / min(times), f"a product of {PRODUCT} x {PRODUCT} matrices, measured at the start"


def versions(world: Comm) -> dict[str, str]:
    """The programs and the processor in use."""
    return {
        "mpilm": mpilm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mpi": world.mpi_library,
        "processor": processor(),
    }


def programs(world: Comm) -> dict[str, str]:
    """What ranks must have the same of: libraries, and the source of this package, of which nodes may have copies."""
    files = sorted(Path(mpilm.__file__).parent.rglob("*.py"))
    source = hex_digest(*(part for path in files for part in (path.name.encode(), path.read_bytes())))
    found = versions(world)
    return {"source": source[:12], **{name: found[name] for name in ("mpilm", "torch", "mpi")}}


def conditions(machine: Machine, world: Comm, parallel: Parallel) -> dict[str, str]:
    """What may change the last bits of a result though no setting that it depends on has changed."""
    return {
        **versions(world), "threads": str(machine.threads), "device": machine.device.type,
        "compile": str(machine.compiles).lower(), "exchange": _exchange(parallel),
    }  # fmt: skip


def _exchange(parallel: Parallel) -> str:
    """What travels of gradients."""
    if parallel.sync_every:
        return f"apart for {parallel.sync_every} steps"
    return f"compressed to rank {parallel.compress}" if parallel.compress else parallel.wire_dtype


def processor() -> str:
    """The processor's name and the vector instructions torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
