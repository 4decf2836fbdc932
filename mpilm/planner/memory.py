"""What a rank will use of its memory: the microbatches that its program keeps, and what it holds for good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain

from mpilm.config import Config, microbatches
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import activation_bytes, block_numel, embedding_and_head_numel
from mpilm.ops.tree import block_of_rank, plan_accumulation, plan_block_accumulation, plan_merges
from mpilm.parallel.feasible import replica_microbatches
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.pipeline.actions import Action
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import schedule

# glibc keeps freed blocks below 32 MiB, and where one microbatch was the next does not quite fit: for each byte in use so many
# lie in holes, measured (docs/log.md), more where forward and backward of different parts take turns more often. Of a GPU what
# torch has given out is counted, and no holes.
HOLES = {"none": 0.42, "gpipe": 0.26, "1f1b": 0.5, "interleaved": 0.65, "zero-bubble": 0.65}
HOLES_OF_LOGITS = 0.5
RETURNED_BYTES = 32 << 20
COMPILER_BYTES = 200 << 20  # of torch.compile, where it is the processor's memory
FIRST_STEP_BYTES = 22 << 20  # of libraries, buffers of MPI, and the text, that come into memory with the first step
SAVED_BLOCK_BYTES = 16 << 20  # of a checkpoint (checkpoint/format.py)
SAVED_AT_ONCE_BYTES = 3 * SAVED_BLOCK_BYTES  # under way (checkpoint/assemble.py)
MOMENTS = {"adamw": 2.0, "sgd": 1.0, "adafactor": 0.0, "muon": 1.0}  # a parameter; of muon those of matrices in blocks


def step_bytes(
    config: Config, vocab_size: int, cut: Sequence[int], stages: Sequence[int], program: Sequence[Action], device: str
) -> dict[str, int]:
    """Bytes that come and go in a step, on the rank that has these stages of the cut and runs this program."""
    model, train, last = config.model, config.train, len(cut) - 1
    tokens = train.micro_batch * model.context_length
    of_stage = {
        stage: activation_bytes(
            model, vocab_size, tokens, train.dtype, cut[stage], stage == 0, stage == last, train.recompute
        )
        for stage in stages
    }  # fmt: skip
    received = 4 * tokens * model.d_model * 2 * (last > 0)  # posted ahead: an input and a gradient
    live: float = peak_bytes(program, of_stage) + max(of["recompute"] for of in of_stage.values()) + received
    logits = max(of["logits"] for of in of_stage.values()) * _logits_factor(config, device)
    if device == "cpu":
        largest = {"activations": 4 * tokens * model.d_ff, "logits": 4 * tokens * vocab_size}
        live += 3 * largest["activations"]  # what a backward makes and lets go again, of the largest block
        live *= 1 + (largest["activations"] < RETURNED_BYTES) * HOLES[config.parallel.schedule if last else "none"]
        logits *= 1 + (largest["logits"] < RETURNED_BYTES) * HOLES_OF_LOGITS
    return {"activations": round(live), "logits": round(logits)}


def _logits_factor(config: Config, device: str) -> float:
    """Of what model/flops.py counts, two tensors in float32: CUDA's kernels make a third one in backward (measured), and a
    compiled loss makes none but the logits, as they are, and their gradient."""
    if config.train.compile:
        return 0.5 if config.train.dtype == "bfloat16" else 1.0
    return 1.5 if device == "cuda" else 1.0


def peak_bytes(program: Sequence[Action], of_stage: Mapping[int, Mapping[str, int]]) -> int:
    """The most that the microbatches of a program keep at once; half of the last one's logits is counted elsewhere."""
    held = most = 0
    logits = max(of["logits"] for of in of_stage.values()) // 2
    for action in program:
        of = of_stage[action.stage]
        kept = of["activations"] + of["logits"] // 2
        held += {"F": kept, "I": of["split_backward"] - kept, "B": -kept, "W": -of["split_backward"]}.get(action.kind, 0)
        most = max(most, held)
    return most - logits


