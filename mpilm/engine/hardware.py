"""The hardware of this rank: its device, its cores and threads, and its peak FLOP rate."""

import importlib.metadata
import os
import platform
import time
import timeit
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

import mpilm
from mpilm.comm.base import Comm
from mpilm.config.schema import Config, ParallelConfig, TrainConfig, resolve_config
from mpilm.config.settings import override
from mpilm.data.files import hex_digest
from mpilm.engine.core_binding import allowed_cores, bind_cores
from mpilm.errors import ConfigError
from mpilm.kernels.base import Kernels
from mpilm.kernels.fused import choose_kernels, make_kernels, use_kernels
from mpilm.model.families import build_model
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.compile import require_compiler

GPU_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # FLOP/s of 16-bit types
GPU_TYPES = ("cuda", "xpu")  # as torch names them; auto takes the first that it finds
PROBE_SIZE = 768  # of the timed matrix product: it takes little time, yet keeps the units busy


@dataclass(frozen=True)
class Hardware:
    """The resources of one rank."""

    device: torch.device
    threads: int
    oversubscribed: bool  # the node has more ranks than cores, so a waiting rank must not spin
    compiles: bool = False  # uses torch.compile
    kernels: str = "torch"  # "fused" or "torch"
    cores: Fraction = Fraction(1)  # cores per rank
    bound_to: str = ""  # cores of its own, to which detect_hardware has bound it


def detect_hardware(train: TrainConfig, world: Comm, bind: bool = True) -> Hardware:
    """Return the resources of this rank, and configure torch. `bind`: give ranks that share cores a slice each. Collective."""
    node = world.split_node()
    cores = cores_per_rank(node)
    threads = train.threads or parse_omp_threads(os.environ.get("OMP_NUM_THREADS", "")) or max(1, int(cores))
    torch.set_num_threads(threads)
    device = choose_device(train.device, node)
    if train.compile:
        require_compiler()
    # Before torch starts threads, which inherit the binding.
    bound_to = bind_cores(node, threads) if bind and device.type == "cpu" else ""
    kernels = make_kernels(train, device)
    if node.rank > 0:
        node.barrier()
    try:
        _load_libraries(device, kernels, train.dtype)
    finally:
        if node.rank == 0:  # numba keeps what it has compiled on disk: the first rank of a node compiles for all
            node.barrier()
    return Hardware(device, threads, cores < 1, train.compile, choose_kernels(train, device), cores, bound_to)


def cores_per_rank(node: Comm) -> Fraction:
    """Return the cores that this rank has among the ranks of its node. Collective over `node`."""
    affinities = node.all_gather_json(allowed_cores())
    return fair_share(affinities, node.rank, _read_cgroup_cores(Path("/sys/fs/cgroup/cpu.max")))


def parse_omp_threads(value: str) -> int:
    """Return the threads that OMP_NUM_THREADS asks for (the first of a list), or 0 for none; raise ConfigError."""
    first = value.split(",")[0].strip()
    if first and not (first.isdigit() and len(first) < 5 and int(first) > 0):  # torch cannot start 10,000
        advice = "write for example OMP_NUM_THREADS=1 or unset it"
        raise ConfigError(f"OMP_NUM_THREADS={value} is not a number of threads; {advice}")
    return int(first or 0)


def _load_libraries(device: torch.device, kernels: Kernels, dtype: str) -> None:
    """Make torch load its math libraries, and numba compile kernels, so that the program's own memory is known before the model
    is allocated."""
    shape = resolve_config(override(Config(), model__n_layers=1)).model
    model = build_model(shape, vocab_size=128).to(device)
    for parameter in model.parameters():
        parameter.data.zero_()
    tokens = torch.zeros(2, 128, dtype=torch.int64, device=device)
    use_kernels(model, kernels)
    with make_autocast(dtype, device)():
        loss = kernels.loss_sum(model(tokens, SequenceInfo(tokens[0])), tokens)
    loss.backward()


def fair_share(affinities: list[list[int]], rank: int, limit: float) -> Fraction:
    """Return a rank's share of cores that several may use. `limit`: cores of all ranks of the node (a cgroup's quota)."""
    users = {core: sum(core in other for other in affinities) for core in affinities[rank]}
    share = sum((Fraction(1, n) for n in users.values()), Fraction(0))
    return min(share, Fraction(limit).limit_denominator(1000) / len(affinities)) if limit < 1e6 else share


