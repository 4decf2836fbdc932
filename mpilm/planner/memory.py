"""The memory of a rank: what it holds throughout, and what a step adds at its peak."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain

from mpilm.config.schema import OFFLOADED_PARTS, Config, microbatch_count, tensor_part_count
from mpilm.kernels import LOGITS_BLOCK, LOSS_BLOCK, MAX_LOGITS
from mpilm.model.flops import activation_bytes, block_numel, embedding_and_head_numel, parameter_count
from mpilm.ops.halving import MIN_HALVING_RANKS, count_bucket_copies
from mpilm.ops.tree import block_of_rank, count_buffers, plan_accumulation, plan_block_accumulation, plan_merges
from mpilm.parallel.flat_layout import BUCKET
from mpilm.parallel.layout_check import can_defer_logits, reduces_in_rounds
from mpilm.parallel.pipeline.actions import Action
from mpilm.parallel.pipeline.schedules import lower, schedule
from mpilm.planner.cost import MMAP_THRESHOLD_BYTES, WIRE_RATIO
from mpilm.planner.layout import PlacedLayout

# glibc keeps smaller blocks that are freed, and the next microbatch does not quite fit where one was. For each byte in use so
# many lie in holes, measured (docs/log.md): more where forward and backward of different parts alternate more often. A GPU's
# memory is counted as torch hands it out, without holes.
FRAGMENTATION = {"none": 0.42, "gpipe": 0.26, "1f1b": 0.5, "interleaved": 0.65, "zero-bubble": 0.65}
LOGITS_FRAGMENTATION = 0.5
COMPILER_BYTES = 200 << 20  # of torch.compile, in the processor's memory
FIRST_STEP_BYTES = 22 << 20  # libraries, MPI's buffers and the text, which the first step brings into memory
CHECKPOINT_BLOCK_BYTES = 16 << 20  # see checkpoint/format.py
CHECKPOINT_WRITE_BYTES = 3 * CHECKPOINT_BLOCK_BYTES  # in flight, see checkpoint/save.py
MOMENTS = {"adamw": 2.0, "sgd": 1.0, "adafactor": 0.0, "muon": 1.0}  # a parameter; for muon, of matrices in blocks


def step_bytes(
    config: Config, vocab_size: int, cut: Sequence[int], stages: Sequence[int], program: Sequence[Action], device: str
) -> dict[str, int]:
    """Return the peak bytes of a step on a rank that has these stages of the cut and runs this program."""
    model, train, tensor, last = config.model, config.train, config.parallel.tensor, len(cut) - 1
    tokens, of_stage = train.micro_batch * model.context_length // config.parallel.context, dict[int, dict[str, int]]()
    for stage in stages:
        part = cut[stage], stage == 0, stage == last
        of_stage[stage] = activation_bytes(
            model, vocab_size, tokens, train.dtype, *part, train.recompute, tensor, tensor_part_count(config)
        )
    # Part of the logits' bytes that lives from forward to backward: the logits, or, if there are few, their probabilities.
    is_blockwise = device == "cpu" and not train.compile and tokens * vocab_size > LOSS_BLOCK and tensor_part_count(config) == 1
    is_deferred = can_defer_logits(config) and tokens * vocab_size > MAX_LOGITS
    saved = 0.0 if is_deferred else 0.25 if is_blockwise and train.dtype != "float32" else 0.5
    current = peak = 0  # of all microbatches; the logits of one are counted with their gradient below
    for action in program:
        parts = of_stage[action.stage]
        added = parts["activations"] + round(saved * parts["logits"])
        changes = {"F": added, "I": parts["split_backward"] - added, "B": -added, "W": -parts["split_backward"]}
        current += changes.get(action.kind, 0)
        peak = max(peak, current)
    all_tokens = 4 * tokens * model.d_model
    received = all_tokens // tensor * 2 * (last > 0)  # receives posted early: an input and a gradient
    received += 3 * all_tokens * (tensor > 1)  # in a region: its input and gradient, and those of a part
    logits = max(parts["logits"] for parts in of_stage.values())
    live = peak - round(saved * logits) + max(parts["recompute"] for parts in of_stage.values()) + received
    live_factor = logits_factor = 1.0  # two float32 tensors: the logits and their gradient
    if is_deferred:
        logits_factor = min(1.0, 8 * LOGITS_BLOCK / logits) if logits else 1.0  # those of a block of words
    elif is_blockwise:
        logits_factor = saved  # the gradient takes the place of the logits
    elif train.compile:
        logits_factor = 1.0 if train.dtype == "float32" else 0.5  # two tensors in train.dtype
    elif device == "cuda":
        logits_factor = 1.5  # its kernels make a third tensor in backward (measured)
    if device == "cpu":
        largest = 4 * tokens * model.d_ff // tensor_part_count(config)
        live += 3 * largest  # temporaries of a backward
        if largest < MMAP_THRESHOLD_BYTES:
            live_factor += FRAGMENTATION[config.parallel.schedule if last else "none"]
        if 4 * tokens * vocab_size // tensor_part_count(config) < MMAP_THRESHOLD_BYTES and not is_blockwise:
            logits_factor *= 1 + LOGITS_FRAGMENTATION
    return {"activations": round(live * live_factor), "logits": round(logits * logits_factor)}


def rank_bytes(layout: PlacedLayout, rank: int) -> dict[str, int]:
    """Predict the bytes of a rank of the pipeline, part by part, on the replica that uses most; nothing is built."""
    config, parallel, cut, pipeline = layout.config, layout.config.parallel, layout.cut, layout.shape.pipeline
    count = min(layout.microbatches, 3 * len(cut) * pipeline)  # more of them do not raise the peak
    program = lower(schedule(parallel.schedule, pipeline, parallel.chunks, count)[rank], len(cut))
    stages, device, machine = layout.stages_of_rank[rank], layout.machine.device, layout.machine
    step, persistent = step_bytes(config, layout.vocab_size, cut, stages, program, device), persistent_bytes(layout, stages)
    saved = 4 * (1 + MOMENTS[config.train.optimizer]) * parameter_count(config.model, layout.vocab_size)
    return memory_parts(config, device, {"program": machine.program_bytes, **persistent}, step, saved, layout.ranks)


def memory_parts(
    config: Config, device: str, resident: Mapping[str, int], step: Mapping[str, int], saved: float, ranks: int
) -> dict[str, int]:
    """Return all bytes of a rank, given the resident ones, those of a step, and those that all ranks save together."""
    if device == "cuda":
        return {**resident, **step}  # a checkpoint is copied to the processor's memory
    program_bytes = resident["program"] + FIRST_STEP_BYTES + COMPILER_BYTES * config.train.compile
    state = resident["weights"] + resident["moments"] if config.train.offload == "none" else CHECKPOINT_WRITE_BYTES
    blocks = min(CHECKPOINT_WRITE_BYTES, state)  # written between steps
    checkpoint, share = max(0, blocks - sum(step.values())), saved / ranks
    if config.checkpoint.asynchronous:  # a copy of the rank's share; blocks are not split, so it may have one more
        checkpoint = round(share + (ranks > 1) * min(CHECKPOINT_BLOCK_BYTES, share / 3))
    return {**resident, "program": program_bytes, **step, "checkpoint": checkpoint}


def persistent_bytes(layout: PlacedLayout, stages: Sequence[int]) -> dict[str, int]:
    """Return the bytes of these stages of a rank: weights, moments, partial sums of gradients, and their exchange. "passing"
    are weights and gradients that are gathered only while they are used, one stage at a time."""
    total = {"weights": 0.0, "moments": 0.0, "gradients": 0.0, "exchange": 0.0, "passing": 0.0}
    for stage in stages:
        for part, numel in _stage_floats(layout, stage).items():
            total[part] = max(total[part], numel) if part == "passing" else total[part] + numel
    offloaded = OFFLOADED_PARTS[layout.config.train.offload]
    return {part: 0 if part in offloaded else round(4 * numel) for part, numel in total.items()}


def _stage_floats(layout: PlacedLayout, stage: int) -> dict[str, float]:
    config, gradients, zero = layout.config, layout.numel(stage), layout.config.parallel.zero
    share = layout.shard(stage) / gradients  # of ZeRO
    tied = config.model.tie_embeddings and stage == len(layout.cut) - 1
    owned = gradients - tied * layout.rank_vocab_size * layout.rank_model.d_model
    weights = gradients if tied and (stage > 0 or zero == 3) else owned  # with a copy of the matrix of another stage
    moments = MOMENTS[config.train.optimizer] * owned
    if config.train.optimizer == "muon":  # adamw for all but the matrices of blocks
        moments += owned - layout.cut[stage] * block_numel(layout.rank_model)
    if config.parallel.sync_every:
        moments += 2 * weights  # the anchor weights and the outer momentum
    reduced = _round_gradient_floats(layout, stage) if reduces_in_rounds(config) else _gradient_floats(layout, stage)
    return {"weights": weights * (share if zero == 3 else 1), "moments": moments * (share if zero else 1), **reduced}


def _round_gradient_floats(layout: PlacedLayout, stage: int) -> dict[str, float]:
    """Return the floats of gradients that are reduced in each round of microbatches."""
    model, data, first, last = layout.rank_model, layout.replicas, stage == 0, stage == len(layout.cut) - 1
    matrix, (embedding, head) = layout.rank_vocab_size * model.d_model, embedding_and_head_numel(model, layout.rank_vocab_size)
    experts, copies = layout.expert_numel(stage), layout.shape.expert  # each with a gradient of its own
    each, zero = experts // layout.cut[stage], layout.config.parallel.zero  # of a block
    block = block_numel(model) - each * copies
    units, gathered = (
        [first * embedding, *[numel] * layout.cut[stage], *[matrix, head - matrix] * last] for numel in (block, block + each)
    )
    passing = max(matrix * (first or last), model.d_model * model.d_ff)
    if experts and data == copies:  # no other rank has them: the gradients of a block wait for those of the last copy
        passing = max(passing, copies * each)
    if zero == 3:
        passing += max(a + b for a, b in zip(gathered, [*gathered[1:], 0]))  # a unit, and the next one prefetched
    if zero < 2:
        *tied, rest = _pieces(layout, stage)
        blocks = [block] * layout.cut[stage]
        units, each = [*tied, *_merge([*blocks, rest - sum(blocks)])], max(_merge([each] * layout.cut[stage]))
    nodes = copies if layout.shape.context > 1 else 1  # that are left of the gradients of all copies
    exchanged = [(max(units), data, 1, 1), (each, data // copies, copies, nodes)]
    exchange = sum(
        unit * n + 2 * _exchange_floats(layout, ranks, left, ranks * left, -(-min(BUCKET, unit) // ranks))
        for unit, ranks, n, left in exchanged
        if ranks > 1
    )
    buffers = _round_buffers(layout.shape.replicas, microbatch_count(layout.config))
    kept = sum((buffers / ranks + (zero == 0) * (1 - 1 / ranks)) * numel for numel, ranks in layout.vectors(stage))
    return {"gradients": kept, "exchange": exchange, "passing": passing}


def _merge(units: Sequence[int]) -> list[int]:
    """Return the elements of groups of parameters: of neighbouring units, merged as FlatLayout does."""
    groups = [0]
    for unit in units:
        if groups[-1] < BUCKET:
            groups[-1] += unit
        else:
            groups.append(unit)
    return groups


def _gradient_floats(layout: PlacedLayout, stage: int) -> dict[str, float]:
    """Return the floats of gradients that are reduced once a step."""
    config, parallel, data, gradients = layout.config, layout.config.parallel, layout.replicas, layout.numel(stage)
    if parallel.sync_every or parallel.powersgd_rank or not config.train.reproducible:  # no fixed order: one buffer
        compressed = parallel.powersgd_rank and not parallel.sync_every and data > 1
        return {"gradients": gradients, "exchange": gradients if compressed else 0.0, "passing": 0.0}
    total, cuda, exchange = microbatch_count(config), layout.machine.device == "cuda", 0.0
    sharing = 1 if parallel.reduce == "messages" or cuda else layout.replicas_sharing_memory
    if sharing < data:
        pieces = _pieces(layout, stage)
        buckets, (most, every) = sum(math.ceil(piece / BUCKET) for piece in pieces), _partial_sums(data, total, sharing)
        in_flight = buckets if cuda else min(2, buckets)
        each = -(-min(BUCKET, max(pieces)) // data)
        exchange = in_flight * _exchange_floats(layout, data // sharing, most, every, each)
        exchange += most * gradients / sharing * ((sharing > 1) + (parallel.wire_dtype == "bfloat16"))  # packed; errors
    return {"gradients": _gradient_buffers(data, total) * gradients, "exchange": exchange, "passing": 0.0}


def _exchange_floats(layout: PlacedLayout, ranks: int, most: int, every: int, each: int) -> float:
    """Return the floats of the exchange of a bucket between `ranks`, with `each` elements a rank, of which all contribute
    `every` partial sums, and one at most `most`."""
    parallel = layout.config.parallel
    if ranks >= MIN_HALVING_RANKS and parallel.wire_dtype == "float32" and layout.machine.device != "cuda":
        return ranks * each * count_bucket_copies(most)
    return every * each * WIRE_RATIO[parallel.wire_dtype]


def _pieces(layout: PlacedLayout, stage: int) -> list[int]:
    """Return the elements of the parts of a stage's gradient that are exchanged apart: a tied matrix, and all else."""
    matrix = layout.rank_vocab_size * layout.rank_model.d_model
    ends = layout.config.model.tie_embeddings * ((stage == 0) + (stage == len(layout.cut) - 1))
    return [*[matrix] * ends, layout.numel(stage) - layout.expert_numel(stage) - ends * matrix]


