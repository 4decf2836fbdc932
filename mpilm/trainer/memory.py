"""What a rank will use of its memory, said before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpilm.model.size import activation_bytes
from mpilm.parallel.pipeline.actions import Action
from mpilm.trainer.build import Training

# glibc keeps freed blocks below 32 MiB, and those of one microbatch leave holes that the next one's do not fill: measured
# 1.3 to 1.6 times what is in use. CUDA's caching allocator rounds sizes and does better.
HOLES = {"cpu": 1.5, "cuda": 1.1}
RETURNED_BYTES = 32 << 20


def predicted_memory(run: Training) -> dict[str, int]:
    """Bytes this rank will use, part by part."""
    config, model = run.config, run.model
    tokens, vocab_size = config.train.micro_batch * config.model.context_length, run.corpus.tokenizer.vocab_size
    of_stage = {
        number: activation_bytes(
            config.model, vocab_size, tokens, config.train.dtype, model.cut[number], stage.first, stage.last,
            config.train.recompute,
        )
        for number, stage in model.stages.items()
    }  # fmt: skip
    received = 4 * tokens * config.model.d_model * 2 * (len(model.cut) > 1)  # posted ahead: an input and a gradient
    live = peak_bytes(model.program, of_stage) + max(of["again"] for of in of_stage.values()) + received
    logits = max(of["logits"] for of in of_stage.values())
    largest = {"activations": 4 * tokens * config.model.d_ff, "logits": 4 * tokens * vocab_size}
    holes = {name: HOLES[run.machine.device.type] if size < RETURNED_BYTES else 1 for name, size in largest.items()}
    return {
        "program": run.baseline_bytes[1],
        **model.held_bytes(),
        "activations": round(live * holes["activations"]),
        "logits": round(logits * holes["logits"]),
    }


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
