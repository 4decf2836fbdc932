"""Drills: failures made on purpose, to see them noticed on this machine."""

import os
import signal
import sys
import time

import torch
from torch import Tensor, nn

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks
from mpilm.config.schema import Config, resolve_config
from mpilm.config.settings import override
from mpilm.doctor.checks import CheckReport
from mpilm.engine.hardware import detect_hardware
from mpilm.engine.recheck import Recheck
from mpilm.engine.step import train_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import RanksDisagreeError
from mpilm.mesh.mesh import Mesh
from mpilm.mesh.shape import MeshShape
from mpilm.parallel.flat_layout import ALIGNMENT
from mpilm.verification.layouts import VOCAB_SIZE, RandomTokens

STEPS, FLIPPED_STEP, BIT = 4, 2, 22


def kill_last_rank(comm: Comm) -> None:
    """Kill the last rank while the others wait for it. Collective; does not return."""
    drill = f"killing rank {comm.size - 1}: the job must end within seconds, with a non-zero exit code"
    CheckReport(comm).print("drill", f"{time.strftime('%H:%M:%S')}: {drill}")
    comm.barrier()
    if comm.rank == comm.size - 1:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()


def flip_bit_on_last_rank(comm: Comm) -> None:
    """Train a small model with a recheck of each step, and flip a bit of an activation on the last rank. Collective; raises
    CollectiveError if that is not noticed."""
    report, last = CheckReport(comm), comm.size - 1
    changes = {"train.global_batch": comm.size, "train.micro_batch": 1, "model.n_layers": 2, "model.context_length": 32}
    config = resolve_config(override(Config(), {**changes, "train.device": "cpu"}))
    hardware = run_on_all_ranks(comm, lambda: detect_hardware(config.train, comm, bind=False))
    mesh, alignment = Mesh(MeshShape(data=comm.size), comm), ALIGNMENT * hardware.threads
    model = TrainModel(config, mesh, (config.model.n_layers,), VOCAB_SIZE, hardware.device, alignment)
    model.init_parameters()
    report.print("drill", f"flipping a bit of an activation on rank {last} in step {FLIPPED_STEP + 1} of {STEPS}")
    source, recheck = RandomTokens(config), Recheck(model, every=1)
    try:
        for step in range(STEPS):
            if step == FLIPPED_STEP and comm.rank == last:
                linear = next(module for module in model.stages[0].model.modules() if isinstance(module, nn.Linear))
                linear.register_forward_hook(FlippedBit())
            train_step(model, source, step, recheck=recheck)
    except CollectiveError as error:
        if f"by rank {last} (" not in str(error):
            raise
        return report.print("drill", f"found: {error}")
    raise CollectiveError(RanksDisagreeError(f"the recheck did not notice a wrong result on rank {last}"))


class FlippedBit:
    """Flips one bit of the largest element of a module's output, once; a forward hook."""

    has_fired = False

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        if self.has_fired:
            return x
        self.has_fired = True
        y, place = x.detach().clone(), int(x.detach().abs().argmax())
        y.view(-1).view(torch.int32)[place] ^= 1 << BIT
        return x + (y - x).detach()  # with the gradient of x
