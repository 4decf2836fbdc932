"""Recompute one step of a run, and show the tensors in it: activations, gradients, updates.

The run continues from its newest checkpoint before the step, on any number of ranks in any layout, with the bits that it had.
Nothing is written to the run folder. --watch takes the names of modules (their outputs) and of parameters: NAME.grad is the
gradient of the step before clipping or, with --microbatch, of one microbatch; NAME.update the change by the optimizer;
NAME.value the value before the step. * and ? match any text.

$ python -m mpilm.replay runs/NAME --step 812 --watch 'blocks.3.attn.o.weight.grad'
$ python -m mpilm.replay runs/NAME --step 812 --watch 'blocks.*.mlp' '*.update' --compare runs/OTHER
$ mpirun -n 4 python -m mpilm.replay runs/NAME --step 812 --parallel.pipeline 4 --watch '*.grad' --save grads.safetensors
$ python -m mpilm.replay runs/NAME --step 812 --text true --microbatch 5
"""

import sys

from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.launch.run import Body, run
from mpilm.verification.arguments import ReplayArguments


def main() -> Body:
    arguments = parse(sys.argv[1:], ReplayArguments(), "replay", __doc__ or "", positional="runs")
    if len(arguments.runs) != 1 or arguments.step < 1:
        raise ConfigError("name one run folder and a step, counted from 1: python -m mpilm.replay runs/NAME --step 812")
    if not arguments.watch and not arguments.text:
        raise ConfigError("name tensors to show (--watch 'blocks.0.attn.q.weight.grad'), or write --text true")

    def body(comm: Comm) -> None:
        from mpilm.verification.replay import replay_step

        replay_step(arguments, comm, lambda text: print(text, flush=True) if comm.rank == 0 else None)

    return body


if __name__ == "__main__":
    run(main)
