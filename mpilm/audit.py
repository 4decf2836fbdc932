"""Recompute part of a run on other ranks and compare every bit, or find the first step at which two runs differ.

Given one run: check that its certificate is unbroken and, with --steps, recompute these steps from the newest checkpoint before
them, on any number of ranks in any layout. Compare losses, gradient norms, and the weights and moments of each line of the
certificate and of each checkpoint. Given two runs: compare their certificates, then recompute both around the first difference
and name step, microbatch, tensor and cause. Exits with code 90 if bits differ.

$ python -m mpilm.audit runs/NAME --steps 1200:1210
$ mpirun -n 4 python -m mpilm.audit runs/NAME --steps 1200:1210 --parallel.zero 3
$ mpirun -n 2 python -m mpilm.audit runs/A runs/B
"""

import sys

from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run
from mpilm.verification.arguments import AuditArguments


def main() -> Body:
    arguments = parse(sys.argv[1:], AuditArguments(), "audit", __doc__ or "", positional="runs")
    arguments.step_range()  # raises
    if len(arguments.runs) not in (1, 2) or (len(arguments.runs) == 2 and arguments.steps):
        raise ConfigError(
            "name one run folder, or two to compare without --steps: python -m mpilm.audit runs/NAME --steps 1:10"
        )

    def body(comm: Comm) -> None:
        from mpilm.verification.audit import audit_run
        from mpilm.verification.bisection import find_first_difference

        audit = audit_run if len(arguments.runs) == 1 else find_first_difference
        audit(arguments, comm, lambda text: print(text, flush=True) if comm.rank == 0 else None)

    return body


if __name__ == "__main__":
    run(main)