def _read_cgroup_cores(file: Path) -> float:
    """Return the cores that a container's quota allows; infinity without a quota."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return float("inf")


def choose_device(setting: str, node: Comm) -> torch.device:
    """Return this rank's device of the type that train.device names: a GPU, assigned round-robin within the node, or the CPU.
    Raises ConfigError."""
    kind, _, number = setting.partition(":")
    if setting == "auto":
        kind = next((each for each in GPU_TYPES if torch.get_device_module(each).is_available()), "cpu")
    if kind not in ("cpu", *GPU_TYPES):
        raise ConfigError(f"--train.device {setting}: no such type of device; write cpu, cuda (NVIDIA, AMD) or xpu (Intel)")
    if number:
        raise ConfigError(f"--train.device {setting}: the ranks of a node take its devices in turn; write {kind}")
    if kind == "cpu":
        return torch.device("cpu")
    gpus = torch.get_device_module(kind)
    if not gpus.is_available():
        raise ConfigError(f"--train.device {kind}: torch sees no GPU here; write cpu, or install a build of torch for {kind}")
    device = torch.device(kind, node.rank % gpus.device_count())
    gpus.set_device(device)  # before MPI touches a GPU: some libraries fail on any but the first
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    return processor_name() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def measure_peak_flops(hardware: Hardware, dtype: str) -> tuple[float | None, str]:
    """Return this rank's peak FLOP/s, or None if it is unknown, and its source: for a GPU the vendor's number, for a CPU the
    best of a few matrix products, timed by all ranks of a node at once, per second of its cores: ranks may share them."""
    if hardware.device.type != "cpu":
        name = device_name(hardware.device)
        known = next((peak for key, peak in GPU_PEAKS.items() if key in name), None) if dtype != "float32" else None
        return known, "the vendor's number"
    a, out = torch.ones(2, PROBE_SIZE, PROBE_SIZE, dtype=getattr(torch, dtype))
    fastest_s = min(timeit.repeat(lambda: torch.mm(a, a, out=out), timer=time.process_time, number=1, repeat=5))
    cores = min(hardware.threads, float(hardware.cores))
    return cores * 2 * PROBE_SIZE**3 / fastest_s, f"a product of {PROBE_SIZE} x {PROBE_SIZE} matrices, measured at the start"


def software_versions(world: Comm) -> dict[str, str]:
    """Return the versions of the programs in use, and the processor."""
    programs = {"mpilm": mpilm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return programs | {"mpi": world.mpi_library, "processor": processor_name()}


def software_fingerprint(world: Comm) -> dict[str, str]:
    """Return what must be equal on all ranks: library versions, and a digest of the source, of which nodes may have copies."""
    files = sorted(Path(mpilm.__file__).parent.rglob("*.py"))
    source = hex_digest(*(part for path in files for part in (path.name.encode(), path.read_bytes())))
    versions = software_versions(world)
    try:
        numba = importlib.metadata.version("numba")  # which makes the fused kernels
    except importlib.metadata.PackageNotFoundError:
        numba = "not installed"
    return {"source": source[:12], "numba": numba, **{name: versions[name] for name in ("mpilm", "torch", "mpi")}}


def describe_program(world: Comm) -> str:
    """Return digest of the source and version of torch, as a certificate names them: equal with every MPI library."""
    return f"{software_fingerprint(world)['source']}, torch {torch.__version__}"


def numerics_environment(hardware: Hardware, world: Comm, parallel: ParallelConfig) -> dict[str, str]:
    """Return what may change the last bits of a result although no setting that decides it has changed."""
    settings = {"threads": str(hardware.threads), "device": hardware.device.type, "compile": str(hardware.compiles).lower()}
    settings["kernels"] = hardware.kernels
    exchange = f"compressed to rank {parallel.powersgd_rank}" if parallel.powersgd_rank else parallel.wire_dtype
    if parallel.sync_every:
        exchange = f"apart for {parallel.sync_every} steps"  # stored in trainer.json, where 0.1.0 wrote these words
    return software_versions(world) | settings | {"exchange": exchange}


def processor_name() -> str:
    """Return the processor's name and the vector instructions torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
