"""What a rank will use of its memory, said before the first step."""

from __future__ import annotations

import errno
from collections.abc import Mapping

import torch

from mpilm.checkpoint.assemble import IN_FLIGHT
from mpilm.checkpoint.format import BLOCK_BYTES
from mpilm.errors import OutOfMemoryError
from mpilm.planner.memory import COMPILER_BYTES, FIRST_STEP_BYTES, copied_bytes, step_bytes
from mpilm.telemetry.words import mebibytes
from mpilm.trainer.build import Training

SAVING_BYTES = (IN_FLIGHT + 1) * BLOCK_BYTES


def predicted_memory(run: Training) -> dict[str, int]:
    """Bytes this rank will use, part by part."""
    config, model, device = run.config, run.model, run.machine.device.type
    step = step_bytes(config, model.vocab_size, model.cut, list(model.stages), model.program, device)
    held = model.held_bytes()
    if device == "cuda":
        return {"program": run.memory.program_bytes, **held, **step}  # of the GPU; what is saved is copied from there
    saving = max(0, min(SAVING_BYTES, held["weights"] + held["moments"]) - sum(step.values()))  # between steps
    if config.checkpoint.asynchronous:
        saving = copied_bytes(model.saved_bytes, run.mesh.world.size)  # which is there beside the next steps
    return {
        "program": run.memory.program_bytes + FIRST_STEP_BYTES + COMPILER_BYTES * config.train.compile,
        **held,
        **step,
        "checkpoint": saving,
    }


def listed(parts: Mapping[str, int]) -> str:
    """The parts of a prediction in words; those that are nothing are left out."""
    return ", ".join(f"{part} {mebibytes(nbytes)}" for part, nbytes in parts.items() if nbytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, of the host or of a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch's, on a CPU


def out_of_memory(run: Training, error: BaseException) -> OutOfMemoryError:
    """That error in words that help."""
    parts, activity = predicted_memory(run), run.mesh.activity
    asked = "".join(f" ({line[:200]})" for line in str(error).strip().splitlines()[:1])
    return OutOfMemoryError(
        f"there is no more memory in {activity.phase} {activity.step + 1}, with {mebibytes(run.memory.used_bytes)} in "
        f"use{asked}; predicted were {mebibytes(sum(parts.values()))}: {listed(parts)}. A smaller --train.micro-batch, "
        "--train.recompute block, more pipeline stages or --parallel.zero 3 need less; fewer ranks on a node leave more to each"
    )
