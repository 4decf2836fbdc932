"""Is this MPI healthy? Ask before a long job, on the nodes it will have.

mpirun -n 4 python -m mpilm.doctor
mpirun -n 4 python -m mpilm.doctor --drill true        # and kill a rank at the end, which must end the job
mpirun -n 4 python -m mpilm.doctor --calibrate         # and measure what mpilm.plan wants to know: machine.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run

DESCRIPTION = (
    "Check the ranks that mpirun starts: libraries and versions, cores and binding, every message and collective against known "
    "answers, latency and bandwidth, clocks, shared memory. Says in plain words what is wrong and what to do; ends with a code "
    "other than 0 where something is. --calibrate also measures, in a minute or two, how fast everything is that a training "
    "step is made of, for mpilm.plan and for train --parallel.auto; start as many ranks a node as a job will have."
)


@dataclass(frozen=True)
class DoctorConfig:
    """What to check."""

    megabytes: int = 16
    """Size of the largest messages."""
    drill: bool = False
    """At the end, kill the last rank: the job must end within seconds, and the launcher with a code other than 0."""
    calibrate: bool = False
    """Measure this machine for mpilm.plan, and write down what is found. Nothing else should run here meanwhile."""
    output: str = "machine.json"
    """The file that --calibrate writes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What --calibrate measures; auto: a GPU when torch sees one."""


def prepare() -> Body:
    config = parse(sys.argv[1:], DoctorConfig(), "doctor", DESCRIPTION, {})
    if not 1 <= config.megabytes <= 1024:
        raise ConfigError(f"--megabytes {config.megabytes}: write a number from 1 to 1024")

    def body(comm) -> None:  # type: ignore[no-untyped-def]
        from mpilm.trainer.examine import drill, examine

        examine(comm, config.megabytes << 20)
        if config.calibrate:
            _calibrate(comm, config)
        if config.drill:
            drill(comm)

    return body


def _calibrate(comm, config: DoctorConfig) -> None:  # type: ignore[no-untyped-def]
    from mpilm.comm.collective_errors import run_on_all_ranks
    from mpilm.planner.machine import write
    from mpilm.trainer.calibration.calibrate import calibrate

    machine = calibrate(comm, config.device)
    run_on_all_ranks(comm, lambda: write(Path(config.output), machine) if comm.rank == 0 else None)
    if comm.rank == 0:
        print(f"{'calibrated':<12}{config.output}: for python -m mpilm.plan --machine {config.output}", flush=True)


if __name__ == "__main__":
    run(prepare)
