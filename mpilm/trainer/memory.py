"""What a rank will use of its memory, said before the first step."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

import torch

from mpilm.checkpoint.assemble import IN_FLIGHT
from mpilm.checkpoint.format import BLOCK_BYTES
from mpilm.errors import OutOfMemoryError
from mpilm.model.size import activation_bytes
from mpilm.parallel.pipeline.actions import Action
from mpilm.telemetry.display import mebibytes
from mpilm.trainer.build import Training

# glibc keeps freed blocks below 32 MiB, and those of one microbatch leave holes that the next one's do not fill: measured
# 1.3 to 1.6 times what is in use, but no more than another microbatch. Of a GPU what torch has given out is counted: no holes.
HOLES = {"cpu": 1.5, "cuda": 1.0}
RETURNED_BYTES = 32 << 20
COMPILER_BYTES = 200 << 20  # of torch.compile, where it is the processor's memory
FIRST_STEP_BYTES = 14 << 20  # of libraries, buffers of MPI, and the text, that come into memory with the first step
SAVING_BYTES = (IN_FLIGHT + 1) * BLOCK_BYTES


def predicted_memory(run: Training) -> dict[str, int]:
    """Bytes this rank will use, part by part."""
    config, model = run.config, run.model
    tokens, vocab_size = config.train.micro_batch * config.model.context_length, run.model.vocab_size
    of_stage = {
        number: activation_bytes(
            config.model, vocab_size, tokens, config.train.dtype, model.cut[number], stage.first, stage.last,
            config.train.recompute,
        )
        for number, stage in model.stages.items()
    }  # fmt: skip
    received = 4 * tokens * config.model.d_model * 2 * (len(model.cut) > 1)  # posted ahead: an input and a gradient
    live = peak_bytes(model.program, of_stage) + max(of["again"] for of in of_stage.values()) + received
    logits = round(max(of["logits"] for of in of_stage.values()) * _logits_factor(run))
    largest = {"activations": 4 * tokens * config.model.d_ff, "logits": 4 * tokens * vocab_size}
    holes = {name: HOLES[run.machine.device.type] if size < RETURNED_BYTES else 1 for name, size in largest.items()}
    lost = min(live * (holes["activations"] - 1), max(of["activations"] for of in of_stage.values()))
    step = {"activations": round(live + lost), "logits": round(logits * holes["logits"])}
    held = model.held_bytes()
    saving = max(0, min(SAVING_BYTES, held["weights"] + held["moments"]) - sum(step.values()))  # between steps
    if run.machine.device.type == "cuda":
        return {"program": run.memory.program_bytes, **held, **step}  # of the GPU; what is saved is copied from there
    if config.checkpoint.asynchronous:
        saving = -(-model.saved_bytes // run.mesh.world.size)  # a copy of what this rank writes, beside the next steps
    return {
        "program": run.memory.program_bytes + FIRST_STEP_BYTES + COMPILER_BYTES * config.train.compile,
        **held,
        **step,
        "checkpoint": saving,
    }


def _logits_factor(run: Training) -> float:
    """Of what model/size.py counts, two tensors in float32: CUDA's kernels make a third one in backward (measured), and a
    compiled loss makes none but the logits, as they are, and their gradient."""
    if run.config.train.compile:
        return 0.5 if run.config.train.dtype == "bfloat16" else 1.0
    return 1.5 if run.machine.device.type == "cuda" else 1.0


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


def peak_bytes(program: Sequence[Action], of_stage: Mapping[int, Mapping[str, int]]) -> int:
    """The most that the microbatches of a program keep at once; half of the last one's logits is counted elsewhere."""
    held = most = 0
    logits = max(of["logits"] for of in of_stage.values()) // 2
    for action in program:
        of = of_stage[action.stage]
        kept = of["activations"] + of["logits"] // 2
        held += {"F": kept, "I": of["owed"] - kept, "B": -kept, "W": -of["owed"]}.get(action.kind, 0)
        most = max(most, held)
    return most - logits
