"""Whether a layout can work on so many ranks: refused before anything is built, with the nearest that can. Pure."""

from __future__ import annotations

from mpilm.config import Config, microbatches, resolve
from mpilm.errors import ConfigError
from mpilm.mesh.shape import MeshShape
from mpilm.model.size import flops_by_part
from mpilm.parallel.partition import partition, stated
from mpilm.parallel.pipeline.schedules import refusal


def mesh_shape(config: Config, ranks: int) -> MeshShape:
    """The mesh on which `ranks` ranks run `config`. Raises ConfigError naming the setting and a value that would do."""
    parallel = resolve(config).parallel
    if ranks % parallel.pipeline:
        fits = [p for p in range(1, ranks + 1) if ranks % p == 0]
        near = min(fits, key=lambda p: (abs(p - parallel.pipeline), p))
        raise ConfigError(
            f"--parallel.pipeline {parallel.pipeline} does not divide {ranks} rank{'s' * (ranks > 1)}; the nearest that does: "
            f"{near}, or start {-(-ranks // parallel.pipeline) * parallel.pipeline} ranks"
        )
    shape = MeshShape(pipeline=parallel.pipeline, data=ranks // parallel.pipeline)
    _refuse_too_many(config, shape, ranks)
    if parallel.zero and shape.data == 1:
        raise ConfigError(
            f"--parallel.zero {parallel.zero} shards over the data ranks, and {ranks} rank{'s' * (ranks > 1)} with "
            f"--parallel.pipeline {parallel.pipeline} leave 1; write --parallel.zero 0, or start {2 * parallel.pipeline} ranks"
        )
    reason = refusal(parallel.schedule, parallel.pipeline, parallel.chunks, replica_microbatches(config, shape))
    if reason is not None:
        raise ConfigError(reason)
    if parallel.cut:
        stated(parallel.cut, config.model.n_layers, parallel.pipeline * parallel.chunks)
    return shape


def replica_microbatches(config: Config, shape: MeshShape) -> int:
    """Microbatches of the program of each data replica; where they do not divide, some replicas have one fewer."""
    return -(-microbatches(config) // shape.data)


def _refuse_too_many(config: Config, shape: MeshShape, ranks: int) -> None:
    """More replicas than there are microbatches to share out."""
    train, most = config.train, microbatches(config)
    if shape.data > most:
        replicas = f"{ranks} ranks" if shape.pipeline == 1 else f"{ranks} ranks make {shape.data} replicas of the pipeline"
        raise ConfigError(
            f"{replicas}, but a step has only {most} microbatches (--train.global-batch {train.global_batch} over "
            f"--train.micro-batch {train.micro_batch}); start {most * shape.pipeline} ranks or fewer, "
            f"or make the batch {shape.data * train.micro_batch}"
        )


def cut_by_cost(config: Config, vocab_size: int) -> tuple[int, ...]:
    """Layers of each stage: as the user states, or balanced by their operations, embedding, head and loss included."""
    parallel, model = resolve(config).parallel, resolve(config).model
    stages = parallel.pipeline * parallel.chunks
    if parallel.cut:
        return stated(parallel.cut, model.n_layers, stages)
    parts = flops_by_part(model, vocab_size)
    return partition(model.n_layers, stages, parts["embed"], parts["head"], parts["block"])
