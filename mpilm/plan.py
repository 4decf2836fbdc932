"""Predict which layout is the fastest and what it needs, before a job is queued: in one process, without torch and MPI.

Rank the layouts of a job by the predicted time of a step, with the memory of a rank, the pipeline bubble, communication and
tokens a second, and give the reason against those that cannot run. For several numbers of ranks, find where more of them stop
helping. Predictions need machine.json, which mpirun -n RANKS python -m mpilm.doctor --calibrate measures in a minute or two.
Layout settings that you give are kept.

With --draw instead: draw what each rank of a pipeline does during one training step: its forwards and backwards on a time axis,
the layers of each stage, how long ranks idle (the bubble) and how many microbatches they keep in memory. For any number of
ranks, on this machine alone.

$ python -m mpilm.plan --preset llama-1b --ranks 64 --machine machine.json
$ python -m mpilm.plan --preset llama-1b --ranks 1,2,4,8,16 --plot scaling.png
$ python -m mpilm.plan --draw --parallel.pipeline 4 --parallel.schedule zero-bubble
$ python -m mpilm.plan --draw --preset llama-1b --parallel.pipeline 4 --parallel.schedule interleaved --ranks 8 --svg plan.svg
"""

import sys
from collections.abc import Callable

from mpilm.checkpoint.pretrained import check_pretrained_shape, with_pretrained_shape
from mpilm.config.parse import parse
from mpilm.launch.local import run_local
from mpilm.planner.command import PlanConfig, make_plan, plan_presets


def main() -> Callable[[], None]:
    shape_of_folder = with_pretrained_shape, check_pretrained_shape
    text = make_plan(parse(sys.argv[1:], PlanConfig(), "plan", __doc__ or "", plan_presets(), *shape_of_folder))
    return lambda: print(text)


if __name__ == "__main__":
    run_local(main)
