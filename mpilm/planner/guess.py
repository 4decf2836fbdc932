"""A machine profile for machines that nobody has measured: the cores and memory of this one, and common speeds."""

import os
from dataclasses import replace

import mpilm
from mpilm.planner.profile import FORMAT, ComputeRates, Curve, MachineProfile, MemoryRates, NetworkRates

CORE_FLOPS, CORE_BYTES, NODE_BYTES = 30e9, 4e9, 12.5e9  # a second: of a core, of its memory, of the network of a node
ASSUMPTION = f"{CORE_FLOPS / 1e9:.0f} GFLOP/s and {CORE_BYTES / 1e9:.0f} GB/s a core, {NODE_BYTES / 1e9:.3g} GB/s between nodes"


def guess_profile() -> MachineProfile:
    """Return a profile with one rank a core, for CPUs."""
    cores, memory_bytes = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flop, slice_s = ((1.0, ((1.0, 1 / CORE_FLOPS),)),), ((1.0, 4 * cores / NODE_BYTES),)  # ranks share the network of a node
    rest = {"llama": _move(2), "gpt2": _move(2)}
    compute = ComputeRates(1, cores, "float32", flop, flop, flop, flop, rest, rest, _move(3), _move(3))
    memory = MemoryRates(1, cores, *map(_move, (3, 2, 1, 7, 1, 2)))
    within = NetworkRates(cores, 2e-6, CORE_BYTES, _move(1), _move(1), 5e-6, _move(2)) if cores > 1 else None
    across = NetworkRates(2 * cores, 5e-6, NODE_BYTES / cores, slice_s, slice_s, 2e-5)
    return MachineProfile(
        format=FORMAT, mpilm=mpilm.__version__, torch="", processor="", mpi="", device="cpu", made="", nodes=2,
        ranks_per_node=cores, gpus=1, cores=cores, memory_bytes=memory_bytes, program_bytes=280 << 20,
        compute=(compute, replace(compute, dtype="bfloat16")), memory=(memory,), within=within, across=across, step_s=2e-3,
        source="a guess",
    )  # fmt: skip


def _move(floats: float) -> Curve:
    """Return the seconds an element for which so many floats move through memory."""
    return ((1.0, 4 * floats / CORE_BYTES),)