@cache
def _partial_sums(data: int, total: int, sharing: int) -> tuple[int, int]:
    """Return the partial sums that a node exchanges at most and those of all nodes (sampled), once its ranks have added up."""
    sample = min(data, max(sharing, 256 // sharing * sharing))
    persistent = [[*plan_block_accumulation(*block_of_rank(r, data, total), total)[1].values()] for r in range(sample)]
    left = [len(plan_merges(sorted(chain(*persistent[r : r + sharing])), total)[1]) for r in range(0, sample, sharing)]
    return max(left), sum(left) * data // sample


@cache
def _gradient_buffers(data: int, total: int) -> int:
    """Return the gradient buffers of the rank that uses most: every block is as long as the first, or one shorter."""
    ranks = {0, total % data, data - 1} if total >= data else {0}
    blocks = [block_of_rank(rank, data, total) for rank in ranks if rank < data]
    return max(count_buffers(plan_block_accumulation(*block, total)[0]) for block in blocks)


@cache
def _round_buffers(data: int, total: int) -> int:
    """Return the gradient buffers where each round of microbatches is summed at once; a round may leave several nodes."""
    rounds = [[(m, m + 1) for m in range(start, min(start + data, total))] for start in range(0, total, data)]
    nodes = [node for leaves in rounds for node, _ in plan_merges(leaves, total)[1]]
    return count_buffers(plan_accumulation(nodes, total)[0])
