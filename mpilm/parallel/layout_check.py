"""Check that a layout works on a number of ranks, before anything is built; refusals name the nearest that works. Pure."""

from typing import Any

from mpilm.config.check import check_config, nearest_multiple
from mpilm.config.schema import Config, microbatch_count, replica_size, resolve_config, sequence_part_count, tensor_part_count
from mpilm.config.settings import override
from mpilm.errors import ConfigError
from mpilm.formatting import count_noun
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import flops_by_part
from mpilm.parallel.pipeline.partition import partition_layers, validate_partition
from mpilm.parallel.pipeline.schedules import find_schedule_problem

ALIGNED_WIDTH = 4  # of heads: of other widths, torch's fused attention gives other bits if there are fewer (2.13, float32)

Remedy = tuple[str, dict[str, Any], int]  # text, settings to change, ranks
Problem = tuple[str, list[list[Remedy]]]  # reason, and remedies by kind, of each kind the best first


def resolve_mesh_shape(config: Config, ranks: int, vocab_size: int | None = None) -> MeshShape:
    """Return the mesh on which `ranks` ranks run `config`; raises ConfigError naming the setting and values that work. The size
    of the vocabulary limits the tensor parts, once it is known."""
    if vocab_size is not None and tensor_part_count(config) > vocab_size:
        raise ConfigError(f"{tensor_part_count(config)} tensor parts cannot divide a vocabulary of {vocab_size}; write fewer")
    if problem := _find_problem(config, ranks):
        reason, kinds = problem
        texts = ((text for text, changes, n in kind if _works(override(config, **changes), n)) for kind in kinds)
        advice = ", or ".join(filter(None, (next(working, "") for working in texts)))
        raise ConfigError(f"{reason}; {advice}" if advice else reason)
    _check_cut(config)
    parallel = config.parallel
    sizes = {axis: getattr(parallel, axis) for axis in ("pipeline", "expert", "context", "tensor")}
    return MeshShape(data=ranks // replica_size(parallel) // parallel.expert, **sizes)


def replica_microbatch_count(config: Config, shape: MeshShape) -> int:
    """Return the microbatches per step of a data replica; where they do not divide evenly, some replicas have one fewer."""
    return -(-microbatch_count(config) // shape.replicas)


def reduces_in_rounds(config: Config) -> bool:
    """Return whether gradients are reduced for every round of microbatches: with ZeRO 2 and 3; where each microbatch is divided
    over the context axis, because the tree adds its parts first; and where experts are divided, whose ranks get gradients of
    the microbatches of other ranks."""
    return config.parallel.zero >= 2 or config.parallel.context > 1 or config.parallel.expert > 1


def can_divide_parts(parts: int, ranks: int) -> bool:
    """Return whether so many ranks of the context axis can share so many sequence parts: each has a subtree of their tree."""
    each, remainder = divmod(parts, ranks)
    return remainder == 0 and (ranks == 1 or (each > 0 and each & (each - 1) == 0))


def find_ulysses_problem(config: Config) -> str:
    """Return why the ranks of the context axis cannot exchange tokens for heads with equal bits; empty if they can."""
    model, context, parts = resolve_config(config).model, config.parallel.context, tensor_part_count(config)
    if (heads := model.n_kv_heads // parts) % context:
        where = " of a tensor part" * (parts > 1)
        return f"--parallel.context {context} does not divide the {heads} key and value heads{where}"
    if model.dropout:  # the bits of torch's batched product depend on the number of heads
        return f"with --model.dropout {model.dropout} the bits would depend on the number of ranks"
    if model.head_width % ALIGNED_WIDTH:
        return f"with --model.head-width {model.head_width} the bits would depend on the number of ranks"
    return ""


def partition_by_cost(config: Config, vocab_size: int) -> tuple[int, ...]:
    """Return the layers of each stage: parallel.cut if set, else balanced by FLOPs, including embedding, head and loss."""
    parallel, model = resolve_config(config).parallel, resolve_config(config).model
    stages = parallel.pipeline * parallel.chunks
    if parallel.cut:
        return validate_partition(parallel.cut, model.n_layers, stages)
    flops = flops_by_part(model, vocab_size)
    return partition_layers(model.n_layers, stages, flops["embed"], flops["head"], flops["block"])


def _works(config: Config, ranks: int) -> bool:
    try:
        check_config(config)
        _check_cut(config)
        return _find_problem(config, ranks) is None
    except ConfigError:
        return False


def _check_cut(config: Config) -> None:
    parallel = resolve_config(config).parallel
    if parallel.cut:
        validate_partition(parallel.cut, config.model.n_layers, parallel.pipeline * parallel.chunks)


def _find_problem(config: Config, ranks: int) -> Problem | None:
    """Return why these ranks cannot run `config`, and what to change; None if they can."""
    checks = (_find_parts_problem, _find_pipeline_problem, _find_expert_problem, _find_data_problem)
    return next(filter(None, (find(config, ranks) for find in checks)), None)


def _find_parts_problem(config: Config, ranks: int) -> Problem | None:
    """Look for a tensor or context axis that does not divide the ranks, or the parts of the model."""
    count, tensor_parts, sequence_parts = count_noun(ranks, "rank"), tensor_part_count(config), sequence_part_count(config)
    for axis, setting, parts in (("tensor", "tensor", tensor_parts), ("context", "sequence", sequence_parts)):
        size = getattr(config.parallel, axis)
        sizes = sorted((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: (abs(n - size), n))
        nearest: list[Remedy] = [(f"the nearest that does: {n}", {f"parallel__{axis}": n}, ranks) for n in sizes]
        if ranks % size:
            more = -(-ranks // size) * size
            return f"--parallel.{axis} {size} does not divide {count}", [nearest, [(f"start {more} ranks", {}, more)]]
        if parts % size:
            both = [(f"the nearest that divides it and {count}: {n}", change, m) for n, (_, change, m) in zip(sizes, nearest)]
            divisors = sorted((n for n in range(1, parts + 1) if parts % n == 0), key=lambda n: (abs(n - size), -n))
            more_ranks: list[Remedy] = [
                (f"start {(m := -(-ranks // n) * n)} ranks with --parallel.{axis} {n}", {f"parallel__{axis}": n}, m)
                for n in divisors if ranks % n
            ]  # fmt: skip
            return f"--parallel.{axis} {size} does not divide --model.{setting}-parts {parts}", [both, more_ranks]
        if axis == "context" and not can_divide_parts(parts, size):
            each = f"{parts // size} of {parts} sequence parts, and their number must be a power of two"
            reason = f"--parallel.context {size} gives each rank {each}"
            powers = sorted((size << k for k in range(8)), key=lambda n: abs(n - parts))
            other_parts: list[Remedy] = [
                (f"write --model.sequence-parts {n}", {"model__sequence_parts": n}, ranks) for n in powers
            ]
            return reason, [[(f"the nearest that works: {n}", {"parallel__context": n}, ranks) for n in sizes], other_parts]
    is_stated = config.parallel.context > 1 and config.parallel.context_method == "ulysses"
    if is_stated and (problem := find_ulysses_problem(config)):
        other: Remedy = ("write --parallel.context-method ring, or auto", {"parallel__context_method": "ring"}, ranks)
        return f"--parallel.context-method ulysses: {problem}", [[other]]
    if (length := config.model.context_length) % (tensor_parts * sequence_parts):
        near = nearest_multiple(length, tensor_parts * sequence_parts)
        remedy: Remedy = (f"the nearest that works: {near}", {"model__context_length": near}, ranks)
        kinds = ((sequence_parts, "sequence"), (tensor_parts, "tensor"))
        names = " times ".join(f"{n} {kind} parts" for n, kind in kinds if n > 1)
        return f"--model.context-length {length} is not divisible by {names}", [[remedy]]
    return None


def _find_pipeline_problem(config: Config, ranks: int) -> Problem | None:
    """Look for more stages than layers, and for a pipeline that does not divide the ranks."""
    parallel, layers = resolve_config(config).parallel, config.model.n_layers
    pipeline, chunks, stages = parallel.pipeline, parallel.chunks, parallel.pipeline * parallel.chunks
    each = replica_size(parallel)
    if stages <= layers and ranks % each == 0:
        return None
    groups = ranks * pipeline // each
    divisors = [size for size in range(groups, 0, -1) if groups % size == 0]
    if stages > layers:
        fewer_chunks = range(min(chunks - 1, layers // pipeline), 1, -1)
        largest = f"is the largest that fits {ranks} ranks"
        kinds: list[list[Remedy]] = [
            [(f"--parallel.chunks {n}", {"parallel__chunks": n}, ranks) for n in fewer_chunks],
            [(f"--parallel.pipeline {n} {largest}", {"parallel__pipeline": n}, ranks) for n in divisors if n < pipeline],
            [(f"--model.n-layers {stages}", {"model__n_layers": stages}, ranks)],
        ]
        made = f"--parallel.pipeline {pipeline} with {count_noun(chunks, 'stage')} per rank makes {stages} stages"
        return f"{made}, and --model.n-layers is {layers}: each stage needs a layer", kinds
    divisors.sort(key=lambda size: (abs(size - pipeline), size))
    nearest = [(f"the nearest that does: {n}", {"parallel__pipeline": n}, ranks) for n in divisors]
    more = -(-ranks // each) * each
    times = "".join(f" times --parallel.{axis} {n}" for axis in ("tensor", "context") if (n := getattr(parallel, axis)) > 1)
    reason = f"--parallel.pipeline {pipeline}{times} does not divide {count_noun(ranks, 'rank')}"
    return reason, [nearest, [(f"start {more} ranks", {}, more)]]


def _find_expert_problem(config: Config, ranks: int) -> Problem | None:
    """Look for an expert axis that does not divide the data-parallel ranks."""
    expert, each = config.parallel.expert, replica_size(config.parallel)
    if (data := ranks // each) % expert == 0:
        return None
    sizes = sorted((n for n in range(1, data + 1) if data % n == 0), key=lambda n: (abs(n - expert), n))
    nearest = [(f"the nearest that does: {n}", {"parallel__expert": n}, ranks) for n in sizes]
    more = -(-data // expert) * expert * each
    reason = f"--parallel.expert {expert} does not divide the {count_noun(data, 'data-parallel rank')}"
    return reason, [nearest, [(f"start {more} ranks", {}, more)]]


def _find_data_problem(config: Config, ranks: int) -> Problem | None:
    """Look for replicas without a microbatch, for a single one to shard over, and for sizes that the schedule cannot use."""
    parallel, train, total = resolve_config(config).parallel, config.train, microbatch_count(config)
    pipeline, each = parallel.pipeline, replica_size(parallel)
    data, rank_count = ranks // each, count_noun(ranks, "rank")
    if data > total:
        replicas = (
            rank_count if each == 1 else f"{rank_count} make {data} replicas of the {'pipeline' if pipeline > 1 else 'model'}"
        )
        fewer = [n * each for n in range(total, 0, -1)]
        batches = [data * train.micro_batch, data * train.micro_batch * pipeline]  # the schedule may need one per stage
        kinds: list[list[Remedy]] = [
            [(f"start {n} ranks or fewer" if n > 1 else "start 1 rank", {}, n) for n in fewer],
            [(f"make the batch {n}", {"train__global_batch": n}, ranks) for n in batches],
        ]
        sizes = f"--train.global-batch {train.global_batch} over --train.micro-batch {train.micro_batch}"
        return f"{replicas}, but a step has only {count_noun(total, 'microbatch')} ({sizes})", kinds
    if parallel.zero and data * parallel.context == 1:
        axes = " and ".join(f"--parallel.{axis} {n}" for axis in ("pipeline", "tensor") if (n := getattr(parallel, axis)) > 1)
        one = f"{rank_count}{f' with {axes}' * bool(axes)} leave{'s' * (ranks == 1)} 1"
        without = [("write --parallel.zero 0", {"parallel__zero": 0}, ranks)]
        reason = f"--parallel.zero {parallel.zero} shards over the data-parallel ranks, and {one}"
        return reason, [without, [(f"start {2 * each} ranks", {}, 2 * each)]]
    count = replica_microbatch_count(config, MeshShape(pipeline=pipeline, data=data))
    misfit = find_schedule_problem(parallel.schedule, pipeline, parallel.chunks, count)
    below = count // pipeline * pipeline
    near = sorted((n for n in (below, below + pipeline) if n), key=lambda n: (abs(n - count), -n))
    batches = [n * data * train.micro_batch for n in near]
    return (misfit, [[(f"--train.global-batch {n}", {"train__global_batch": n}, ranks) for n in batches]]) if misfit else None


def can_defer_logits(config: Config) -> bool:
    """Return whether the loss may compute logits block by block: the head has no tensor parts, and tokens no sequence parts."""
    return tensor_part_count(config) == sequence_part_count(config) == 1 and not config.train.compile
