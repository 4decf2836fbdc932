#!/usr/bin/env python3
"""Measure mpilm against its alternatives on this machine.

    python scripts/bench.py overhead          one rank against a plain torch loop
    python scripts/bench.py dtype             one rank: bfloat16 against float32
    python scripts/bench.py compute           2 ranks: fused kernels against transformers, eager, compiled and with DDP
    python scripts/bench.py data-parallel     2 ranks against two independent runs, torch DDP and FSDP2 with gloo, Accelerate
    python scripts/bench.py axes              2 ranks: tensor parallelism against data parallelism, and torch's DTensor
    python scripts/bench.py context           2 ranks: context parallelism at 8,192 tokens against data parallelism
    python scripts/bench.py expert            2 ranks: expert parallelism against data parallelism
    python scripts/bench.py collectives       sums and gathers, 4 KiB to 256 MiB, against the MPI library's, gloo's, and a copy
    python scripts/bench.py checkpoint        writing and reading against the raw disk; the time that training waits for a save
    python scripts/bench.py guards            2 ranks with watchdog, fingerprints and digests, against the same without
    python scripts/bench.py crowded           8 ranks against 2 on the same cores
    python scripts/bench.py start             mpirun to the first step, against importing the libraries
    python scripts/bench.py memory            memory of a rank against the prediction in the header
    python scripts/bench.py shards            memory of a rank under ZeRO and pipeline against the formula
    python scripts/bench.py generate          a text, against transformers' generate
    python scripts/bench.py prepare           text to tokens: 2 ranks against 1, 1 against the tokenizers library alone
    python scripts/bench.py gpu               one GPU: model FLOPs utilization, against a compiled plain torch loop
    python scripts/bench.py slow              4 ranks on 2 emulated hosts and a slow network: methods that send less (as root)
    python scripts/bench.py plan              2 ranks: mpilm.plan's step time of every layout, against the measured one
    python scripts/bench.py plan-memory       2 ranks: mpilm.plan's memory of every layout, against the measured one
    python scripts/bench.py bubble            2 ranks: the pipeline bubble that a run reports, against the formula
    python scripts/bench.py pipeline          2 ranks: the step of a pipeline against the simulation of its own actions

The sides of a comparison take turns within one call. A round during which other programs used the machine is void and is
repeated. The output has medians over the rounds, and the ratios of neighbouring rounds as median and spread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # mpilm, even if it is not installed

from benchmarks import axes, compute, gpu, layouts, planning, saving, slow, speed, tasks, wire

COMMANDS = {
    "overhead": speed.overhead,
    "dtype": speed.dtype,
    "compute": compute.compute,
    "compute-worker": compute.compute_worker,
    "data-parallel": speed.data_parallel,
    "data-parallel-worker": speed.data_parallel_worker,
    "axes": axes.axes,
    "axes-worker": axes.axes_worker,
    "context": axes.long_contexts,
    "context-worker": axes.context_worker,
    "expert": axes.experts,
    "expert-worker": axes.expert_worker,
    "collectives": wire.collectives,
    "collectives-worker": wire.collectives_worker,
    "checkpoint": saving.checkpoint,
    "checkpoint-worker": saving.checkpoint_worker,
    "guards": speed.guards,
    "guards-worker": speed.guards_worker,
    "crowded": speed.oversubscribed,
    "start": speed.start,
    "memory": speed.memory,
    "shards": layouts.shards,
    "shards-worker": layouts.shards_worker,
    "gpu": gpu.gpu,
    "gpu-worker": gpu.gpu_worker,
    "generate": tasks.generate,
    "prepare": tasks.prepare,
    "prepare-worker": tasks.prepare_worker,
    "slow": slow.slow,
    "plan": planning.plan,
    "plan-memory": planning.plan_memory,
    "plan-worker": planning.plan_worker,
    "bubble": layouts.bubble,
    "pipeline": layouts.pipeline,
    "pipeline-worker": layouts.pipeline_worker,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS, metavar="WHAT", help="one of the names above")
    parser.add_argument("--preset", default="tiny", help="the config to train (default: tiny)")
    parser.add_argument("--rounds", type=int, default=7, help="number of valid rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the rank in overhead (default: 1)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="that of compute (default: both) and axes (default: float32)"
    )
    for name, kind, default in (("--folder", str, ""), ("--pipeline", int, 1), ("--zero", int, 0)):
        parser.add_argument(name, type=kind, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