def rank_bytes(
    config: Config, vocab_size: int, cut: Sequence[int], shape: MeshShape, rank: int, program_bytes: int, device: str,
    together: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes that a rank of the pipeline uses, part by part, on the replica that needs most; without building anything.

    `program_bytes`: what the program takes before there is a model. `together`: how many of its replicas share a
    memory, on each node as many; 1 where they do not.
    """
    parallel = config.parallel
    stages = range(rank, len(cut), shape.pipeline)
    count = replica_microbatches(config, shape)
    compute = schedule(parallel.schedule, parallel.pipeline, parallel.chunks, min(count, 3 * len(cut) * shape.pipeline))
    step = step_bytes(config, vocab_size, cut, stages, lower(compute[rank], len(cut)), device)
    held = held_bytes(config, vocab_size, cut, shape, stages, device, together)
    if device == "cuda":
        return {"program": program_bytes, **held, **step}
    saved = 4 * (1 + MOMENTS[config.train.optimizer]) * _model_numel(config, vocab_size)
    at_once = max(0, min(SAVED_AT_ONCE_BYTES, held["weights"] + held["moments"]) - sum(step.values()))
    return {
        "program": program_bytes + FIRST_STEP_BYTES + COMPILER_BYTES * config.train.compile,
        **held,
        **step,
        "checkpoint": copied_bytes(saved, shape.size) if config.checkpoint.asynchronous else at_once,
    }


def copied_bytes(saved: float, ranks: int) -> int:
    """Of a checkpoint of so many bytes, what a rank copies at most: blocks are whole, so one may have one more."""
    share = saved / ranks
    return round(share + (ranks > 1) * min(SAVED_BLOCK_BYTES, share / 3))


def _model_numel(config: Config, vocab_size: int) -> int:
    first, last = embedding_and_head_numel(config.model, vocab_size)
    tied = config.model.d_model * vocab_size * config.model.tie_embeddings
    return config.model.n_layers * block_numel(config.model) + first + last - tied


def held_bytes(
    config: Config, vocab_size: int, cut: Sequence[int], shape: MeshShape, stages: Sequence[int], device: str, together: int
) -> dict[str, int]:
    """Bytes of weights, moments, partial sums of gradients and their exchange, of these stages of a rank; passing: of
    weights and gradients that are whole only while they are used."""
    found = {"weights": 0.0, "moments": 0.0, "gradients": 0.0, "exchange": 0.0, "passing": 0.0}
    for stage in stages:
        for part, numel in _stage_floats(config, vocab_size, cut, shape, stage, device, together).items():
            found[part] = max(found[part], numel) if part == "passing" else found[part] + numel
    return {part: round(4 * numel) for part, numel in found.items()}


def _stage_floats(
    config: Config, vocab_size: int, cut: Sequence[int], shape: MeshShape, stage: int, device: str, together: int
) -> dict[str, float]:
    model, zero, data, total = config.model, config.parallel.zero, shape.data, microbatches(config)
    first, last = stage == 0, stage == len(cut) - 1
    entry, leave = embedding_and_head_numel(model, vocab_size)
    matrix, block_ = vocab_size * model.d_model, block_numel(model)
    gradients = cut[stage] * block_ + first * entry + last * leave
    tied = last and model.tie_embeddings
    own = gradients - tied * matrix
    held = gradients if tied and (not first or zero == 3) else own  # a copy, where the other end is elsewhere
    units = [first * entry, *[block_] * cut[stage], *([matrix, leave - matrix] if last else [])]
    found = {"weights": held / (data if zero == 3 else 1), "moments": _moments(config, own, cut[stage]) / (data if zero else 1)}
    if zero >= 2:
        buffers, largest = _dealt_buffers(data, total), max(units)
        slices = 2 * data * -(-min(BUCKET, largest) // data)
        passing = max(matrix * (first or last), model.d_model * model.d_ff)
        if zero == 3:
            passing += max(a + b for a, b in zip(units, [*units[1:], 0]))
        return {**found, "gradients": buffers * gradients / data, "exchange": largest + slices, "passing": passing}
    parallel, exchange = config.parallel, 0.0
    together = together if parallel.reduce != "sent" and config.train.reproducible and device == "cpu" else 1
    if together < data and config.train.reproducible:
        most, every = _nodes(data, total, together)
        ends = (first + last) * model.tie_embeddings  # which are exchanged apart from all else
        pieces = [*[matrix] * ends, gradients - ends * matrix]
        buckets = sum(math.ceil(piece / BUCKET) for piece in pieces)
        depth = buckets if device == "cuda" else min(2, buckets)
        rounded = parallel.wire_dtype == "bfloat16"
        sent = most * gradients / together
        exchange = depth * every * -(-min(BUCKET, max(pieces)) // data) * (0.5 if rounded else 1)
        exchange += sent * ((together > 1) + rounded)  # packed up; what rounding has left
    if parallel.sync_every:
        exchange, found["moments"] = 0.0, found["moments"] + 2 * held  # where replicas were, and the outer momentum
    elif parallel.compress and data > 1:
        exchange = gradients
    alone = parallel.sync_every or parallel.compress or not config.train.reproducible
    buffers = _block_buffers(data, total) if not alone else 1
    return {**found, "gradients": buffers * gradients, "exchange": exchange, "passing": 0.0}


def _moments(config: Config, numel: int, blocks: int) -> float:
    if config.train.optimizer == "muon":
        matrices = blocks * block_numel(config.model)
        return matrices + 2 * (numel - matrices)
    return MOMENTS[config.train.optimizer] * numel


@cache
def _nodes(data: int, total: int, together: int) -> tuple[int, int]:
    """Partial sums that ranks bring to an exchange when those that are together have added what they can: the most of any, and
    all of them; of very many ranks, judged by some."""
    some = min(data, max(together, 256 // together * together))
    held = [[*plan_block_accumulation(*block_of_rank(r, data, total), total)[1].values()] for r in range(some)]
    left = [len(plan_merges(sorted(chain(*held[at : at + together])), total)[1]) for at in range(0, some, together)]
    return max(left), sum(left) * data // some


@cache
def _block_buffers(data: int, total: int) -> int:
    """Gradient buffers of the rank that needs most: all blocks are as long as the first, or one shorter."""
    ranks = {0, total % data, data - 1} if total >= data else {0}
    return max(
        1 + max(f.buffer for f in plan_block_accumulation(*block_of_rank(r, data, total), total)[0]) for r in ranks if r < data
    )


@cache
def _dealt_buffers(data: int, total: int) -> int:
    """The same where each round of microbatches is summed at once; a round that is no subtree leaves several nodes."""
    rounds = [[(m, m + 1) for m in range(at, min(at + data, total))] for at in range(0, total, data)]
    remaining = [node for leaves in rounds for node, _ in plan_merges(leaves, total)[1]]
    return 1 + max(f.buffer for f in plan_accumulation(remaining, total)[0])
