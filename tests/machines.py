"""Machines that nobody has measured: every rate is one number, so that what a step takes can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import mpilm
from mpilm.planner.profile import FORMAT, ComputeRates, MachineProfile, MemoryRates, NetworkRates

RATE = 1e-11  # seconds a floating-point operation
NOTHING = 1e-30


def flat(value):
    return ((1.0, value),)


def network(ranks=2, **changes):
    rates = NetworkRates(
        ranks=ranks, latency_s=NOTHING, bandwidth=1e30, exchange=flat(NOTHING), gather=flat(NOTHING), reduce_s=NOTHING,
        shared=flat(NOTHING),
    )  # fmt: skip
    return replace(rates, **changes)


def machine(ranks_per_node=2, **changes):
    """A machine that only computes; `changes` are of Machine's fields."""
    surface = ((1.0, flat(RATE)),)
    rest = {"llama": flat(NOTHING), "gpt2": flat(NOTHING)}
    compute = ComputeRates(
        threads=1, ranks=ranks_per_node, dtype="float32", linear_forward=surface, linear_backward=surface,
        attention_forward=surface, attention_backward=surface, rest_forward=rest, rest_backward=rest,
        loss_forward=flat(NOTHING), loss_backward=flat(NOTHING),
    )  # fmt: skip
    memory = MemoryRates(1, ranks_per_node, *[flat(NOTHING)] * 6)
    rates = MachineProfile(
        format=FORMAT, mpilm=mpilm.__version__, torch="2", processor="a processor", mpi="an MPI", device="cpu", made="today",
        nodes=1, ranks_per_node=ranks_per_node, gpus=1, cores=ranks_per_node, memory_bytes=64 << 30, program_bytes=1 << 20,
        compute=(compute,), memory=(memory,), within=network(ranks_per_node), across=None, step_s=NOTHING,
    )  # fmt: skip
    return replace(rates, **changes)
