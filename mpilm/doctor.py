"""Is this MPI healthy? Ask before a long job, on the nodes it will have.

mpirun -n 4 python -m mpilm.doctor
mpirun -n 4 python -m mpilm.doctor --drill true        # and kill a rank at the end, which must end the job
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mpilm.cli import parse
from mpilm.errors import ConfigError
from mpilm.guard.launch import Body, run

DESCRIPTION = (
    "Check the ranks that mpirun starts: libraries and versions, cores and binding, every message and collective against known "
    "answers, latency and bandwidth, clocks, shared memory. Says in plain words what is wrong and what to do; ends with a code "
    "other than 0 where something is."
)


@dataclass(frozen=True)
class DoctorConfig:
    """What to check."""

    megabytes: int = 16
    """Size of the largest messages."""
    drill: bool = False
    """At the end, kill the last rank: the job must end within seconds, and the launcher with a code other than 0."""


def prepare() -> Body:
    config = parse(sys.argv[1:], DoctorConfig(), "doctor", DESCRIPTION, {})
    if not 1 <= config.megabytes <= 1024:
        raise ConfigError(f"--megabytes {config.megabytes}: write a number from 1 to 1024")

    def body(comm) -> None:  # type: ignore[no-untyped-def]
        from mpilm.trainer.examine import drill, examine

        examine(comm, config.megabytes << 20)
        if config.drill:
            drill(comm)

    return body


if __name__ == "__main__":
    run(prepare)
