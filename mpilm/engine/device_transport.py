"""The way in which tensors of the compute device travel between ranks: MPI, or torch.distributed's process groups."""

from collections.abc import Callable, Mapping

import torch

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.process_groups import connect_process_groups, has_process_groups
from mpilm.config.schema import DeviceTransport
from mpilm.engine.hardware import Hardware
from mpilm.errors import ConfigError
from mpilm.parallel.reduce.build import time_collectives

TIMED_BYTES = 1 << 24  # that each rank sends in a timed exchange
ATTEMPTS = 4  # of which the first warms up
MPI_NAMES = {"mpi": "MPI", "gpu-aware-mpi": "GPU-aware MPI"}


def connect_devices(setting: DeviceTransport, world: Comm, hardware: Hardware, is_elastic: bool = False) -> Comm:
    """Return the ranks of `world` with the transport that train.device-transport names; auto: the fastest of those that work
    here. Collective; raises CollectiveError."""
    device, yields = hardware.device, hardware.oversubscribed
    by_mpi = world.with_options(gpu_aware=setting == "gpu-aware-mpi", yield_while_waiting=yields)
    kinds = sorted(set(world.all_gather_json(device.type)))
    if setting != "torch" and (setting != "auto" or "cpu" in kinds or world.size == 1):
        return by_mpi
    obstacles = [text for text in world.all_gather_json(find_obstacle(world, device, is_elastic)) if text]
    if len(kinds) > 1:
        obstacles = [f"the ranks compute on {' and '.join(kinds)}; name one of them with --train.device"]
    if setting == "torch":
        if obstacles:
            raise CollectiveError(ConfigError(f"--train.device-transport torch: {obstacles[0]}"))
        return _by_process_groups(by_mpi, device)
    candidates, note = {"mpi": by_mpi}, "".join(f"; {text}" for text in obstacles[:1])
    if all(world.all_gather_json(world.is_gpu_aware(device))):
        candidates["gpu-aware-mpi"] = world.with_options(gpu_aware=True, yield_while_waiting=yields)
    if not obstacles:
        try:
            candidates["torch"] = _by_process_groups(by_mpi, device)
        except CollectiveError as error:
            note = f"; {error}"
    return choose_fastest(candidates, device, note)


def find_obstacle(world: Comm, device: torch.device, is_elastic: bool) -> str:
    """Return why process groups cannot move the tensors of this rank's device; empty if they can. Collective."""
    node = world.split_node()
    if is_elastic:
        return "--fault.elastic true needs MPI for all messages: torch.distributed does not survive the loss of a rank"
    if not has_process_groups(device):
        return f"this build of torch has no torch.distributed for {device.type}"
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        used = node.all_gather_json(str(getattr(properties, "uuid", device.index)))
        if len(set(used)) < node.size:
            return "several ranks share a GPU, which NCCL and XCCL do not support; start one rank a GPU"
    return ""


def choose_fastest(candidates: Mapping[str, Comm], device: torch.device, note: str = "") -> Comm:
    """Return the communicator that exchanges tensors of `device` in the shortest time. Its description has the times of all,
    and `note`. Candidates that do not move every byte as the first does are left out. Collective."""
    first = next(iter(candidates.values()))
    usable = {name: comm for name, comm in candidates.items() if comm is first or _moves_equal_bytes(comm, first, device)}
    times = time_collectives(first, first, [_timed_exchange(comm, device) for comm in usable.values()], ATTEMPTS)
    seconds = dict(zip(usable, times[1:].amin(dim=0).tolist()))
    fastest = min(seconds, key=lambda name: seconds[name])
    timings = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in seconds.items())
    note += "".join(f"; {name} moved wrong bytes and is not used" for name in candidates if name not in usable)
    chosen = usable[fastest]
    described = chosen.inner if isinstance(chosen, InstrumentedComm) else chosen  # where instrument() reads it
    described.device_transport = f"{described.device_transport or MPI_NAMES[fastest]} ({timings}{note})"
    return chosen


def _moves_equal_bytes(comm: Comm, reference: Comm, device: torch.device) -> bool:
    """Return whether both communicators gather, exchange and broadcast the same bytes on all ranks. Collective."""
    rank, size = comm.rank, comm.size
    x = ((torch.arange(size * 257, device=device) * 37 + 11 * rank) % 251).to(torch.uint8)
    counts = [1 + 5 * each for each in range(size)]
    results = []
    for each in (comm, reference):
        even, uneven, exchanged, copied = x.new_zeros(size * 257), x.new_zeros(sum(counts)), torch.zeros_like(x), x.clone()
        each.all_gather(x[:257], even)
        each.all_gather(x[: counts[rank]], uneven, counts)
        each.all_to_all(x, exchanged)
        each.broadcast(copied, size - 1)
        results.append(torch.cat([even, uneven, exchanged, copied]))
    return all(reference.all_gather_json(torch.equal(*results)))


def _timed_exchange(comm: Comm, device: torch.device) -> Callable[[], None]:
    x = torch.zeros(TIMED_BYTES // 4 // comm.size * comm.size, device=device)
    out = torch.zeros_like(x)

    def exchange() -> None:
        comm.all_to_all(x, out)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    return exchange


def _by_process_groups(world: Comm, device: torch.device) -> Comm:
    if isinstance(world, InstrumentedComm):
        return world.replace_inner("connect", lambda inner: connect_process_groups(inner, device))
    return connect_process_groups(world, device)
