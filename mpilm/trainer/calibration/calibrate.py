"""A machine, measured.

All ranks measure at the same time, since those of one node share its memory and its clock; then the first rank of each node
measures alone, with all its cores. What is measured of a rank is the median over the calls; of the ranks, the median.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.config import Config, Model, Train, resolve
from mpilm.engine.hardware import cores_per_rank, detect_hardware, software_versions
from mpilm.engine.step import train_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import ConfigError, FileError
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import saved_floats_per_token
from mpilm.parallel.flat_layout import ALIGNMENT
from mpilm.planner.cost import Setting, step_time
from mpilm.planner.machine import FORMAT, Compute, Curve, Machine
from mpilm.telemetry.memory import MemoryMeter as InUse
from mpilm.trainer.calibration.bench import Bench
from mpilm.trainer.calibration.compute import computing
from mpilm.trainer.calibration.network import across, network
from mpilm.verification.layouts import RandomTokens

TRAINED, SMALL_VOCABULARY = ((128, 128), (512, 192), (1024, 512)), 2048  # tokens and width of models that are trained
DISK_BYTES = 128 << 20


def calibrate(comm: Comm, device: str) -> Machine:
    """Measure this machine with these ranks. Collective."""
    used = detect_hardware(Train(device=device), comm, bind=False)  # type: ignore[arg-type] # one rank alone measures all cores
    comm = comm.with_options(gpu_aware=False, yield_while_waiting=used.oversubscribed)
    node = comm.split_node()
    sizes = comm.all_gather_json(node.size)
    if len(set(sizes)) > 1:
        raise CollectiveError(ConfigError(
            f"nodes have {min(sizes)} to {max(sizes)} ranks: start the same number on each, as many as a job will have"
        ))  # fmt: skip
    program = InUse(used.device).program_bytes
    cores = round(sum(node.all_gather_json(float(cores_per_rank(node)))))
    bench = Bench(comm, node, used.device, _progress(comm))
    compute, memory = computing(bench, used.threads, node.size)
    alone = replace(bench, comm=comm.with_options(gpu_aware=False, yield_while_waiting=True), alone=True)
    if node.size > 1 and used.device.type == "cpu":
        with _threads(cores if node.rank == 0 else 1):
            more, also = computing(alone, cores, 1)
        compute, memory = [*compute, *more], [*memory, *also]
    found = Machine(
        format=FORMAT, made=time.strftime("%Y-%m-%d %H:%M"), device=used.device.type,
        **{name: said for name, said in software_versions(comm).items() if name in ("mpilm", "torch", "processor", "mpi")},
        nodes=comm.size // node.size, ranks_per_node=node.size, gpus=max(1, _gpus(used.device)), cores=max(1, cores),
        memory_bytes=_memory_bytes(used.device), program_bytes=max(comm.all_gather_json(program)),
        compute=tuple(compute), memory=tuple(memory), within=network(bench, node), across=across(bench, comm, node),
        write_bandwidth=_disk(bench), step_s=1e-9,
    )  # fmt: skip
    corrected = []
    for rates in found.compute:
        mine = bench if rates.ranks == node.size else alone
        with _threads(rates.threads if mine is bench or node.rank == 0 else 1):
            corrected.append(replace(rates, training=_training(mine, found, rates)))
    found = replace(found, compute=tuple(corrected))
    return replace(found, step_s=_step_s(bench, found))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def _progress(comm: Comm) -> Callable[[str], None]:
    return (lambda text: print(f"  measuring {text}", file=sys.stderr, flush=True)) if comm.rank == 0 else lambda text: None


def _gpus(device: torch.device) -> int:
    """Of a node, that its ranks share."""
    return torch.cuda.device_count() if device.type == "cuda" else 0


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def _training(bench: Bench, machine: Machine, rates: Compute) -> Curve:
    """Whole steps of a small model on every rank by itself, against the sum of their parts."""
    bench.progress(f"steps in {rates.dtype}, {rates.ranks} rank{'s' * (rates.ranks > 1)} a node")
    points = []
    for tokens, width in TRAINED:
        config = _small(tokens, width, rates.dtype)
        setting = Setting(config, SMALL_VOCABULARY, machine, MeshShape(), rates.ranks, (config.model.n_layers,))
        said, step = step_time(setting), _step_of(config, bench.device, SelfComm("alone"))
        took_s = bench.seconds(step)
        kept = tokens * saved_floats_per_token(config.model, rates.dtype)
        points.append((kept, max(0.5, (took_s - said.update_s) / said.compute_s)))
    return tuple(points)


def _small(tokens: int, width: int, dtype: str, batch: int = 2) -> Config:
    """A model of a few blocks; `batch`: microbatches."""
    shape = Model(n_layers=3, n_heads=max(1, width // 64), d_model=width, context_length=min(tokens, 256))
    rows = max(1, tokens // shape.context_length)
    train = Train(global_batch=batch * rows, micro_batch=rows, dtype=dtype)  # type: ignore[arg-type]
    return resolve(Config(model=shape, train=train))


def _step_of(config: Config, device: torch.device, comm: Comm) -> Callable[[], object]:
    mesh = Mesh.build(MeshShape(data=comm.size), comm)
    model = TrainModel(config, mesh, (config.model.n_layers,), SMALL_VOCABULARY, device, ALIGNMENT)
    model.init_parameters()
    source, steps = RandomTokens(config, SMALL_VOCABULARY), iter(range(1 << 30))
    return lambda: train_step(model, source, next(steps))


def _disk(bench: Bench) -> float:
    """Bytes a second that rank 0 writes here, and has on the disk. Collective; raises AgreedError."""
    bench.progress("the disk")

    def write() -> float:
        data = torch.randint(0, 255, (DISK_BYTES,), dtype=torch.uint8, device="cpu").numpy().tobytes()
        try:
            with tempfile.TemporaryFile(dir=".", buffering=0) as file:
                start_s = time.perf_counter()
                file.write(data)
                os.fsync(file.fileno())
                return DISK_BYTES / (time.perf_counter() - start_s)
        except OSError as error:
            raise FileError(f"the folder here cannot be written, to measure the disk: {error.strerror}") from None

    return float(bench.comm.broadcast_json(run_on_root(bench.comm, write)))


def _step_s(bench: Bench, machine: Machine) -> float:
    """What a step of a very small model takes that is not explained: Python, and small messages. Collective."""
    bench.progress("a whole step")
    ranks = bench.comm.size
    config = _small(32, 64, "float32", batch=ranks)
    took_s = bench.collective_s(_step_of(config, bench.device, bench.comm), bench.comm, 20)
    shape, cut = MeshShape(data=ranks), (config.model.n_layers,)
    said = step_time(Setting(config, SMALL_VOCABULARY, machine, shape, machine.ranks_per_node, cut)).total_s
    return max(0.05 * took_s, took_s - said)
