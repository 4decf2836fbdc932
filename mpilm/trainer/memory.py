"""The memory that a rank will use, predicted before the first step, and the message when memory runs out."""

import errno
from collections.abc import Mapping

import torch

from mpilm.errors import OutOfMemoryError
from mpilm.formatting import format_mebibytes
from mpilm.planner.memory import memory_parts, step_bytes
from mpilm.trainer.run import Run


def predict_memory(run: Run) -> dict[str, int]:
    """Return the bytes that this rank will use, by part."""
    config, model, device = run.config, run.model, run.hardware.device.type
    step = step_bytes(config, model.vocab_size, model.blocks_per_stage, list(model.stages), model.program, device)
    resident = {"program": run.memory.program_bytes, **model.memory_bytes()}
    return memory_parts(config, device, resident, step, model.saved_bytes, run.mesh.world.size)


def list_parts(parts: Mapping[str, int]) -> str:
    """Return the parts of a prediction as text, without empty ones."""
    return ", ".join(f"{part} {format_mebibytes(nbytes)}" for part, nbytes in parts.items() if nbytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the host or a GPU has run out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch's, on a CPU


def out_of_memory_error(run: Run, error: BaseException) -> OutOfMemoryError:
    """Wrap an out-of-memory error with the predicted memory and what to change."""
    parts, progress = predict_memory(run), run.progress
    detail = "".join(f" ({line[:200]})" for line in str(error).strip().splitlines()[:1])
    return OutOfMemoryError(
        f"out of memory in {progress.phase} {progress.step + 1}, with {format_mebibytes(run.memory.used_bytes)} in "
        f"use{detail}; predicted: {format_mebibytes(sum(parts.values()))}: {list_parts(parts)}. A smaller --train.micro-batch, "
        "--train.recompute block, more pipeline stages or --parallel.zero 3 need less; fewer ranks a node leave more for each"
    )
