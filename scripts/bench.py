#!/usr/bin/env python3
"""Measure mpilm against what else one would use, on this machine.

    python scripts/bench.py overhead          one rank against a plain torch loop
    python scripts/bench.py dtype             one rank: bfloat16 against float32
    python scripts/bench.py data-parallel     2 ranks against two independent runs, torch DDP and FSDP2 with gloo, Accelerate
    python scripts/bench.py collectives       sums and gathers, 4 KiB to 256 MiB, against the MPI library's, gloo's, and a copy
    python scripts/bench.py checkpoint        writing and reading against the raw disk, and what a save takes from training
    python scripts/bench.py guards            2 ranks with watchdog, fingerprints and digests, against the same without
    python scripts/bench.py crowded           8 ranks against 2 on the same cores
    python scripts/bench.py start             mpirun to the first step, against importing the libraries
    python scripts/bench.py memory            memory of a rank against what the header predicts
    python scripts/bench.py shards            memory of a rank under ZeRO and pipeline against the formula
    python scripts/bench.py generate          a text, against transformers' generate
    python scripts/bench.py prepare           text to tokens: 2 ranks against 1, 1 against the tokenizers library alone
    python scripts/bench.py gpu               one GPU: model FLOPs utilisation, against a plain torch loop that is compiled
    python scripts/bench.py slow              4 ranks on 2 pretend hosts and a slow network: ways to send less (as root)
    python scripts/bench.py plan              2 ranks: what mpilm.plan predicts of every layout, against its measured step
    python scripts/bench.py plan-memory       2 ranks: what it says of their memory, against what they use
    python scripts/bench.py bubble            2 ranks: what a run says that the stages of a pipeline wait, against the formula
    python scripts/bench.py pipeline          2 ranks: a pipeline's step against what the simulator makes of its own actions

The sides of a comparison take turns within one call. A round during which other programs used the machine is void and is
made again. Printed: medians over the rounds and the ratio of each round to its neighbours, as median and spread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # mpilm, also where it is not installed

from benchmarks import gpu, layouts, planning, saving, slow, speed, tasks, wire

COMMANDS = {
    "overhead": speed.overhead,
    "dtype": speed.dtype,
    "data-parallel": speed.data_parallel,
    "data-parallel-worker": speed.data_parallel_worker,
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
    parser.add_argument("what", choices=COMMANDS, metavar="WHAT", help="one of those above")
    parser.add_argument("--preset", default="tiny", help="the config to train (default: tiny)")
    parser.add_argument("--rounds", type=int, default=7, help="valid rounds wanted (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the one rank of overhead (default: 1)")
    for name, kind, default in (("--folder", str, ""), ("--pipeline", int, 1), ("--zero", int, 0)):
        parser.add_argument(name, type=kind, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
