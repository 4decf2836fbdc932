"""Check that this MPI is healthy, before a long job and on its nodes.

Check the ranks that mpirun starts: libraries and versions, cores and binding, every message and collective against known
answers, latency and bandwidth, clocks, shared memory. Print what is wrong and what to do; exit with a code other than 0 if a
check fails.

--calibrate also measures, in two minutes on an idle machine and ten at most, how fast everything is that a training step
consists of, for mpilm.plan and for train --parallel.auto; start as many ranks a node as a job will have.

$ mpirun -n 4 python -m mpilm.doctor
$ mpirun -n 4 python -m mpilm.doctor --drill kill        # kill a rank at the end, which must end the job
$ mpirun -n 4 python -m mpilm.doctor --drill flip        # let a rank compute wrongly, which must be found
$ mpirun -n 4 python -m mpilm.doctor --calibrate         # measure what mpilm.plan needs: machine.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.config.schema import Range
from mpilm.launch.run import Body, run


@dataclass(frozen=True)
class DoctorArguments:
    """The checks to run, and the calibration."""

    megabytes: Annotated[int, Range("from 1 to 1024", lambda value: 1 <= value <= 1024)] = 16  # Size of the largest messages.
    # kill: kill the last rank at the end; the job must end within seconds, with a non-zero exit code. flip: flip a bit in the
    # computation of the last rank; the recheck (--fault.recheck-every of mpilm.train) must find it and name the rank.
    drill: Literal["none", "kill", "flip"] = "none"
    bad_hosts: str = ""  # Run folder: only print the hosts that computed wrongly in it (bad-hosts.json), separated by commas.
    calibrate: bool = False  # Measure this machine for mpilm.plan, while nothing else runs here, and write a machine file.
    output: str = "machine.json"  # The file that --calibrate writes.
    device: str = "auto"  # Type of device to measure: cpu, cuda (NVIDIA, AMD) or xpu (Intel); auto: a GPU if torch finds one.


def main() -> Body:
    config = parse(sys.argv[1:], DoctorArguments(), "doctor", __doc__ or "")

    if config.bad_hosts:
        from mpilm.trainer.recovery.bad_hosts import read_bad_hosts

        hosts = ",".join(read_bad_hosts(Path(config.bad_hosts)))
        return lambda comm: print(hosts) if comm.rank == 0 else None

    def body(comm: Comm) -> None:
        from mpilm.doctor.calibrate import write_calibration
        from mpilm.doctor.checks import run_checks
        from mpilm.doctor.drill import flip_bit_on_last_rank, kill_last_rank

        run_checks(comm, config.megabytes << 20)
        if config.calibrate:
            write_calibration(comm, config.device, Path(config.output))
        if config.drill == "kill":
            kill_last_rank(comm)
        if config.drill == "flip":
            flip_bit_on_last_rank(comm)

    return body


if __name__ == "__main__":
    run(main)
