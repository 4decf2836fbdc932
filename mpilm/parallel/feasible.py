"""Whether a layout can work on so many ranks: refused before anything is built, with the nearest that can. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mpilm.config import Config, microbatches, replaced, resolve
from mpilm.errors import ConfigError
from mpilm.mesh.shape import MeshShape
from mpilm.model.flops import flops_by_part
from mpilm.parallel.pipeline.partition import partition_layers, validate_partition
from mpilm.parallel.pipeline.schedules import find_schedule_problem
from mpilm.validation import validate

Advice = Sequence[tuple[str, Config, int]]  # ways out of one kind, best first: words, settings and ranks


def mesh_shape(config: Config, ranks: int) -> MeshShape:
    """The mesh on which `ranks` ranks run `config`. Raises ConfigError naming the setting and values that would do."""
    parallel = resolve(config).parallel
    refused = _refused(config, ranks)
    if refused is not None:
        reason, advice = refused
        words = [next((text for text, other, count in each if _works(other, count)), "") for each in advice]
        raise ConfigError("; ".join(filter(None, (reason, ", or ".join(filter(None, words))))))
    _check_cut(config)
    return MeshShape(pipeline=parallel.pipeline, data=ranks // parallel.pipeline)


def replica_microbatches(config: Config, shape: MeshShape) -> int:
    """Microbatches of the program of each data replica; where they do not divide, some replicas have one fewer."""
    return -(-microbatches(config) // shape.data)


def _works(config: Config, ranks: int) -> bool:
    try:
        validate(config)
        _check_cut(config)
    except ConfigError:
        return False
    return _refused(config, ranks) is None


def _check_cut(config: Config) -> None:
    parallel = resolve(config).parallel
    if parallel.cut:
        validate_partition(parallel.cut, config.model.n_layers, parallel.pipeline * parallel.chunks)


def _refused(config: Config, ranks: int) -> tuple[str, list[Advice]] | None:
    """Why these ranks cannot run `config`, and what might be done."""
    parallel, most = resolve(config).parallel, microbatches(config)
    pipeline, counted = parallel.pipeline, f"{ranks} rank{'s' * (ranks > 1)}"
    stages = pipeline * parallel.chunks
    if stages > config.model.n_layers:
        reason = (
            f"--parallel.pipeline {pipeline} with {parallel.chunks} stage{'s' * (parallel.chunks > 1)} a rank makes {stages} "
            f"stages, and --model.n-layers is {config.model.n_layers}: each stage needs a layer"
        )
        return reason, [_fewer_chunks(config, ranks), _smaller_pipelines(config, ranks), _more_layers(config, stages, ranks)]
    if ranks % pipeline:
        reason = f"--parallel.pipeline {pipeline} does not divide {counted}"
        return reason, [_other_pipelines(config, ranks), _more_ranks(config, -(-ranks // pipeline) * pipeline)]
    shape = MeshShape(pipeline=pipeline, data=ranks // pipeline)
    if shape.data > most:
        replicas = counted if pipeline == 1 else f"{counted} make {shape.data} replicas of the pipeline"
        reason = (
            f"{replicas}, but a step has only {most} microbatch{'es' * (most > 1)} (--train.global-batch "
            f"{config.train.global_batch} over --train.micro-batch {config.train.micro_batch})"
        )
        return reason, [_fewer_ranks(config, most), _larger_batches(config, shape.data, ranks)]
    if parallel.zero and shape.data == 1:
        left = f"{counted} with --parallel.pipeline {pipeline} leave{'s' * (ranks == 1)} 1"
        reason = f"--parallel.zero {parallel.zero} shards over the data ranks, and {left}"
        without = ("write --parallel.zero 0", replaced(config, parallel__zero=0), ranks)
        return reason, [[without], _more_ranks(config, 2 * pipeline)]
    unfit = find_schedule_problem(parallel.schedule, pipeline, parallel.chunks, replica_microbatches(config, shape))
    return (unfit, [_whole_rounds(config, shape, ranks)]) if unfit else None


def _fewer_chunks(config: Config, ranks: int) -> Advice:
    most = config.model.n_layers // config.parallel.pipeline
    fewer = [chunks for chunks in range(config.parallel.chunks - 1, 1, -1) if chunks <= most]
    return [(f"--parallel.chunks {chunks}", replaced(config, parallel__chunks=chunks), ranks) for chunks in fewer]


def _smaller_pipelines(config: Config, ranks: int) -> Advice:
    fit = [p for p in range(config.parallel.pipeline - 1, 0, -1) if ranks % p == 0]
    return [
        (f"--parallel.pipeline {p} is the largest that fits {ranks} ranks", replaced(config, parallel__pipeline=p), ranks)
        for p in fit
    ]


def _more_layers(config: Config, stages: int, ranks: int) -> Advice:
    return [(f"--model.n-layers {stages}", replaced(config, model__n_layers=stages), ranks)]


def _whole_rounds(config: Config, shape: MeshShape, ranks: int) -> Advice:
    """The nearest batches that give each replica a multiple of the stages."""
    rows, count = shape.data * config.train.micro_batch, replica_microbatches(config, shape)
    below = count // shape.pipeline * shape.pipeline
    near = sorted((m for m in (below, below + shape.pipeline) if m), key=lambda m: (abs(m - count), -m))
    return [(f"--train.global-batch {m * rows}", replaced(config, train__global_batch=m * rows), ranks) for m in near]


def _other_pipelines(config: Config, ranks: int) -> Advice:
    near = sorted((p for p in range(1, ranks + 1) if ranks % p == 0), key=lambda p: (abs(p - config.parallel.pipeline), p))
    return [(f"the nearest that does: {p}", replaced(config, parallel__pipeline=p), ranks) for p in near]


def _more_ranks(config: Config, ranks: int) -> Advice:
    return [(f"start {ranks} ranks", config, ranks)]


def _fewer_ranks(config: Config, replicas: int) -> Advice:
    counts = [data * config.parallel.pipeline for data in range(replicas, 0, -1)]
    return [(f"start {n} ranks or fewer" if n > 1 else "start 1 rank", config, n) for n in counts]


def _larger_batches(config: Config, replicas: int, ranks: int) -> Advice:
    """A microbatch for each replica, or as many as the schedule needs."""
    rows = [replicas * each * config.train.micro_batch for each in (1, config.parallel.pipeline)]
    return [(f"make the batch {n}", replaced(config, train__global_batch=n), ranks) for n in rows]


def cut_by_cost(config: Config, vocab_size: int) -> tuple[int, ...]:
    """Layers of each stage: as the user states, or balanced by their operations, embedding, head and loss included."""
    parallel, model = resolve(config).parallel, resolve(config).model
    stages = parallel.pipeline * parallel.chunks
    if parallel.cut:
        return validate_partition(parallel.cut, model.n_layers, stages)
    parts = flops_by_part(model, vocab_size)
    return partition_layers(model.n_layers, stages, parts["embed"], parts["head"], parts["block"])
