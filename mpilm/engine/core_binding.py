"""Ranks bound to cores of their own, within one memory node and one L3 cache where they fit."""

import contextlib
import os
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path

from mpilm.comm.base import Comm

VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")  # the user's own binding
CPUS = Path("/sys/devices/system/cpu")

Domain = tuple[int, int]  # memory node, and the first core that shares the L3 cache


def allowed_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS does not bind


def bind_cores(node: Comm, threads: int) -> str:
    """Bind this rank, and the threads that it will start, to its own cores; return their description, empty if it is not bound.
    Memory then lies in the node where it is first written, that of the cores. Collective over `node`."""
    everyone = node.all_gather_json([os.getpid(), sorted(allowed_cores(), key=core_position)])
    processes, affinities = {pid for pid, _ in everyone}, [cores for _, cores in everyone]
    domains = {core: core_domain(core) for core in affinities[node.rank]}
    cores = slice_affinity(affinities, node.rank, threads, domains)
    if cores and len(processes) == node.size and not any(name in os.environ for name in VARIABLES):
        with contextlib.suppress(OSError, AttributeError):  # a sandbox, or macOS
            os.sched_setaffinity(0, cores)
            return describe_cores(cores, domains)
    return ""


def slice_affinity(
    affinities: Sequence[Sequence[int]], rank: int, threads: int, domains: dict[int, Domain] | None = None
) -> Sequence[int]:
    """Return this rank's slice of the node's cores; nothing if the launcher has pinned the ranks, if there is one rank, or if
    slices would be smaller than the thread count. Slices lie within one of the `domains`, or have whole ones, if each rank
    then has a core for each thread, and are even otherwise. `affinities`: the cores of each rank, neighbours adjacent."""
    cores, size = list(affinities[rank]), len(affinities)
    if size == 1 or len(cores) // size < threads or any(other != affinities[rank] for other in affinities):
        return []
    groups = [list(group) for _, group in groupby(cores, key=lambda core: (domains or {}).get(core))]
    slices = _divide(groups, size) if size < len(groups) else _share_out(groups, size)
    if len(slices) != size or any(len(each) < threads for each in slices):
        slices = _divide([[core] for core in cores], size)
    return slices[rank]


def _divide(groups: Sequence[list[int]], size: int) -> list[list[int]]:
    """Return the cores of `size` even slices of the groups."""
    edges = [rank * len(groups) // size for rank in range(size + 1)]
    return [[core for group in groups[start:stop] for core in group] for start, stop in pairwise(edges)]


def _share_out(groups: Sequence[list[int]], size: int) -> list[list[int]]:
    """Return the cores of `size` ranks, each of which has a part of one group; groups have ranks by their number of cores."""
    ends = list(accumulate(map(len, groups)))
    edges = [0, *(round(size * end / ends[-1]) for end in ends)]
    counts = [stop - start for start, stop in pairwise(edges)]
    return [part for group, count in zip(groups, counts) for part in _divide([[core] for core in group], count)]


def core_position(core: int) -> list[int]:
    """Return a sort key that groups the cores of a memory node, of an L3 cache, and the two hardware threads of a core."""
    topology = CPUS / f"cpu{core}" / "topology"
    try:
        return [*core_domain(core), *(int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))]
    except (OSError, ValueError):
        return []


def core_domain(core: int) -> Domain:
    """Return the memory node and the L3 cache of a core; 0 if the kernel does not tell."""
    folder, node, cache = CPUS / f"cpu{core}", 0, 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        node = int(next(folder.glob("node[0-9]*")).name.removeprefix("node"))
    with contextlib.suppress(OSError, ValueError):
        cache = int((folder / "cache" / "index3" / "shared_cpu_list").read_text().replace("-", ",").split(",")[0])
    return node, cache


def describe_cores(cores: Sequence[int], domains: dict[int, Domain]) -> str:
    """Return cores as text, as in "0-3,8 (memory node 0, 1 L3 cache)", the latter if the machine has several."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(cores)), key=lambda item: item[1] - item[0])]
    text = ",".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
    if len({*domains.values()}) == 1:
        return text
    nodes, caches = sorted({domains[core][0] for core in cores}), len({domains[core] for core in cores})
    plural = "s" * (len(nodes) > 1)
    return f"{text} (memory node{plural} {' and '.join(map(str, nodes))}, {caches} L3 cache{'s' * (caches > 1)})"
